"""``styleforge::conv2d`` with an ``input_scale`` on a GPU: a pass that rounds its input, integer products.

The pass (csrc/normalize.cu) finishes the input and writes it as 8-bit integers, and as it is where it is
kept; csrc/halo_conv.cu convolves those, twice as many in a clock as of 16 bits, from half of the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sf_compile.cuda import halo_conv
from sf_compile.cuda.layout import is_channels_last
from sf_compile.cuda.normalization import apply, usable
from sf_compile.ops import quantization
from sf_compile.ops.conv2d_arguments import Arguments


def _finished(a: Arguments) -> Arguments:
    """What is left of ``a`` for the convolution, which looks at the norm's mean and variance alone."""
    return a._replace(norm_weight=None, norm_bias=None, activation="none", residual=None, keep_input=False)


def refusal(a: Arguments) -> str | None:
    """Why no kernel multiplies integers for ``a``, whose settings have been checked; None where one does."""
    if a.input.dtype != a.dtype:
        return f"the pass that rounds the input reads {a.dtype}, not {a.input.dtype}"
    for picture in (a.input, a.residual):
        if picture is not None and (picture.dtype != a.dtype or not is_channels_last(picture)):
            return f"the pass that rounds the input reads channels_last pictures in {a.dtype}"
        if picture is not None and picture.data_ptr() % 16:
            return "a picture is not aligned to 16 bytes"
    if not usable(a.input):
        return "the pass that rounds the input does not take the picture"
    return halo_conv.refusal(_finished(a))


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; the caller has asked ``refusal``."""
    assert a.input_scale is not None
    dtype = quantization.input_dtype(a.activation, a.residual is not None)
    q, kept = apply(
        a.input, a.norm, a.residual, 1, (0, 0, 0, 0), "zeros", True, a.keep_input, dtype=dtype,
        per_unit=1.0 / a.input_scale,
    )  # fmt: skip
    precision = "fp16" if a.dtype == torch.float16 else "bf16"
    out, mean, variance, none = halo_conv.conv2d(_finished(a)._replace(input=q, precision=precision))
    return out, mean, variance, none if kept is None else kept
