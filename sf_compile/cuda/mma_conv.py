"""Host side of csrc/mma_conv.cu: convolutions of any shape, from compute capability 8.0 on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import hopper
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import (
    PADS,
    is_channels_last,
    multiprocessors,
    pointer,
    shared_bytes,
    vector_width,
)
from sf_compile.cuda.loader import load
from sf_compile.cuda.mma_tiling import Layer, Tiling, fastest
from sf_compile.cuda.packing import packed
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent, empty_image

SOURCE = "mma_conv.cu"
SHARED_BYTES = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90a": 232_448, "sm_120": 101_376,
}  # fmt: skip
"""Shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications")."""

_SIGNATURE = "PPP" + hopper.NORM_SIGNATURE + "PPP" + hopper.SUMS_SIGNATURE + "qqd" + "iiiiiiiiiii"
# Products of a sum from which cuDNN's kernels are taken to gain more than passes around them cost: sooner on
# compute capability 9.0, whose kernels of up to 3x3 taps need not multiply by mma.sync.
_DEEP, _DEEP_ON_HOPPER = 4608, 1152
_WIDE = 64  # channels that fill their tiles
_MOST = 1 << 30  # of what the kernel counts in 32 bits, and doubles


class Variant(NamedTuple):
    """The compile-time constants of one kernel, but for how it is cut."""

    dtype: int
    parameter: int
    channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_y: int
    stride_x: int
    upsample: int
    pad: int
    vector: int
    planar: bool
    out_planar: bool
    out_vector: int
    relu: bool
    residual: bool
    keep: bool
    transform: bool
    statistics: bool
    bias: bool
    output_relu: bool

    @property
    def layer(self) -> Layer:
        """What its cutting depends on."""
        return Layer(
            2 if self.dtype else 4, self.channels, self.out_channels, self.kernel_h, self.kernel_w,
            self.stride_y, self.stride_x, self.vector, self.transform, self.residual, self.statistics,
            self.out_planar,
        )  # fmt: skip

    def constants(self, tiling: Tiling) -> dict[str, int]:
        """By the names that the kernel source uses."""
        fields = {**self._asdict(), **tiling._asdict()}
        return {name.upper(): int(value) for name, value in fields.items()}


def variants(arch: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) of layers that stand for the many that may be asked for, cut for ``arch``."""
    plain = Variant(
        1, 1, 128, 128, 3, 3, 1, 1, 1, 2, 8, False, False, 8, relu=True, residual=False, keep=False,
        transform=True, statistics=True, bias=False, output_relu=False,
    )  # fmt: skip
    change = plain._replace
    bare = change(relu=False, transform=False, statistics=False, bias=True, output_relu=True)
    planar = change(vector=1, planar=True, out_planar=True, out_vector=1)
    kinds = (
        (plain, (270, 480)),
        (plain, (32, 32)),
        (change(dtype=2, parameter=2), (270, 480)),
        (change(relu=False, residual=True, keep=True), (270, 480)),
        (change(channels=32, out_channels=64, stride_y=2, stride_x=2), (540, 960)),
        (change(channels=64, out_channels=32, upsample=2, pad=3), (540, 960)),
        (
            bare._replace(channels=3, out_channels=32, kernel_h=9, kernel_w=9, vector=1, planar=True),
            (540, 960),
        ),
        (bare._replace(dtype=2, channels=4, out_channels=16, kernel_h=7, kernel_w=7, vector=4), (540, 960)),
        (bare._replace(channels=32, out_channels=3, kernel_h=9, kernel_w=9, out_planar=True), (540, 960)),
        (bare._replace(channels=512, out_channels=256, pad=1), (64, 64)),
        (change(channels=20, out_channels=20, vector=4, out_vector=4, keep=True), (540, 960)),
        (change(channels=24, out_channels=40, kernel_h=5, kernel_w=5), (540, 960)),
        (change(channels=48, out_channels=48, stride_y=3, stride_x=3, upsample=3), (180, 320)),
        (change(channels=16, out_channels=16, kernel_h=11, kernel_w=11, parameter=0), (540, 960)),
        (change(channels=130, out_channels=70, kernel_h=1, kernel_w=1, vector=2, out_vector=2), (540, 960)),
        (change(channels=33, out_channels=5, kernel_w=2, stride_x=2, vector=1, out_vector=1), (540, 960)),
        (change(channels=8, out_channels=130, kernel_h=2, kernel_w=6, out_vector=2), (135, 240)),
        (planar._replace(dtype=2, parameter=0, channels=12, keep=True, residual=True, pad=1), (37, 53)),
    )
    wide = change(dtype=0, parameter=0, vector=4, out_vector=4)
    bare = bare._replace(dtype=0, parameter=0, kernel_h=9, kernel_w=9, out_vector=4)
    in_tf32 = (
        (wide, (270, 480)),
        (wide, (32, 32)),
        (wide._replace(relu=False, residual=True, keep=True), (270, 480)),
        (wide._replace(channels=32, out_channels=64, stride_y=2, stride_x=2), (540, 960)),
        (wide._replace(channels=64, stride_y=2, stride_x=2), (270, 480)),
        (wide._replace(out_channels=64, upsample=2, pad=3, relu=False, residual=True), (540, 960)),
        (wide._replace(channels=64, out_channels=32, upsample=2, pad=3), (1080, 1920)),
        (bare._replace(channels=3, out_channels=32, vector=1, planar=True), (1080, 1920)),
        (bare._replace(channels=32, out_channels=3, vector=4, out_planar=True), (1080, 1920)),
        (wide._replace(channels=18, out_channels=20, vector=2, out_vector=2, keep=True), (540, 960)),
        (planar._replace(dtype=0, parameter=0, channels=2, keep=True, residual=True, pad=1), (37, 53)),
    )
    for variant, size in (*kinds, *in_tf32):
        tiling = fastest(variant.layer, SHARED_BYTES[arch], 108, (1, *size))
        assert tiling is not None
        yield SOURCE, variant.constants(tiling)


def _output_size(a: Arguments) -> tuple[int, int]:
    (height, width), (kh, kw) = _padded_size(a), a.weight.shape[2:]
    return (height - kh) // a.stride[0] + 1, (width - kw) // a.stride[1] + 1


def _padded_size(a: Arguments) -> tuple[int, int]:
    left, right, top, bottom = a.padding
    return a.input.shape[2] * a.upsample + top + bottom, a.input.shape[3] * a.upsample + left + right


def _variant(a: Arguments) -> Variant:
    o, c, kh, kw = a.weight.shape
    planar = not is_channels_last(a.input)
    channels_last = all(x is None or is_channels_last(x) for x in (a.input, a.residual))
    # Fresh outputs are aligned: what a store may take depends on the sizes alone.
    out_vector = vector_width(o if a.channels_last else _output_size(a)[1])
    widest = 16 // a.input.element_size()
    vector = vector_width(c, a.input, a.residual) if channels_last else 1
    pad = PADS[a.padding_mode] if any(a.padding) else 0
    return Variant(
        hopper.OPERANDS[a.input.dtype], hopper.parameter(a) or 0, c, o, kh, kw, a.stride[0], a.stride[1],
        a.upsample, pad, min(vector, widest), planar, not a.channels_last, min(out_vector, widest),
        a.activation == "relu", a.residual is not None, a.keep_input, a.normalizes, a.statistics,
        a.bias is not None, a.output_activation == "relu",
    )  # fmt: skip


def _tiling(a: Arguments, variant: Variant) -> Tiling | None:
    index = a.input.device.index
    output = (a.input.shape[0], *_output_size(a))
    return fastest(variant.layer, shared_bytes(index), multiprocessors(index), output)


def _dense(x: Tensor) -> bool:
    return is_channels_last(x) or x.is_contiguous()


@functools.cache
def _has_mma(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


def refusal(a: Arguments) -> str | None:
    """Why this kernel does not run ``a``; None where it does."""
    if not a.input.is_cuda or not _has_mma(a.input.device.index):
        return "products by mma.sync need compute capability 8.0"
    reason = hopper.operand_refusal(a)
    if reason is not None:
        return reason
    if {a.activation, a.output_activation} - {"none", "relu"}:
        return f"the activations {a.activation} and {a.output_activation}"
    if not all(x is None or _dense(x) for x in (a.input, a.residual)):
        return "a picture is neither contiguous nor channels_last"
    if a.keep_input and tuple(a.stride) != (1, 1):
        return "a kept input before a stride: no tile has the pixels that no window reads"
    if a.weight.numel() == 0:
        return "the weight is empty"
    padded, (height, width) = _padded_size(a), _output_size(a)
    if a.input.shape[2] * a.input.shape[3] >= _MOST or max(padded) >= _MOST:
        return "the picture is larger than the kernel counts"
    tiling = _tiling(a, _variant(a))
    if tiling is None:
        return "no tile fits into shared memory"
    layer, (tile_h, tile_w) = _variant(a).layer, tiling.tile
    if a.input.shape[0] * (-(-height // tile_h)) * (-(-width // tile_w)) * tiling.steps(layer) >= _MOST:
        return "the picture is larger than the kernel counts"
    return None


def prefers(a: Arguments) -> bool:
    """Whether this kernel is likely to be faster than passes around cuDNN's convolution.

    A pass reads or writes a picture once. Beside sums of many products it weighs little, and there cuDNN,
    whose kernels are tuned for every GPU, multiplies faster, if the channels fill its tiles.
    """
    o, c, kh, kw = a.weight.shape
    fills = c % 8 == 0 and o % 8 == 0 and min(c, o) >= _WIDE
    by_wgmma = a.input.is_cuda and hopper.available(a.input.device.index) and kh * kw <= 9
    return not (fills and c * kh * kw >= (_DEEP_ON_HOPPER if by_wgmma else _DEEP))


@functools.cache
def _kernel(index: int, variant: Variant, tiling: Tiling, mode: str) -> Kernel:
    if torch.cuda.get_device_capability(index) < (9, 0):
        mode = "ordinary"
    return load(SOURCE, "mma_conv", variant.constants(tiling), index, _SIGNATURE, mode)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; the caller has asked ``refusal``."""
    x, index = a.input, a.input.device.index
    n, c, h, w = x.shape
    variant = _variant(a)
    tiling = _tiling(a, variant)
    assert tiling is not None
    out_h, out_w = _output_size(a)
    tiles_x = -(-out_w // tiling.tile[1])
    tiles_per_image = tiles_x * -(-out_h // tiling.tile[0])
    channel_blocks = tiling.channel_blocks(variant.layer)
    workers = max(1, multiprocessors(index) * tiling.blocks // channel_blocks)
    workers = min(workers, n * tiles_per_image)
    out = empty_image((n, variant.out_channels, out_h, out_w), x, a.channels_last)
    kept = empty_image(x.shape, x, a.channels_last) if a.keep_input else absent(x, x.dtype)
    mean, variance = hopper.statistics_outputs(a)
    form = f"mma_conv {tiling.chunk_bytes} {tiling.warps_n} {tiling.tiles_n}"
    weights = packed(a.weight, form, functools.partial(pack, tiling, x.element_size()))
    residual_strides = (0, 0)
    if a.residual is not None:
        residual_strides = (1, c) if is_channels_last(a.residual) else (h * w, 1)
    _kernel(index, variant, tiling, weights.launch_mode).launch(
        (workers * channel_blocks, 1, 1), tiling.threads, tiling.shared_bytes(variant.layer),
        (
            x.data_ptr(), pointer(a.residual), weights.weight.data_ptr(), *hopper.norm_arguments(a),
            kept.data_ptr() if a.keep_input else 0, out.data_ptr(), pointer(a.bias),
            *hopper.sums_arguments(a, mean, variance), *residual_strides, 1 / (out_h * out_w), n, h, w,
            out_h, out_w, a.padding[2], a.padding[0], *_padded_size(a), tiles_x, tiles_per_image,
        ),
    )  # fmt: skip
    return out, mean, variance, kept


def pack(tiling: Tiling, size: int, weight: Tensor) -> Tensor:
    """Weights (O, C, kh, kw) in the order of the right operand's registers (csrc/mma.cuh).

    As (block of channels, chunk, step along a row of taps, product of the chunk, row of taps, warp, products,
    lane, products of one load, half of the depth, elements of a word), where a load takes the products of two
    where a warp has an even number of them. ``size`` is what an element has in bytes; float32 is rounded to
    TF32.
    """
    o, c, kh, kw = weight.shape
    weight = tf32.rounded(weight)
    chunk, taps, word = tiling.chunk_bytes // size, tiling.step_taps, 4 // size
    block, chunks, steps = tiling.block_channels, -(-c // chunk), -(-kw // taps)
    whole = weight.new_zeros((-(-o // block) * block, chunks * chunk, kh, steps * taps))
    whole[:o, :c, :, :kw] = weight
    # A product's depth: channels of one tap, or the taps of a step and their channels.
    depth = whole.view(-1, chunks, tiling.depths, chunk // tiling.depths, kh, steps, taps)
    depth = depth.permute(0, 1, 2, 4, 5, 6, 3)
    together = 1 if tiling.tiles_n % 2 else 2
    fragments = depth.reshape(
        -1, tiling.warps_n, tiling.tiles_n // together, together, 8,
        chunks, tiling.depths, kh, steps, 2, 4, word,
    )  # fmt: skip
    return fragments.permute(0, 5, 8, 6, 7, 1, 2, 4, 10, 3, 9, 11).contiguous()
