"""``styleforge::normalize``: a norm whose statistics are known, its activation, a residual.

The second half of an instance norm (the first is ``instance_statistics`` or the statistics that
``conv2d`` returns), or a whole norm with running statistics. What it makes may be upsampled and padded
on the way out, for a reader that is no fused convolution. ``slope`` is a PReLU's, (1,) or (C,):

    output = pad(upsample_nearest(act((input - mean) / sqrt(variance + eps) * weight + bias) + residual))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from sf_compile.activations import parse
from sf_compile.ops import reference
from sf_compile.ops.activation_gradients import activation_gradient, prelu_gradients
from sf_compile.ops.checks import (
    check_activation,
    check_dtype,
    check_image,
    check_moves,
    check_norm,
    check_residual,
    check_slope,
)
from sf_compile.ops.library import empty_image, register

SCHEMA = (
    "normalize(Tensor input, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, float eps, "
    "str activation='none', Tensor? residual=None, bool channels_last=False, int upsample=1, "
    "int[4] padding=[0, 0, 0, 0], str padding_mode='zeros', Tensor? slope=None, "
    "ScalarType? out_dtype=None) -> Tensor"
)


class Norm(NamedTuple):
    """The norm and activation that ``normalize`` applies; without mean, variance: the activation alone.

    Mean, variance, weight and bias are (C,) or (N, C).
    """

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str


class NormGradients(NamedTuple):
    """Gradients of ``normalize``: None where the argument was None."""

    input: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | None = None


def _like(grad: Tensor, vector: Tensor) -> Tensor:
    """A (N, C) gradient summed to the shape and dtype of ``vector``, (N, C) or (C,)."""
    return (grad.sum(0) if vector.dim() == 1 else grad).to(vector.dtype)


def normalize_gradients(
    grad: Tensor, input: Tensor, norm: Norm, slope: Tensor | None = None
) -> NormGradients:
    """Gradients of act(a) with a = (x - m) s w + b and s = 1 / sqrt(v + eps), all (N, C, H, W) or (C,).

    da/dx = s w, da/dm = -s w, da/dv = -(x - m) s^3 w / 2, da/dw = (x - m) s, da/db = 1.
    """
    mean, variance, weight, bias, eps, activation = norm
    centred = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    grad = grad.to(centred.dtype)
    if mean is None or variance is None:
        grad, of_slope = _through(grad, centred, activation, slope)
        return NormGradients(grad, None, None, None, None, of_slope)
    centred = centred - reference.per_channel(mean)
    inverse = torch.rsqrt(reference.per_channel(variance) + eps)
    scale = inverse if weight is None else inverse * reference.per_channel(weight.to(inverse.dtype))
    of_slope = None
    if activation != "none":
        value = centred * scale
        value = value if bias is None else value + reference.per_channel(bias.to(value.dtype))
        grad, of_slope = _through(grad, value, activation, slope)
    total = grad.sum((2, 3))
    correlation = (grad * centred).sum((2, 3))
    flat = inverse.flatten(1)
    flat_scale = scale.flatten(1)
    return NormGradients(
        grad * scale,
        _like(-total * flat_scale, mean),
        _like(-0.5 * correlation * flat_scale * flat.square(), variance),
        None if weight is None else _like(correlation * flat, weight),
        None if bias is None else _like(total, bias),
        of_slope,
    )


def _through(
    grad: Tensor, value: Tensor, activation: str, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the activation's argument and, of a PReLU, of its slope."""
    if slope is None:
        return activation_gradient(grad, value, activation), None
    return prelu_gradients(grad, value, slope, parse(activation).scale)


def moved_gradient(
    grad: Tensor, shape: Sequence[Any], upsample: int, padding: Sequence[int], mode: str
) -> Tensor:
    """Of pad(upsample_nearest(z)) to z (N, C, H, W) of ``shape``; ``padding`` is left, right, top, bottom."""
    n, c, height, width = shape
    sizes = list(padding)
    if any(sizes):
        left, right, top, bottom = sizes
        enlarged = grad.new_empty((n, c, height * upsample, width * upsample))  # its shape alone is read
        if mode == "reflect":
            grad = torch.ops.aten.reflection_pad2d_backward(grad, enlarged, sizes)
        elif mode == "replicate":
            grad = torch.ops.aten.replication_pad2d_backward(grad, enlarged, sizes)
        else:
            grad = torch.nn.functional.pad(grad, [-left, -right, -top, -bottom])
    if upsample > 1:
        # Each pixel was copied upsample^2 times: its gradient is their sum.
        grad = torch.nn.functional.avg_pool2d(grad, upsample, divisor_override=1)
    return grad


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order; ``padding`` is left, right, top, bottom.

    With an ``out_dtype`` the result is rounded to that instead of the input's dtype, and ``residual`` may
    have any.
    """

    input: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str = "none"
    residual: Tensor | None = None
    channels_last: bool = False
    upsample: int = 1
    padding: Sequence[int] = (0, 0, 0, 0)
    padding_mode: str = "zeros"
    slope: Tensor | None = None
    out_dtype: torch.dtype | None = None

    @property
    def norm(self) -> Norm:
        """What is applied to ``input`` before the residual is added."""
        return Norm(self.mean, self.variance, self.weight, self.bias, self.eps, self.activation)


def own(operand: Tensor, *parameters: Tensor | None) -> Tensor:
    """What a backward pass keeps of an operand that eager only adds, or copies by padding or enlarging it.

    A caller may write to a picture once the call is over, as training scripts do that normalise a batch in
    place. Eager keeps one that is normalised by ``parameters`` which require a gradient. One that requires a
    gradient itself is kept as it is: a copy would not lead to the gradients of gradients. While AOTAutograd
    records, our own op copies: its partitioner would move a clone behind that write.
    """
    if any(x is not None and x.requires_grad for x in (operand, *parameters)):
        return operand
    if not isinstance(operand, FunctionalTensor):
        return operand.clone()
    return normalize(operand, None, None, None, None, 0.0, channels_last=not operand.is_contiguous())


def _check(a: Arguments) -> tuple[Any, Any]:
    """Check everything that fake and real calls share; return the output's height and width."""
    check_image("normalize", a.input)
    check_norm("normalize", a.input, a.mean, a.variance, a.weight, a.bias)
    check_activation("normalize", "activation", a.activation, a.slope)
    check_slope("normalize", a.input, a.slope)
    check_dtype("normalize", "out_dtype", a.out_dtype)
    check_residual("normalize", a.input, a.residual, a.out_dtype is not None)
    return check_moves("normalize", a.input, a.upsample, a.padding, a.padding_mode)


def _cpu(*arguments: Any) -> Tensor:
    from sf_compile.cpu import kernels

    a = Arguments(*arguments)
    _check(a)
    plain = a.slope is None and a.out_dtype in (None, a.input.dtype)
    if plain and (a.residual is None or a.residual.dtype == a.input.dtype) and kernels.take(a.input):
        return kernels.finish(
            a.input, a.norm, a.residual, a.channels_last, upsample=a.upsample, padding=a.padding,
            padding_mode=a.padding_mode,
        )[0]  # fmt: skip
    z = reference.normalize(a.input, *a.norm, a.residual, a.slope, a.out_dtype)
    return reference.layout(reference.moved(z, a.upsample, a.padding, a.padding_mode), a.channels_last)


def _cuda(*arguments: Any) -> Tensor:
    from sf_compile.cuda import normalization

    a = Arguments(*arguments)
    _check(a)
    return normalization.normalize(
        a.input, a.norm, a.residual, a.channels_last, a.upsample, a.padding, a.padding_mode, a.slope,
        a.out_dtype,
    )  # fmt: skip


def _fake(*arguments: Any) -> Tensor:
    a = Arguments(*arguments)
    height, width = _check(a)
    return empty_image((*a.input.shape[:2], height, width), a.input, a.channels_last, a.out_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a = Arguments(*inputs)
    ctx.save_for_backward(own(a.input, a.weight, a.bias), a.mean, a.variance, a.weight, a.bias, a.slope)
    ctx.eps, ctx.activation = a.eps, a.activation
    ctx.residual = None if a.residual is None else a.residual.dtype
    ctx.moves = a.upsample, tuple(a.padding), a.padding_mode


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, variance, weight, bias, slope = ctx.saved_tensors
    norm = Norm(mean, variance, weight, bias, ctx.eps, ctx.activation)
    grad = moved_gradient(grad, input.shape, *ctx.moves)
    grads = normalize_gradients(grad, input, norm, slope)
    grad_residual = None if ctx.residual is None else grad.to(ctx.residual)
    inputs = grads.input.to(input.dtype), *grads[1:5], None, None, grad_residual
    return *inputs, *[None] * 4, grads.slope, None


register(
    SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context
)
normalize = torch.ops.styleforge.normalize.default
