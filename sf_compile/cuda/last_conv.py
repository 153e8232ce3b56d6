"""Host side of csrc/last_conv.cu: the convolution that makes a picture, on compute capability 9.0."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import activation, hopper
from sf_compile.cuda.activation import CLAMPED, FLOOR, IDENTITY, LEAKY, RECTIFIED, TANH
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import DTYPES, PADS, is_channels_last, multiprocessors, pointer
from sf_compile.cuda.loader import load
from sf_compile.cuda.packing import packed
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent, empty_image

SOURCE = "last_conv.cu"
COLUMNS = {0: (96, 136, 200), 1: (128, 184, 200), 2: (128, 184, 200)}
"""Values of MMA_N to choose from, for each DTYPE: with more, a thread's share of the product would spill."""

_THREADS = 384
_SIGNATURE = "PP" + hopper.NORM_SIGNATURE + "PP" + "iiiiiiiii" + 2 * activation.SIGNATURE
_CHANNELS = (8, 16, 32, 64)
_KERNELS = (3, 5, 7, 9)
_MOST_PLANES = 32  # for one output row: half the rows of a product
_MOST_COLUMN_BYTES = 128  # what the operand's swizzle spans
_MOST_SLOTS = 16
_BARRIER_BYTES = 512
# Weights and a product that a thread holds in registers, of its 216.
_MOST_REGISTERS = 184
# What a unit of work costs beside its products, in columns: choosing MMA_N is a matter of a few percent.
_UNIT_COLUMNS = 16


class Variant(NamedTuple):
    """The compile-time constants of one kernel, but for those that follow from the others.

    ``output`` is the DTYPE that is written, where it is another.
    """

    dtype: int
    parameter: int
    channels: int
    out_channels: int
    kernel: int
    activation: int
    mma_n: int
    output_activation: int = FLOOR
    output: int = -1

    @property
    def element_bytes(self) -> int:
        """Bytes of an input's element; as an operand it has as many."""
        return 2 if self.dtype else 4

    @property
    def pixels(self) -> int:
        """Pixels that make a column of the product."""
        return 2 if self.channels < 32 else 1

    @property
    def column_bytes(self) -> int:
        """What a column has of one input row."""
        return self.pixels * self.channels * self.element_bytes

    @property
    def steps(self) -> int:
        """Products, 32 bytes deep, of a unit: over its input rows and the channels of a column."""
        return (self.kernel + 1) * self.column_bytes // 32

    @property
    def strip(self) -> int:
        """Outputs in a row of a unit."""
        return (self.mma_n - (self.kernel - 1) // self.pixels) * self.pixels

    @property
    def planes(self) -> int:
        """Rows of the product for one output row: a tap and an output channel each."""
        return (self.kernel + self.pixels - 1) * self.out_channels

    @property
    def held(self) -> int:
        """Steps whose weights are kept in registers: all of them, or of float32 the first that find room."""
        room = (_MOST_REGISTERS - self.mma_n // 2) // 4
        return self.steps if self.steps <= room else 0 if self.dtype else room

    @property
    def pitch(self) -> int:
        """Floats from a plane to the next in shared memory, 8 or 24 modulo 32: stores meet no bank twice."""
        half = self.mma_n // 16 * 8
        columns = max(half + 8, self.mma_n - half)
        return columns if columns % 16 else columns + 8

    def memory(self) -> tuple[int, int] | None:
        """(slots of the ring, bytes of dynamic shared memory); None where too few input rows fit."""
        fixed = 2 * self.planes * self.pitch * 4 + (self.steps - self.held) * 2048 + _BARRIER_BYTES
        row = self.mma_n * self.column_bytes
        slots = min(_MOST_SLOTS, (hopper.SHARED_BYTES - fixed) // row)
        # A unit reads kernel + 1 rows at once; one more lets copies run ahead.
        return (slots, slots * row + fixed) if slots >= self.kernel + 2 else None

    def units(self, images: int, height: int, width: int) -> int:
        """Pairs of rows of strips of an output."""
        return images * -(-width // self.strip) * -(-height // 2)

    def constants(self) -> dict[str, int]:
        """By the names that the kernel source uses."""
        memory = self.memory()
        assert memory is not None
        return {
            **{name.upper(): int(value) for name, value in self._asdict().items()},
            "OUTPUT": self.dtype if self.output < 0 else self.output,
            "SLOTS": memory[0], "PITCH": self.pitch, "HELD": self.held,
        }  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) of the last layers of the networks that this package knows, and of smaller ones."""
    for dtype in hopper.SIXTEEN_BIT.values():
        for mma_n in COLUMNS[dtype]:
            for channels in (16, 32):
                yield SOURCE, Variant(dtype, dtype, channels, 3, 9, RECTIFIED, mma_n).constants()
                yield SOURCE, Variant(dtype, 0, channels, 3, 9, RECTIFIED, mma_n, FLOOR, 0).constants()
        yield SOURCE, Variant(dtype, 0, 64, 3, 7, RECTIFIED, 128).constants()
        yield SOURCE, Variant(dtype, dtype, 32, 1, 9, IDENTITY, 200).constants()
        yield SOURCE, Variant(dtype, dtype, 32, 3, 3, IDENTITY, 184).constants()
        yield SOURCE, Variant(dtype, dtype, 64, 3, 3, RECTIFIED, 200).constants()
        yield SOURCE, Variant(dtype, dtype, 8, 4, 7, RECTIFIED, 128).constants()
        yield SOURCE, Variant(dtype, dtype, 64, 3, 7, RECTIFIED, 128, TANH).constants()
        yield SOURCE, Variant(dtype, dtype, 32, 3, 9, LEAKY, 200, CLAMPED).constants()
    for channels, mma_n in ((8, 200), (16, 96), (16, 136), (32, 96), (32, 136)):
        yield SOURCE, Variant(0, 0, channels, 3, 9, RECTIFIED, mma_n).constants()
    yield SOURCE, Variant(0, 0, 32, 3, 7, RECTIFIED, 136, TANH).constants()
    yield SOURCE, Variant(0, 0, 32, 3, 9, LEAKY, 136, CLAMPED).constants()
    yield SOURCE, Variant(0, 0, 32, 1, 9, IDENTITY, 96).constants()
    yield SOURCE, Variant(0, 0, 32, 3, 3, IDENTITY, 200).constants()
    yield SOURCE, Variant(0, 0, 16, 4, 5, LEAKY, 200).constants()


def _output_size(a: Arguments) -> tuple[int, int]:
    left, right, top, bottom = a.padding
    kernel = a.weight.shape[2]
    return a.input.shape[2] + top + bottom - kernel + 1, a.input.shape[3] + left + right - kernel + 1


@functools.lru_cache(maxsize=1024)
def _fastest(
    blocks: int, dtype: int, parameter: int, channels: int, out_channels: int, kernel: int, function: int,
    output_function: int, output: tuple[int, int, int],
) -> Variant | None:  # fmt: skip
    """The kernel that keeps the busiest of ``blocks`` blocks shortest; None if none fits.

    ``output`` is (N, H, W).
    """
    constants = dtype, parameter, channels, out_channels, kernel, function
    kinds = [Variant(*constants, mma_n, output_function) for mma_n in COLUMNS[dtype]]
    fitting = [kind for kind in kinds if kind.memory() is not None]

    def time(kind: Variant) -> int:
        return -(-kind.units(*output) // blocks) * (kind.mma_n + _UNIT_COLUMNS)

    return min(fitting, key=time, default=None)


def _variant(a: Arguments) -> Variant | None:
    o, c, k, _ = a.weight.shape
    return _fastest(
        multiprocessors(a.input.device.index), hopper.OPERANDS[a.input.dtype], hopper.parameter(a) or 0,
        c, o, k, activation.code(a.activation), activation.shared_code(a.output_activation),
        (a.input.shape[0], *_output_size(a)),
    )  # fmt: skip


def refusal(a: Arguments) -> str | None:
    """Why this kernel does not run ``a``; None where it does."""
    reason = hopper.refusal(a)
    if reason is not None:
        return reason
    n, c = a.input.shape[:2]
    o, _, kh, kw = a.weight.shape
    reason = activation.refusal(a.activation)
    if reason is not None:
        return reason
    if a.residual is not None or a.keep_input or a.statistics:
        return "a residual, a kept input or statistics of the last layer"
    if a.upsample != 1 or tuple(a.stride) != (1, 1):
        return f"upsampling by {a.upsample} and stride {tuple(a.stride)}: the last layer has neither"
    if c not in _CHANNELS or not 1 <= o <= 4:
        return f"{c} -> {o} channels are not one of {_CHANNELS} -> 1 to 4"
    if c * a.input.element_size() > _MOST_COLUMN_BYTES:
        return f"{c} channels of {a.input.dtype} are more than {_MOST_COLUMN_BYTES} bytes a pixel"
    if kh != kw or kh not in _KERNELS or o * kw > _MOST_PLANES:
        return f"a {kh}x{kw} kernel to {o} channels"
    if _output_size(a)[0] < 3:
        return "the picture has fewer than 3 rows"
    if not is_channels_last(a.input) or a.input.data_ptr() % 16:
        return "the picture is not channels_last"
    variant = _variant(a)
    if variant is None:
        return f"a {kh}x{kw} kernel over {c} channels does not fit into shared memory"
    if variant.units(n, *_output_size(a)) * (kh + 1) >= 2**31:
        return "the picture has too many rows"
    return None


@functools.cache
def _kernel(index: int, variant: Variant, mode: str) -> Kernel:
    return load(SOURCE, "last_conv", variant.constants(), index, _SIGNATURE, mode)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; the caller has asked ``refusal``."""
    x, index = a.input, a.input.device.index
    n, _, h, w = x.shape
    out_h, out_w = _output_size(a)
    variant = _variant(a)
    assert variant is not None
    if a.output_dtype != x.dtype:
        variant = variant._replace(output=DTYPES[a.output_dtype])
    memory = variant.memory()
    assert memory is not None
    out = empty_image((n, variant.out_channels, out_h, out_w), x, a.channels_last, a.output_dtype)
    mean, variance = hopper.statistics_outputs(a)
    weights = packed(a.weight, f"last_conv held={variant.held}", functools.partial(pack, variant))
    _kernel(index, variant, weights.launch_mode).launch(
        (min(multiprocessors(index), variant.units(n, out_h, out_w)), 1, 1), _THREADS, memory[1],
        (
            x.data_ptr(), weights.weight.data_ptr(), *hopper.norm_arguments(a), pointer(a.bias),
            out.data_ptr(), n, h, w, out_h, out_w, a.padding[2], a.padding[0], PADS[a.padding_mode],
            int(a.channels_last), activation.arguments(a.activation),
            activation.arguments(a.output_activation),
        ),
    )  # fmt: skip
    return out, mean, variance, absent(x, x.dtype)


def product_rows(variant: Variant, weight: Tensor) -> Tensor:
    """Weights (O, C, K, K) as the left operand of a unit's product, (64 rows, input row x pixel x channel).

    Row 32 p + tap O + o has, for pixel e of a column in input row r, the weights of output channel o at
    kernel row r - p and column tap + e - (pixels - 1); zeros where the kernel has no such place.
    """
    o, c, k, _ = weight.shape
    rows = weight.new_zeros((2, _MOST_PLANES // o, o, k + 1, variant.pixels, c))
    taps = weight.permute(3, 0, 2, 1)  # column, output channel, row, channel
    for p in range(2):
        for e in range(variant.pixels):
            first = variant.pixels - 1 - e
            rows[p, first : first + k, :, p : p + k, e] = taps
    rows = rows.flatten(1, 2)
    padded = rows.new_zeros((2, _MOST_PLANES, *rows.shape[2:]))
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(64, -1)


def pack(variant: Variant, weight: Tensor) -> Tensor:
    """``product_rows``, float32 rounded to TF32, in the order the kernel reads it, by steps of 32 bytes.

    A step held in registers is (thread, four words of the product's register fragment, PTX ISA), one behind,
    of shared memory, is (half of 16 bytes, 64 rows, 16 bytes).
    """
    held, word = variant.held, 4 // variant.element_bytes
    rows = tf32.rounded(product_rows(variant, weight)).reshape(64, variant.steps, 8 * word)
    # warp, row half, lane / 4, step, column half, lane % 4, neighbour
    fragments = rows[:, :held].reshape(4, 2, 8, held, 2, 4, word).permute(3, 0, 2, 5, 4, 1, 6)
    shared = rows[:, held:].reshape(64, variant.steps - held, 2, 4 * word).permute(1, 2, 0, 3)
    return torch.cat((fragments.reshape(held, 512 * word), shared.reshape(variant.steps - held, 512 * word)))
