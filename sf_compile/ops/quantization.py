"""Convolutions of 8-bit integers: ``styleforge::conv2d`` with an ``input_scale``, in plain PyTorch.

    z        the finished input, in float32
    q        z / input_scale rounded to int8, or to uint8 where z comes straight out of a ReLU
    w        the weights of an output channel divided by their scale, the largest magnitude / 127; rounded
    output   float32(sum of q w, exact) * (scale of the channel * input_scale), rounded to the output's dtype

Numbers beyond the range of q become its bounds. Zero is exact, so zero padding is. Behind a nearest
upsampling by 2 the convolution is computed in its sub-pixel form, whose summed weights are what is rounded:
each parity of the output's rows and columns has scales of its own. Integers have no NaN: where the mean or
the variance of an image's norm is not finite, all of that image's output is NaN.

The sums are taken in float64, where they are exact in any order; a GPU's tensor cores take them in int32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import require
from sf_compile.ops.library import absent
from sf_compile.subpixel import subpixel_weights

if TYPE_CHECKING:
    from sf_compile.ops.conv2d_arguments import Arguments

WEIGHT_BOUND = 127
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def input_dtype(activation: str, has_residual: bool) -> torch.dtype:
    """The integers that a finished input is rounded to: uint8 behind a ReLU, with twice as many steps."""
    return torch.uint8 if activation == "relu" and not has_residual else torch.int8


def bound(dtype: torch.dtype) -> int:
    """The largest integer of ``dtype``: an input of ``bound * input_scale`` is just not cut off."""
    return int(torch.iinfo(dtype).max)


def refusal(a: Arguments) -> str | None:
    """Why ``a``, with whatever ``input_scale``, cannot be one of 8-bit integers; None where it can.

    Looks at its settings and at the numbers of dimensions, never at a size of a picture.
    """
    kernel = tuple(int(size) for size in a.weight.shape[2:])
    if a.transposed:
        return "a transposed convolution"
    if a.mean is None or a.mean.dim() != 2 or not a.statistics:
        return "a convolution that does not stand between two instance norms"
    if a.bias is not None or a.output_activation != "none":
        return "a bias, or an activation of the output"
    if a.dtype not in _SIXTEEN_BIT or a.output_dtype != a.dtype:
        return f"computed in {a.dtype} and written in {a.output_dtype}"
    if a.upsample != 1 and not a.is_subpixel:
        return f"a {kernel[0]}x{kernel[1]} convolution behind an upsampling by {a.upsample}"
    return None


def check(a: Arguments) -> None:
    """Where ``a`` has a scale it must be a positive number, and ``refusal`` must let ``a`` through."""
    scale = a.input_scale
    if scale is None:
        return
    require(
        math.isfinite(scale) and scale > 0,
        lambda: f"styleforge::conv2d: input_scale must be a positive number, got {scale}",
    )
    reason = refusal(a)
    if reason is not None:
        require(False, lambda: f"styleforge::conv2d: no 8-bit integers, which input_scale asks for: {reason}")


def quantized_input(z: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``z`` (float32) as integers of ``dtype``: times the float32 nearest to 1 / scale, rounded to even."""
    limits = torch.iinfo(dtype)
    return (z * (1.0 / scale)).round_().nan_to_num_(0.0).clamp_(limits.min, limits.max).to(dtype)


def quantized_weights(taps: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (phase, O, C, rows, columns), float32, as int8 of the same shape; their scales (phase, O).

    Of weights that are not finite the scale is not either, and so is what they make.
    """
    # Times a constant: by a number PyTorch divides on a GPU so, and on a CPU not.
    scales = taps.abs().amax((2, 3, 4)) * (1.0 / WEIGHT_BOUND)
    scales = torch.where(scales == 0, 1.0, scales)
    return (taps / scales[:, :, None, None, None]).round_().to(torch.int8), scales


def taps_of(weight: Tensor, subpixel: bool) -> Tensor:
    """Weights (O, C, kh, kw) as (phase, O, C, rows, columns) of what is computed, float32."""
    weight = weight.float()
    return subpixel_weights(weight) if subpixel else weight[None]


def convolved(a: Arguments, q: Tensor) -> Tensor:
    """The output for the quantised input ``q`` (N, C, H, W), in ``a``'s dtype and layout."""
    assert a.input_scale is not None and a.mean is not None and a.variance is not None
    weight, scales = quantized_weights(taps_of(a.weight.to(a.dtype), a.is_subpixel))
    unit = scales * a.input_scale
    exact = q.double()
    if not a.is_subpixel:
        padded = reference.pad(exact, a.padding, a.padding_mode)
        sums = F.conv2d(padded, weight[0].double(), None, list(a.stride))
        out = sums.float() * unit[0, :, None, None]
    else:
        n, _, h, w = q.shape
        out = unit.new_empty((n, a.out_channels, 2 * h, 2 * w))
        # What reflecting the enlarged picture by one pixel comes to is replicating the source's edge.
        mode = "zeros" if a.padding_mode == "zeros" else "replicate"
        padded = reference.pad(exact, [1, 1, 1, 1], mode)
        for phase in range(4):
            y, x = divmod(phase, 2)
            sums = F.conv2d(padded[:, :, y : y + h + 1, x : x + w + 1], weight[phase].double())
            out[:, :, y::2, x::2] = sums.float() * unit[phase, :, None, None]
    finite = (a.mean.isfinite() & a.variance.isfinite()).all(1)
    out = torch.where(finite[:, None, None, None], out, math.nan)
    return reference.layout(out.to(a.dtype), a.channels_last)


def composed(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op with its ``input_scale``, on any device: exact, and slow."""
    assert a.input_scale is not None
    z = reference.normalize(a.input, *a.norm, a.residual, dtype=torch.float32)
    q = quantized_input(z, a.input_scale, input_dtype(a.activation, a.residual is not None))
    out = convolved(a, q)
    kept = reference.layout(z.to(a.dtype), a.channels_last) if a.keep_input else absent(a.input, a.dtype)
    return out, *reference.statistics(out), kept
