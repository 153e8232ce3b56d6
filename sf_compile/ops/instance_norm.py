"""``styleforge::instance_norm``: instance norm, activation and residual addition in one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import check_activation, check_channels, check_image, check_residual
from sf_compile.ops.instance_statistics import statistics_gradient
from sf_compile.ops.library import empty_image, register
from sf_compile.ops.normalize import Norm, normalize_gradients, own

SCHEMA = (
    "instance_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation='none', "
    "Tensor? residual=None, bool channels_last=False) -> Tensor"
)


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order; ``weight`` and ``bias`` are (C,) or (N, C)."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str = "none"
    residual: Tensor | None = None
    channels_last: bool = False

    def norm(self, mean: Tensor, variance: Tensor) -> Norm:
        """The norm by these statistics, and the activation."""
        return Norm(mean, variance, self.weight, self.bias, self.eps, self.activation)


def _check(a: Arguments) -> None:
    check_image("instance_norm", a.input)
    check_channels("instance_norm", a.input, weight=a.weight, bias=a.bias)
    check_activation("instance_norm", "activation", a.activation)
    check_residual("instance_norm", a.input, a.residual)


def _cpu(*arguments: Any) -> Tensor:
    from sf_compile.cpu import kernels

    a = Arguments(*arguments)
    _check(a)
    if kernels.take(a.input):
        norm = a.norm(*kernels.statistics(a.input))
        return kernels.finish(a.input, norm, a.residual, a.channels_last)[0]
    norm = a.norm(*reference.statistics(a.input))
    return reference.layout(reference.normalize(a.input, *norm, a.residual), a.channels_last)


def _cuda(*arguments: Any) -> Tensor:
    from sf_compile.cuda import instance_norm as cuda

    a = Arguments(*arguments)
    _check(a)
    return cuda.instance_norm(a)


def _fake(*arguments: Any) -> Tensor:
    a = Arguments(*arguments)
    _check(a)
    return empty_image(a.input.shape, a.input, a.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a = Arguments(*inputs)
    ctx.save_for_backward(own(a.input, a.weight, a.bias), a.weight, a.bias)
    ctx.eps, ctx.activation, ctx.has_residual = a.eps, a.activation, a.residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    mean, variance = torch.ops.styleforge.instance_statistics.default(input)
    norm = Norm(mean, variance, weight, bias, ctx.eps, ctx.activation)
    grads = normalize_gradients(grad, input, norm)
    through = statistics_gradient(input, mean, grads.mean, grads.variance)
    grad_input = grads.input if through is None else grads.input + through
    grad_residual = grad if ctx.has_residual else None
    return grad_input.to(input.dtype), grads.weight, grads.bias, None, None, grad_residual, None


register(
    SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context
)
instance_norm = torch.ops.styleforge.instance_norm.default
