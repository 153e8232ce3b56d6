"""Host side of csrc/halo_conv.cu: convolutions of channels_last pictures on Hopper's tensor cores."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sf_compile.cuda import activation, hopper
from sf_compile.cuda.halo_variant import (
    QUANTIZED,
    SOURCE,
    TILE_H,
    TILE_W,
    Variant,
    pack,
    pack_integers,
    pack_transposed,
)
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import PADS, is_channels_last, multiprocessors, pointer
from sf_compile.cuda.loader import load
from sf_compile.cuda.packing import packed
from sf_compile.cuda.tensor_maps import TensorMap, channels_last_map
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent, empty_image

_THREADS = 384
_ROUND = {0: 2, 1: 4, 2: 4}  # columns of a tile that are stored at a time, by DTYPE
_ACTIVATIONS = 2 * activation.SIGNATURE  # of the input, of the output
_SIGNATURE = "P" + hopper.NORM_SIGNATURE + _ACTIVATIONS + "PP" + hopper.SUMS_SIGNATURE + "iiiiiiiiiqq"
_RECIPROCAL = 1 << 42
_MOST_TILES = 1 << 21  # of a launch: what the kernel divides by a reciprocal


def _variant(a: Arguments) -> Variant:
    # Of an input that is yet to be rounded, what it is rounded to makes no difference to what fits.
    quantized = QUANTIZED.get(a.input.dtype, int(a.input_scale is not None))
    subpixel = a.upsample == 2 or a.transposed
    # The windows of the sub-pixel form are alike whatever the kernel: one variant for all.
    kh, kw, stride = (3, 3, 1) if subpixel else (a.weight.shape[2], a.weight.shape[3], a.stride[0])
    # A window of a transposed convolution may lie outside with taps of which the kernel has none.
    pad = PADS[a.padding_mode] if any(a.padding) or a.transposed else 0
    if subpixel and pad == PADS["reflect"]:
        pad = PADS["replicate"]  # what reflecting the enlarged picture by one pixel comes to
    return Variant(
        hopper.OPERANDS[a.dtype], hopper.parameter(a) or 0, a.input.shape[1], a.out_channels,
        kh, kw, stride, subpixel, pad, activation.code(a.activation), a.normalizes and not quantized,
        a.statistics, a.bias is not None, activation.code(a.output_activation), quantized,
    )  # fmt: skip


def _usable_picture(x: Tensor) -> bool:
    return is_channels_last(x) and x.data_ptr() % 16 == 0


def refusal(a: Arguments) -> str | None:
    """Why this kernel does not run ``a``; None where it does."""
    reason = hopper.refusal(a)
    if reason is not None:
        return reason
    reason = activation.refusal(a.activation)
    if reason is not None:
        return reason
    n, c, h, w = a.input.shape
    o, (kh, kw) = a.out_channels, a.weight.shape[2:]
    left, right, top, bottom = a.padding
    stride = 1 if a.transposed else a.stride[0]  # of the windows
    if c % 8 or o % 8 or o == 0:
        return f"{c} -> {o} channels: whole 16-byte accesses need multiples of 8"
    if a.input_scale is not None and c % 16:
        return f"{c} channels of 8-bit integers: whole 16-byte accesses need multiples of 16"
    if not a.channels_last or not _usable_picture(a.input):
        return "the picture is not channels_last"
    if a.residual is not None or a.keep_input:
        return "a residual, or an input that is kept, is finished by a pass of its own"
    if a.transposed:
        if a.upsample != 1 or tuple(a.stride) != (2, 2):
            return f"a transposed convolution of stride {tuple(a.stride)}, upsampling by {a.upsample}"
        if not (_sees_two(kh, top, bottom) and _sees_two(kw, left, right)):
            return f"a transposed {kh}x{kw} convolution padded by {tuple(a.padding)}"
    elif a.upsample == 2:
        if not a.is_subpixel:
            return "an upsampling other than by 2, followed by a 3x3 convolution padded by 1"
    elif a.upsample != 1:
        return f"upsampling by {a.upsample}"
    elif tuple(a.stride) not in ((1, 1), (2, 2)) or min(kh, kw) < stride:
        return f"stride {tuple(a.stride)} of a {kh}x{kw} kernel"
    elif max(kh, kw) > 7:
        return f"a {kh}x{kw} kernel"
    # A mirrored pixel has to lie in the tile that needs it.
    if a.upsample == 1 and not a.transposed:
        reflects = a.padding_mode == "reflect"
        far = 2 if reflects else 1
        if top >= kh or left >= kw or far * bottom > kh - 1 or far * right > kw - 1:
            return f"a padding of {tuple(a.padding)} is wide for a {kh}x{kw} kernel"
    variant = _variant(a)
    memory = variant.memory()
    if memory is None:
        return f"a {kh}x{kw} kernel over {c} channels does not fit into shared memory"
    if variant.row_blocks > multiprocessors(a.input.device.index):
        return f"{o} output channels are more than the GPU has multiprocessors for"
    tiles = n * (h // (TILE_H * stride) + 2) * (w // (TILE_W * stride) + 2)
    if tiles > _MOST_TILES or h * w * c >= 2**31:
        return "the picture is larger than the kernel counts"
    return None


def _sees_two(taps: int, before: int, after: int) -> bool:
    """Whether a transposed convolution of stride 2 sees the pixels that the sub-pixel form does.

    Along one axis: of every output pixel of one parity the same two source pixels, and twice as many in all.
    """
    return taps - 3 <= before <= 1 and before + after == taps - 2


@functools.cache
def _kernel(index: int, variant: Variant, mode: str) -> Kernel:
    signature = ("TF" if variant.subpixel else "TT") + _SIGNATURE + ("f" if variant.quantized else "")
    return load(SOURCE, "halo_conv", variant.constants(), index, signature, mode)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; the caller has asked ``refusal``.

    An input of int8 or uint8 is in units of ``input_scale``; of its norm, which was applied, only mean and
    variance are looked at.
    """
    x, index = a.input, a.input.device.index
    n, c, h, w = x.shape
    o, (kh, kw) = a.out_channels, a.weight.shape[2:]
    left, right, top, bottom = a.padding
    variant = _variant(a)
    memory = variant.memory()
    assert memory is not None
    if variant.subpixel:
        out_h, out_w = 2 * h, 2 * w
        windows_y, windows_x = h + int(variant.phase_rows < 32), w + int(variant.phase_rows < 64)
    else:
        out_h = windows_y = (h + top + bottom - kh) // variant.stride + 1
        out_w = windows_x = (w + left + right - kw) // variant.stride + 1
    tiles_x = -(-windows_x // TILE_W)
    tiles_per_image = tiles_x * -(-windows_y // TILE_H)
    blocks = min(multiprocessors(index) // variant.row_blocks, n * tiles_per_image) * variant.row_blocks
    out = empty_image((n, o, out_h, out_w), x, True, a.dtype)
    mean, variance = hopper.statistics_outputs(a)
    form = f"halo_conv subpixel={variant.subpixel} slot={variant.slot_channels}"
    packing = functools.partial(pack, variant)
    scale: tuple[float, ...] = ()
    if variant.quantized:
        assert a.input_scale is not None
        form, packing, scale = f"{form} int8", functools.partial(pack_integers, variant), (a.input_scale,)
    if a.transposed:
        form += f" transposed {top} {left}"
        packing = functools.partial(pack_transposed, variant, top, left)
        top = left = 1  # windows begin where those of a picture enlarged by 2 do
    weights = packed(a.weight, form, packing)
    box = (variant.slot_channels, *variant.plane)
    exact = a.normalizes  # rounded to TF32 when it is finished, else by the copy
    kind = torch.uint8 if variant.quantized else x.dtype  # bytes are copied alike whatever they are
    maps = [channels_last_map(x.data_ptr(), kind, (n, c, h, w), box, variant.stride, to_tf32=not exact)]
    box = (min(variant.phase_rows, 64, 128 // variant.element_bytes), TILE_H, _ROUND[variant.dtype])
    if variant.subpixel:
        pixel = variant.element_bytes * o
        parities = [out.data_ptr() + pixel * (p * out_w + q) for p in (0, 1) for q in (0, 1)]
        shape = (n, o, h, w)
        outputs = [channels_last_map(at, a.dtype, shape, box, spread=2) for at in parities]
        maps.append(TensorMap.joined(outputs))
    else:
        maps.append(channels_last_map(out.data_ptr(), a.dtype, (n, o, out_h, out_w), box))
    _kernel(index, variant, weights.launch_mode).launch(
        (blocks, 1, 1), _THREADS, memory.bytes,
        (
            *maps, weights.weight.data_ptr(), *hopper.norm_arguments(a), activation.arguments(a.activation),
            activation.arguments(a.output_activation),
            out.data_ptr(), pointer(a.bias),
            *hopper.sums_arguments(a, mean, variance), n, h, w, out_h, out_w, top, left, tiles_x,
            tiles_per_image, -(-_RECIPROCAL // tiles_x), -(-_RECIPROCAL // tiles_per_image), *scale,
        ),
    )  # fmt: skip
    return out, mean, variance, absent(x, a.dtype)
