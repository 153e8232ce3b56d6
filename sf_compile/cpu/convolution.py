"""``styleforge::conv2d`` on a CPU: a pass to its padded input, a convolution, a pass to its statistics.

The convolution takes the form that runs fastest:

    direct     oneDNN's, as it is
    sub-pixel  of a picture enlarged by 2, 3x3: four 2x2 convolutions of the picture itself, as one of four
               times the channels by oneDNN. Exact at the borders, with 4/9 of the products.
    Winograd   3x3 of stride 1, many channels: by csrc/cpu/winograd.cpp, with 4/9 of the products
    columns    to a few channels, as of a network's last layer: every column of the kernel as output channels
               of its own (kernel kh x 1) by oneDNN, which computes no fewer than 8 or 16, added up afterwards

A bfloat16 picture on a CPU that does not multiply bfloat16 is convolved in float32, and rounded once.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_compile.cpu import kernels
from sf_compile.cpu.forms import is_winograd
from sf_compile.cuda.packing import is_kept, packed
from sf_compile.ops import reference
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent
from sf_compile.subpixel import is_subpixel, subpixel_weights

_FEW_CHANNELS = 4
_LEAST_COLUMNS = 5
_WINOGRAD_LEAST_PIXELS = 256  # of the output; below, reading 16/9 of the weights costs more
_PACKED_LEAST_PIXELS = 16384  # likewise; below, weights that each call packs anew cost more than they save


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it, and PyTorch's convolutions use them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def form_of(a: Arguments, dtype: torch.dtype) -> int:
    """The form in which the convolution is computed in ``dtype``."""
    kernel, stride = tuple(a.weight.shape[2:]), tuple(a.stride)
    if a.transposed or dtype != torch.float32 or stride != (1, 1):
        return kernels.DIRECT
    n, _, height, width = _shape(a)
    least = 0 if is_kept(a.weight) else _PACKED_LEAST_PIXELS
    if is_subpixel(kernel, stride, a.upsample, a.padding):
        return kernels.SUBPIXEL if n * height * width >= least else kernels.DIRECT
    if a.out_channels <= _FEW_CHANNELS and kernel[1] >= _LEAST_COLUMNS:
        return kernels.COLUMNS
    enough = n * height * width >= max(least, _WINOGRAD_LEAST_PIXELS)
    if enough and is_winograd(kernel, stride, a.input.shape[1], a.out_channels):
        return kernels.WINOGRAD
    return kernels.DIRECT


def _direct_weights(weight: Tensor) -> Tensor:
    return weight.float().contiguous(memory_format=torch.channels_last)


def _subpixel_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) as (4 O, C, 2, 2)."""
    return subpixel_weights(weight.float()).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _column_weights(weight: Tensor) -> Tensor:
    """(O, C, kh, kw) as (kw O, C, kh, 1)."""
    columns = weight.float().permute(3, 0, 1, 2).flatten(0, 1).unsqueeze(3)
    return columns.contiguous(memory_format=torch.channels_last)


def _weights(a: Arguments, form: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    if form == kernels.SUBPIXEL:
        return packed(a.weight, "cpu subpixel", _subpixel_weights).weight
    if form == kernels.WINOGRAD:
        return packed(a.weight, "cpu winograd", kernels.winograd_weights).weight
    if form == kernels.COLUMNS:
        return packed(a.weight, "cpu columns", _column_weights).weight
    if a.weight.dtype == dtype and (
        not channels_last or a.weight.is_contiguous(memory_format=torch.channels_last)
    ):
        return a.weight
    return packed(a.weight, "cpu", _direct_weights if dtype == torch.float32 else _channels_last).weight


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, of checked arguments that ``kernels.take``."""
    x = a.input
    dtype = x.dtype if x.dtype == torch.float32 or multiplies_bfloat16() else torch.float32
    form = form_of(a, dtype)
    # Between planar pictures there is nothing to gain from another layout.
    last = a.channels_last or form != kernels.DIRECT or not kernels.is_planar(x)
    padded, kept = _prepared(a, form, dtype, last)
    weight = _weights(a, form, dtype, last)
    mean = variance = None
    if form == kernels.WINOGRAD:
        result, mean, variance = kernels.winograd(
            padded, weight, a.out_channels, a.bias, a.output_activation, x.dtype, a.statistics
        )
        return _results(a, result, mean, variance, kept)
    if form == kernels.DIRECT:
        bias = a.bias if a.bias is None else a.bias.to(dtype)
        if a.transposed:
            result = reference.conv_transpose2d(padded, weight, bias, a.stride, a.padding, "none")
        else:
            result = F.conv2d(padded, weight, bias, list(a.stride))
    else:
        result = F.conv2d(padded, weight)
    result = kernels.layout(result, last)
    if form != kernels.DIRECT or (last and (result.dtype != x.dtype or a.output_activation != "none")):
        shape = result.shape if form == kernels.DIRECT else _shape(a)
        bias = None if form == kernels.DIRECT else a.bias
        result, mean, variance = kernels.assemble(
            result, form, shape, bias, a.output_activation, x.dtype, a.statistics, a.weight.shape[3]
        )
    else:
        result = _activated(result, a.output_activation).to(x.dtype)
    if a.statistics and mean is None:
        mean, variance = kernels.statistics(result)
    return _results(a, result, mean, variance, kept)


def _results(
    a: Arguments, result: Tensor, mean: Tensor | None, variance: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        kernels.layout(result, a.channels_last),
        absent(a.input, torch.float32) if mean is None else mean,
        absent(a.input, torch.float32) if variance is None else variance,
        absent(a.input, a.input.dtype) if kept is None else kept,
    )


def _shape(a: Arguments) -> tuple[int, int, int, int]:
    """Of the output of a convolution of stride 1."""
    n, _, height, width = a.input.shape
    left, right, top, bottom = a.padding
    return (
        n, a.out_channels, height * a.upsample + top + bottom - a.weight.shape[2] + 1,
        width * a.upsample + left + right - a.weight.shape[3] + 1,
    )  # fmt: skip


def _prepared(a: Arguments, form: int, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor | None]:
    """The convolution's input, and what is kept of it."""
    upsample, padding, mode = a.upsample, a.padding, a.padding_mode
    if form == kernels.SUBPIXEL:
        # What reflecting the enlarged picture by one pixel comes to.
        upsample, mode = 1, "replicate" if mode == "reflect" else mode
    if a.transposed:
        padding = [0, 0, 0, 0]
    same = upsample == 1 and not any(padding) and dtype == a.input.dtype
    if same and not a.normalizes:
        return kernels.layout(a.input, last), None
    padded, kept = kernels.finish(
        a.input, a.norm, a.residual, last, upsample=upsample, padding=padding, padding_mode=mode, dtype=dtype,
        keep=a.keep_input,
    )  # fmt: skip
    return padded, kept if kept is None else kernels.layout(kept, a.channels_last)


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation in ("none", "relu"):
        return reference.activate_(x, activation)
    return reference.activate_(x.to(torch.float32), activation)
