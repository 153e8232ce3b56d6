"""Host side of csrc/mma_conv.cu: convolutions of any shape, from compute capability 8.0 on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

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
from sf_compile.cuda.mma_tiling import Tiling, fastest
from sf_compile.cuda.mma_variant import SOURCE, Variant, pack
from sf_compile.cuda.packing import packed
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent, empty_image

_SIGNATURE = "PPP" + hopper.NORM_SIGNATURE + "PPP" + hopper.SUMS_SIGNATURE + "qqd" + "iiiiiiiiiii"
# Products of a sum from which cuDNN's kernels are taken to gain more than passes around them cost: sooner on
# compute capability 9.0, whose kernels of up to 3x3 taps need not multiply by mma.sync.
_DEEP, _DEEP_ON_HOPPER = 4608, 1152
_WIDE = 64  # channels that fill their tiles
_MOST = 1 << 30  # of what the kernel counts in 32 bits, and doubles


def _output_size(a: Arguments) -> tuple[int, int]:
    left, right, top, bottom = a.padding
    height = a.input.shape[2] * a.upsample + top + bottom - a.weight.shape[2]
    width = a.input.shape[3] * a.upsample + left + right - a.weight.shape[3]
    return height // a.stride[0] + 1, width // a.stride[1] + 1


def _positions(a: Arguments, variant: Variant) -> tuple[int, int]:
    """Rows and columns of windows."""
    height, width = _output_size(a)
    return (height // 2 + 1, width // 2 + 1) if variant.subpixel else (height, width)


def _padded_size(a: Arguments, variant: Variant) -> tuple[int, int]:
    """Rows and columns of what the windows see."""
    left, right, top, bottom = a.padding
    factor = variant.upsample
    return a.input.shape[2] * factor + top + bottom, a.input.shape[3] * factor + left + right


def runs_subpixel(a: Arguments) -> bool:
    """Whether ``a`` runs as four 2x2 convolutions, where each product's eight columns are channels of one."""
    return a.is_subpixel and a.channels_last and a.weight.shape[0] % 8 == 0


def _variant(a: Arguments) -> Variant:
    o, c, kh, kw = a.weight.shape
    subpixel = runs_subpixel(a)
    planar = not is_channels_last(a.input)
    channels_last = all(x is None or is_channels_last(x) for x in (a.input, a.residual))
    # Fresh outputs are aligned: what a store may take depends on the sizes alone.
    out_vector = vector_width(o if a.channels_last else _output_size(a)[1])
    widest = 16 // a.input.element_size()
    vector = vector_width(c, a.input, a.residual) if channels_last else 1
    pad = PADS[a.padding_mode] if any(a.padding) else 0
    if subpixel:
        o, kh, kw = 4 * o, 2, 2
        # What reflecting the enlarged picture by one pixel comes to is replicating the source's edge.
        pad = PADS["replicate"] if a.padding_mode == "reflect" else pad
    return Variant(
        hopper.OPERANDS[a.input.dtype], hopper.parameter(a) or 0, c, o, kh, kw, a.stride[0], a.stride[1],
        1 if subpixel else a.upsample, pad, min(vector, widest), planar, not a.channels_last,
        min(out_vector, widest), a.activation == "relu", a.residual is not None, a.keep_input, a.normalizes,
        a.statistics, a.bias is not None, a.output_activation == "relu", subpixel,
    )  # fmt: skip


def _tiling(a: Arguments, variant: Variant) -> Tiling | None:
    index = a.input.device.index
    positions = (a.input.shape[0], *_positions(a, variant))
    return fastest(variant.layer, shared_bytes(index), multiprocessors(index), positions)


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
    variant = _variant(a)
    height, width = _positions(a, variant)
    if a.input.shape[2] * a.input.shape[3] >= _MOST or max(_padded_size(a, variant)) >= _MOST:
        return "the picture is larger than the kernel counts"
    tiling = _tiling(a, variant)
    if tiling is None:
        return "no tile fits into shared memory"
    layer, (tile_h, tile_w) = variant.layer, tiling.tile
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
    rows, columns = _positions(a, variant)
    tiles_x = -(-columns // tiling.tile[1])
    tiles_per_image = tiles_x * -(-rows // tiling.tile[0])
    channel_blocks = tiling.channel_blocks(variant.layer)
    workers = max(1, multiprocessors(index) * tiling.blocks // channel_blocks)
    workers = min(workers, n * tiles_per_image)
    out = empty_image((n, a.out_channels, out_h, out_w), x, a.channels_last)
    kept = empty_image(x.shape, x, a.channels_last) if a.keep_input else absent(x, x.dtype)
    mean, variance = hopper.statistics_outputs(a)
    form = f"mma_conv {tiling.chunk_bytes} {tiling.warps_n} {tiling.tiles_n} subpixel={variant.subpixel}"
    weights = packed(a.weight, form, functools.partial(pack, tiling, x.element_size(), variant.subpixel))
    residual_strides = (0, 0)
    if a.residual is not None:
        residual_strides = (1, c) if is_channels_last(a.residual) else (h * w, 1)
    _kernel(index, variant, tiling, weights.launch_mode).launch(
        (workers * channel_blocks, 1, 1), tiling.threads, tiling.shared_bytes(variant.layer),
        (
            x.data_ptr(), pointer(a.residual), weights.weight.data_ptr(), *hopper.norm_arguments(a),
            kept.data_ptr() if a.keep_input else 0, out.data_ptr(), pointer(a.bias),
            *hopper.sums_arguments(a, mean, variance), *residual_strides, 1 / (out_h * out_w), n, h, w,
            rows, columns, a.padding[2], a.padding[0], *_padded_size(a, variant), tiles_x, tiles_per_image,
        ),
    )  # fmt: skip
    return out, mean, variance, kept
