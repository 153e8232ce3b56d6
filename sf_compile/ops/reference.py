"""What every ``styleforge`` op computes, in plain PyTorch.

This is the oracle of the tests, and what runs where no kernel can be compiled (on a CPU also for float16
and float64). Sixteen-bit pictures are normalised in float32 and rounded once, at the end.

    statistics   mean[n, c], variance[n, c] = E[x], E[(x - mean)^2] over the pixels of one channel
    norm_statistics   those of groups of channels, unbiased, and with an eps beside the root
    normalize    act((x - mean) / sqrt(variance + eps) * weight + bias) + residual
    prepare      pad(upsample(...)): an index map, no arithmetic
    convolution  the cross-correlation of torch.nn.functional.conv2d, or its transpose
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_compile.activations import parse
from sf_compile.ops.checks import statistics_dtype

CONSTANT_ROOT = 2.0**-10
"""Where no pixel differs from the mean any root will do; one of this share of the mean loses no digits."""

_TORCH_PAD_MODE = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def layout(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` with exactly the strides that ``torch.empty`` gives in that memory format.

    A tensor with a size-1 dimension is dense in both formats with differing strides; it is
    restrided rather than copied, so that real strides always equal the fake kernel's.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if not x.is_contiguous(memory_format=memory_format):
        return x.contiguous(memory_format=memory_format)
    _, c, h, w = x.shape
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the pixels of each (image, channel) of (N, C, H, W).

    The second pass is about the first one's mean, and corrects it, so that a mean of many standard
    deviations costs no digits. Returns two (N, C) tensors, float32 (float64 for float64 input).
    """
    x = input.to(statistics_dtype(input.dtype))
    about = x.mean((2, 3))
    centred = x - per_channel(about)
    correction = centred.mean((2, 3))
    variance = centred.square_().mean((2, 3)) - correction.square()
    return about + correction, variance.clamp_min_(0)


def norm_statistics(
    mean: Tensor, variance: Tensor, groups: int | None, bessel: float, outer_eps: float | None
) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, C) that a norm uses; see ``sf_compile.ops.norm_statistics``.

    Channels of one size merge without a difference of squares: M = E[m], V = E[v + (m - M)^2]. ``bessel`` is
    n / (n - correction).
    """
    mean, variance = (v.clone(memory_format=torch.contiguous_format) for v in (mean, variance))
    if groups is not None:
        means = mean.unflatten(1, (groups, -1))
        mean = means.mean(2, keepdim=True)
        merged = variance.unflatten(1, (groups, -1)) + (means - mean).square()
        mean, variance = (v.repeat_interleave(means.shape[2], 1) for v in (mean.squeeze(2), merged.mean(2)))
    variance = variance * bessel
    if outer_eps is None:
        return mean, variance
    root = variance.sqrt() + outer_eps
    if outer_eps > 0:
        root = torch.where(variance == 0, root.maximum(mean.abs() * CONSTANT_ROOT), root)
    return mean, root.square()


def per_channel(vector: Tensor) -> Tensor:
    """(C,) or (N, C) as (1 or N, C, 1, 1), to broadcast over pixels."""
    return vector.reshape(-1, vector.shape[-1], 1, 1)


def scale_of(variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight / sqrt(variance + eps), shape (1 or N, C, 1, 1)."""
    scale = torch.rsqrt(per_channel(variance) + eps)
    return scale if weight is None else scale * per_channel(weight.to(scale.dtype))


def affine(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The normalised picture before its activation, in the statistics' dtype; a fresh tensor."""
    x = input.to(statistics_dtype(input.dtype), copy=True)
    if mean is None or variance is None:
        return x
    x.sub_(per_channel(mean.to(x.dtype))).mul_(scale_of(variance.to(x.dtype), weight, eps))
    return x if bias is None else x.add_(per_channel(bias.to(x.dtype)))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x, "relu": torch.relu_, "leaky_relu": F.leaky_relu, "hardtanh": F.hardtanh_,
    "clamp": torch.clamp_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_,
    "silu": torch.ops.aten.silu_, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
}  # fmt: skip


def activate_(x: Tensor, activation: str, slope: Tensor | None = None) -> Tensor:
    """An activation of ``sf_compile.activations``, which may write into ``x``; returns the result."""
    function, parameters, scale, offset = found = parse(activation)
    x = _FUNCTIONS[function](x, *parameters) if slope is None else torch.prelu(x, slope.to(x.dtype))
    # Autograd may have kept the function's value: it is not written into.
    return (x * scale).add_(offset) if found.is_scaled else x


def normalize(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    slope: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act((input - mean) / sqrt(variance + eps) * weight + bias) + residual, in ``dtype`` or ``input``'s.

    ``slope`` (1,) or (C,) is that of a PReLU.
    """
    x = activate_(affine(input, mean, variance, weight, bias, eps), activation, slope)
    if residual is not None:
        x.add_(residual)
    return x.to(dtype or input.dtype)


def upsample_nearest(input: Tensor, factor: int) -> Tensor:
    """Every pixel ``factor`` times in both directions: out[i, j] = in[i // factor, j // factor]."""
    return input if factor == 1 else F.interpolate(input, scale_factor=float(factor), mode="nearest")


def pad(input: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``input`` padded by (left, right, top, bottom) pixels."""
    if not any(padding):
        return input
    if mode == "reflect" and input.shape[-1] > 0 and input.shape[-2] > 0:
        return torch.ops.aten.reflection_pad2d(input, list(padding))
    return F.pad(input, list(padding), mode=_TORCH_PAD_MODE[mode])


def moved(input: Tensor, upsample: int, padding: Sequence[int], mode: str) -> Tensor:
    """``input`` upsampled, then padded."""
    return pad(upsample_nearest(input, upsample), padding, mode)


def mirrored(count: int, size: int, device: torch.device) -> Tensor:
    """Indices 0 .. size - 1 of an endless mirror of ``count`` pixels, whose edges are not repeated."""
    period = max(2 * (count - 1), 1)
    rest = torch.arange(size, device=device) % period
    return torch.minimum(rest, period - rest) if count > 1 else torch.zeros_like(rest)


def picture_to_float(
    input: Tensor, size: Sequence[int], dtype: torch.dtype, low: float, high: float, channels_last: bool
) -> Tensor:
    """Bytes (N, H, W, C) as numbers (N, C, *size) from ``low`` to ``high``, extended by reflection."""
    _, height, width, _ = input.shape
    if size[0] != height:
        input = input.index_select(1, mirrored(height, size[0], input.device))
    if size[1] != width:
        input = input.index_select(2, mirrored(width, size[1], input.device))
    x = input.permute(0, 3, 1, 2).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if high - low != 255:
        x = x * (high - low) / 255
    return layout((x + low).to(dtype) if low else x.to(dtype), channels_last)


def picture_to_uint8(input: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Numbers (N, C, H, W) as bytes (N, H, W, C), and which images are not finite."""
    broken = (~torch.isfinite(input)).flatten(1).any(1).to(torch.int32)
    y = input.permute(0, 2, 3, 1).to(statistics_dtype(input.dtype))
    y = y - low if low else y
    y = y * (255 / (high - low)) if high - low != 255 else y
    pixels = y.clamp(0, 255).nan_to_num(0).round_().to(torch.uint8)
    return pixels.contiguous(), broken


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    activation: str, convolve: Callable[..., Tensor] = F.conv_transpose2d,
) -> Tensor:  # fmt: skip
    """The transposed convolution with ``padding`` (left, right, top, bottom) cut off it, and its activation.

    ``weight`` (C, O, kh, kw). Where ``padding`` is negative, on the right or below, the result goes on.
    """
    sizes, output_sizes, cuts = transposed_sizes(stride, padding)
    out = convolve(input, weight, bias, list(stride), sizes, output_sizes)
    if any(cuts):
        out = F.pad(out, [-cut for cut in cuts])
    return _activated(out, activation)


def transposed_sizes(
    stride: Sequence[int], padding: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """PyTorch's padding and output_padding that cut off most of ``padding``, and the rest of it.

    The first two are (height, width); ``padding`` and the rest are left, right, top, bottom.
    """
    left, right, top, bottom = padding
    # PyTorch cuts off `padding` before and `padding - output_padding` after, the latter below the stride.
    sizes = [min(top, bottom + stride[0] - 1), min(left, right + stride[1] - 1)]
    output_sizes = [max(sizes[0] - bottom, 0), max(sizes[1] - right, 0)]
    rest = [left - sizes[1], max(right - sizes[1], 0), top - sizes[0], max(bottom - sizes[0], 0)]
    return sizes, output_sizes, rest


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], activation: str
) -> Tensor:
    """The convolution of an input already padded, and its activation, rounded once if it rounds at all."""
    return _activated(F.conv2d(input, weight, bias, list(stride)), activation)


def _activated(out: Tensor, activation: str) -> Tensor:
    """The activation of what a convolution made, rounded once if it rounds at all; may write into it."""
    if activation in ("none", "relu"):
        return activate_(out, activation)
    return activate_(out.to(statistics_dtype(out.dtype)), activation).to(out.dtype)
