"""Host side of csrc/residual_trunk.cu: all residual blocks of a style network in one cooperative launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import hopper
from sf_compile.cuda.argument_block import Addresses
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import is_channels_last, multiprocessors, parameter_dtype, pointer
from sf_compile.cuda.loader import load
from sf_compile.cuda.packing import packed
from sf_compile.cuda.workspace import zeroed
from sf_compile.ops.library import empty_image

SOURCE = "residual_trunk.cu"
CHANNELS = (64, 128)
"""The channel counts that the kernel is compiled for."""

MOST_LAYERS = 20
_TILE_H, _TILE_W = 8, 16
_MOST_STAGES = 8  # of the ring of weights
_STAGE_STEPS = 4  # steps of a product, of 32 bytes, whose weights are fetched together
_HEADER_BYTES = 16
_TOTAL_BYTES = 512 // 4 * (4 + 1)  # of a channel: four totals, a count; sectors of four lie 512 bytes apart
_SIGNATURE = "F" + "PPPPPff" + "PPPPPP" + "iiii"

Affine = tuple[Tensor, Tensor]
"""Weight and bias (C,) of an instance norm."""


class Finish(NamedTuple):
    """How the picture is finished that a trunk begins with, by ``mean`` and ``variance`` or by no norm."""

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool


class Variant(NamedTuple):
    """The compile-time constants of one kernel, by the source's names in lower case."""

    dtype: int
    parameter: int
    channels: int
    relu: bool
    stages: int

    @classmethod
    @functools.cache
    def of(cls, dtype: int, parameter: int, channels: int, relu: bool) -> Variant:
        """With as many stages as find room."""
        bare = cls(dtype, parameter, channels, relu, 0)
        room = (hopper.SHARED_BYTES - bare.shared_bytes) // (bare.stage_bytes + 16)
        return bare._replace(stages=min(_MOST_STAGES, room))

    def constants(self) -> dict[str, int]:
        """By the names that the kernel source uses."""
        return {name.upper(): int(value) for name, value in self._asdict().items()}

    @property
    def threads(self) -> int:
        """Of a block: a warpgroup for every 64 output channels, and one that fetches and stores."""
        return 128 * (self.channels // 64 + 1)

    @property
    def stage_bytes(self) -> int:
        """Of the weights that are fetched together."""
        return _STAGE_STEPS * self.channels * 32

    @property
    def shared_bytes(self) -> int:
        """Of a block: two tiles with halo (of float32 one, and a halo again), the ring, and what is small.

        That is scales and shifts, a dump, and barriers.
        """
        cells, threads = (_TILE_H + 2) * (_TILE_W + 2), self.threads - 128
        chunks = self.channels // (8 if self.dtype else 4)
        tile = chunks // 4 * (-(-cells * 64 // 512) * 512)
        halo = -(-(cells - _TILE_H * _TILE_W) * chunks // threads) * threads * 16
        pictures = 2 * tile if self.dtype else tile + halo
        return pictures + self.stages * (self.stage_bytes + 16) + 8 * self.channels + 512


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) of every kernel that ``trunk`` can ask for, but for norms in float32."""
    for dtype in hopper.OPERANDS.values():
        for channels in CHANNELS:
            for relu in (True, False):
                yield SOURCE, Variant.of(dtype, dtype, channels, relu).constants()


@functools.cache
def _kernel(index: int, variant: Variant) -> Kernel:
    return load(SOURCE, "residual_trunk", variant.constants(), index, _SIGNATURE, "cooperative")


def _grid(height: int, width: int) -> tuple[int, int]:
    """Tiles of a row, and in all."""
    tiles_x = -(-width // _TILE_W)
    return tiles_x, tiles_x * -(-height // _TILE_H)


def refusal(
    x: Tensor, finish: Finish, weights: Sequence[Tensor], norms: Sequence[Affine], precision: str = "auto"
) -> str | None:
    """Why ``trunk`` does not run residual blocks of these ``weights`` on ``x``; None where it does.

    Float32 is multiplied in TF32, where ``precision`` allows that. Reads shapes, dtypes, strides and
    addresses, of the picture first: that tells the pictures that are too large from one tensor. ``finish`` is
    taken to fit ``x`` in shapes and devices.
    """
    if not hopper.runs_on(x):
        return "the residual trunk needs float16, bfloat16 or float32, compute capability 9.0 and NVRTC"
    if x.dtype == torch.float32 and not tf32.allowed(precision):
        return "TF32 is not allowed"
    n, c, h, w = x.shape
    if n != 1:
        return f"{n} images: the residual trunk takes one"
    if c not in CHANNELS:
        return f"{c} channels: the residual trunk is compiled for {' and '.join(map(str, CHANNELS))}"
    if not is_channels_last(x) or x.data_ptr() % 16:
        return "the picture is not channels_last, or not aligned to 16 bytes"
    if min(h, w) < 2:
        return f"a picture of {h} x {w} has no pixel to reflect"
    if _grid(h, w)[1] > multiprocessors(x.device.index):
        return f"a picture of {h} x {w} has more tiles than the GPU has multiprocessors"
    if not 2 <= len(weights) <= MOST_LAYERS or len(weights) % 2 or len(norms) != len(weights) - 1:
        return f"{len(weights)} convolutions and {len(norms)} norms between them"
    if any(v.shape != (c, c, 3, 3) or v.dtype != x.dtype or v.device != x.device for v in weights):
        return f"a convolution other than 3x3 over {c} channels in {x.dtype}"
    if not all(v.shape == (c,) and v.device == x.device for norm in norms for v in norm):
        return "a norm over other channels than the picture's"
    statistics = [v for v in finish[:2] if v is not None]
    if not all(v.is_contiguous() for v in (*_vectors(finish, norms), *statistics)):
        return "a vector of a norm is not contiguous"
    if any(v.dtype != torch.float32 for v in statistics):
        return "the statistics are not float32"
    if _parameter(x, finish, norms) is None:
        return "the norms' weights and biases have a dtype of their own"
    return None


def _vectors(finish: Finish, norms: Sequence[Affine]) -> list[Tensor]:
    """The weights and biases of all norms."""
    vectors = (finish.weight, finish.bias, *(v for norm in norms for v in norm))
    return [v for v in vectors if v is not None]


def _parameter(x: Tensor, finish: Finish, norms: Sequence[Affine]) -> int | None:
    """The PARAMETER constant for all norms' weights and biases; None where no kernel takes them."""
    found = {parameter_dtype(x.dtype, vector, vector) for vector in _vectors(finish, norms)}
    return found.pop() if len(found) == 1 else None


def trunk(
    x: Tensor, finish: Finish, weights: Sequence[Tensor], norms: Sequence[Affine], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All residual blocks after a raw convolution output ``x`` (1, C, H, W); ask ``refusal`` before.

    z = norm(x) by ``finish``. Then for each two of ``weights`` (C, C, 3, 3):
    r = conv(pad(relu(norm(conv(pad(z)))))) and z = norm(r) + z, with reflection padding by 1 and instance
    norms of ``norms`` and ``eps``. Returns the last r, raw and channels_last, its mean and biased variance
    ((1, C) float32), and the z that norm(r) is still to be added to.

    Raises:
        KernelLaunchError: the driver rejects the launch.
    """
    _, c, h, w = x.shape
    parameter = _parameter(x, finish, norms)
    assert parameter is not None
    variant = Variant.of(hopper.OPERANDS[x.dtype], parameter, c, finish.relu)
    tiles_x, tiles = _grid(h, w)
    streamed = [packed(weight, "residual_trunk", pack).weight for weight in weights]
    after = [*((pointer(weight), pointer(bias)) for weight, bias in norms), (0, 0)]
    layers = [at for weight, norm in zip(streamed, after, strict=True) for at in (weight.data_ptr(), *norm)]
    out, z, exchange = (empty_image(x.shape, x, True) for _ in range(3))
    out_mean = torch.empty((1, c), dtype=torch.float32, device=x.device)
    out_variance = torch.empty_like(out_mean)
    # A block adds to one of three sets of totals, in turn.
    meeting = zeroed(x.device, "residual trunk", _HEADER_BYTES + 3 * c * _TOTAL_BYTES)
    _kernel(x.device.index, variant).launch(
        (tiles, 1, 1), variant.threads, variant.shared_bytes,
        (
            Addresses.of(layers), x.data_ptr(), pointer(finish.mean), pointer(finish.variance),
            pointer(finish.weight), pointer(finish.bias), finish.eps, eps, exchange.data_ptr(),
            out.data_ptr(), z.data_ptr(), meeting, out_mean.data_ptr(), out_variance.data_ptr(),
            len(weights), h, w, tiles_x,
        ),
    )  # fmt: skip
    return out, out_mean, out_variance, z


def pack(weight: Tensor) -> Tensor:
    """Weights (C, C, 3, 3) as (plane, half of it, tap, 64 rows, chunk of the half, row, channel).

    A chunk is 16 bytes of channels, and a plane four; float32 ones are rounded to TF32.
    """
    c, chunk = weight.shape[0], 16 // weight.element_size()
    split = tf32.rounded(weight).reshape(c // 64, 64, c // (4 * chunk), 2, 2, chunk, 9)
    return split.permute(2, 3, 6, 0, 4, 1, 5).contiguous()
