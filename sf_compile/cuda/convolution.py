"""``styleforge::conv2d`` on a GPU: our prologue and statistics around cuDNN's convolution.

The prologue writes the convolution's finished, upsampled and padded input in one pass; cuDNN
convolves it; the statistics read the raw output once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sf_compile.cuda import packing
from sf_compile.cuda.layout import is_channels_last
from sf_compile.cuda.normalization import apply, usable
from sf_compile.cuda.statistics import statistics
from sf_compile.ops import reference
from sf_compile.ops.checks import statistics_dtype
from sf_compile.ops.conv2d import Arguments, absent, composed


def runs_channels_last(a: Arguments) -> bool:
    """Whether cuDNN is given channels_last: where asked, where the input is, and for 16-bit pictures."""
    sixteen_bit = a.input.dtype in (torch.float16, torch.bfloat16)
    return a.channels_last or sixteen_bit or (is_channels_last(a.input) and not a.input.is_contiguous())


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; its arguments have been checked."""
    left, right, top, bottom = a.padding
    if not usable(a.input, a.input.shape[3] * a.upsample + left + right):
        return composed(a)
    channels_last = runs_channels_last(a)
    zeros = a.padding_mode == "zeros" and left == right and top == bottom
    copies = a.upsample > 1 or (any(a.padding) and not zeros)
    in_layout = is_channels_last(a.input) if channels_last else a.input.is_contiguous()
    z, kept = a.input, None
    if a.normalizes or copies or not in_layout:
        padding = (0, 0, 0, 0) if zeros else (left, right, top, bottom)
        keep = a.keep_input and (copies or channels_last != a.channels_last)
        z, kept = apply(
            a.input, a.norm, a.residual, a.upsample, padding, a.padding_mode, channels_last, keep,
            a.channels_last,
        )  # fmt: skip
        if a.keep_input and kept is None:
            kept = z
    weight = packing.channels_last(a.weight) if channels_last else a.weight
    out = torch.conv2d(z, weight, a.bias, list(a.stride), [top, left] if zeros else [0, 0])
    if a.output_activation == "relu":
        out.relu_()
    dtype = statistics_dtype(a.input.dtype)
    if a.statistics:
        mean, variance = statistics(out)
    else:
        mean, variance = absent(a.input, dtype), absent(a.input, dtype)
    return (
        reference.layout(out, a.channels_last),
        mean,
        variance,
        absent(a.input, a.input.dtype) if kept is None else kept,
    )
