"""``styleforge::conv2d``: a convolution that finishes its producer's norm and starts its own.

An instance norm needs the whole feature map before it can scale one pixel, so it is split: this
op returns its *raw* output with the mean and variance of every (image, channel), and the op that
reads it normalises on the way in:

    z      = act((input - mean) / sqrt(variance + eps) * norm_weight + norm_bias) + residual
    output = output_activation(conv2d(pad(upsample_nearest(z)), weight, bias, stride))

The activations are those of ``sf_compile.activations``.
Every step in front of the convolution is optional, so this one schema also covers a convolution
that reads a finished picture. ``keep_input`` returns ``z`` as well, for another reader of it (the
skip path of a residual block). A convolution bias in front of an instance norm has no effect and
is best left out by the caller.

A ``transposed`` convolution has no pad in front of it: ``padding`` is what is cut off each side of its whole
result, of (H - 1) stride + kh rows, and may be negative on the right and below: the result then goes on.

What is computed in is ``precision``, one of ``sf_compile.precision``. Where that is not "auto", the input,
the residual, weight and bias may be of any dtype: z, weight and bias are rounded to its storage, once, and
everything that is returned has that dtype, but for ``output``, if it is given an ``out_dtype``.

With an ``input_scale`` the products are of 8-bit integers (``sf_compile.ops.quantization``): z is rounded to
multiples of that scale, the weights of each output channel to multiples of theirs. Gradients are those
without it. Its kernels are for compute capability 9.0; other GPUs compute without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sf_compile.ops import quantization, reference
from sf_compile.ops.checks import statistics_dtype
from sf_compile.ops.conv2d_arguments import Arguments, check
from sf_compile.ops.conv2d_gradient import backward, setup_context
from sf_compile.ops.library import absent, empty_image, register

SCHEMA = (
    "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? mean, Tensor? variance, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, str activation, Tensor? residual, "
    "int upsample, int[4] padding, str padding_mode, int[2] stride, str output_activation, "
    "bool statistics, bool keep_input, bool channels_last, bool transposed=False, str precision='auto', "
    "ScalarType? out_dtype=None, float? input_scale=None) "
    "-> (Tensor output, Tensor mean, Tensor variance, Tensor kept_input)"
)


def composed(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op out of the reference's pieces, one PyTorch call after another, on any device."""
    if a.input_scale is not None:
        return quantization.composed(a)
    z = a.input.to(a.dtype)
    if a.normalizes:
        z = reference.normalize(a.input, *a.norm, a.residual, dtype=a.dtype)
    z = reference.layout(z, a.channels_last)
    # A result of another dtype is rounded to that alone, not to the operands' before.
    dtype = a.dtype if a.output_dtype == a.dtype else torch.float32
    weight = a.weight.to(a.dtype).to(dtype)
    bias = None if a.bias is None else a.bias.to(a.dtype).to(dtype)
    if a.transposed:
        upsampled = reference.upsample_nearest(z.to(dtype), a.upsample)
        out = reference.conv_transpose2d(
            upsampled, weight, bias, a.stride, a.padding, a.output_activation
        )
    else:
        padded = reference.moved(z.to(dtype), a.upsample, a.padding, a.padding_mode)
        out = reference.conv2d(padded, weight, bias, a.stride, a.output_activation)
    out = reference.layout(out.to(a.output_dtype), a.channels_last)
    if a.statistics:
        mean, variance = reference.statistics(out)
    else:
        mean = absent(a.input, statistics_dtype(a.output_dtype))
        variance = absent(a.input, statistics_dtype(a.output_dtype))
    return out, mean, variance, z if a.keep_input else absent(a.input, a.dtype)


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sf_compile.cpu import convolution, kernels

    a = Arguments(*arguments)
    check(a)
    tensors = (a.weight, a.bias, a.residual)
    dtypes = {a.dtype, a.output_dtype, a.input.dtype, *(t.dtype for t in tensors if t is not None)}
    plain = len(dtypes) == 1 and a.input_scale is None
    return convolution.conv2d(a) if plain and kernels.take(a.input) else composed(a)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sf_compile.cuda import convolution

    a = Arguments(*arguments)
    check(a)
    return convolution.conv2d(a)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Arguments(*arguments)
    height, width = check(a)
    n, c = a.input.shape[0], a.out_channels
    dtype = statistics_dtype(a.output_dtype)
    shape = (n, c) if a.statistics else (0,)
    kept = absent(a.input, a.dtype)
    if a.keep_input:
        kept = empty_image(a.input.shape, a.input, a.channels_last, a.dtype)
    return (
        empty_image((n, c, height, width), a.input, a.channels_last, a.output_dtype),
        a.input.new_empty(shape, dtype=dtype),
        a.input.new_empty(shape, dtype=dtype),
        kept,
    )


register(SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=backward, setup_context=setup_context)
conv2d = torch.ops.styleforge.conv2d.default
