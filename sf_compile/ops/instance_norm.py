"""``styleforge::instance_norm``: instance norm, activation and residual addition in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import ACTIVATIONS, check_channels, check_choice, check_image, check_residual
from sf_compile.ops.instance_statistics import statistics_gradient
from sf_compile.ops.library import register
from sf_compile.ops.normalize import normalize_gradients

SCHEMA = (
    "instance_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation='none', "
    "Tensor? residual=None, bool channels_last=False) -> Tensor"
)


def _check(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> None:
    check_image("instance_norm", input)
    check_channels("instance_norm", input, weight=weight, bias=bias)
    check_choice("instance_norm", "activation", activation, ACTIVATIONS)
    check_residual("instance_norm", input, residual)


def _cpu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    _check(input, weight, bias, activation, residual)
    mean, variance = reference.statistics(input)
    out = reference.normalize(input, mean, variance, weight, bias, eps, activation, residual)
    return reference.layout(out, channels_last)


def _cuda(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    from sf_compile.cuda import instance_norm as cuda

    _check(input, weight, bias, activation, residual)
    return cuda.instance_norm(input, weight, bias, eps, activation, residual, channels_last)


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor:
    _check(input, weight, bias, activation, residual)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, eps, activation, residual, _ = inputs
    ctx.save_for_backward(input, weight, bias)
    ctx.eps, ctx.activation, ctx.has_residual = eps, activation, residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    mean, variance = torch.ops.styleforge.instance_statistics.default(input)
    grads = normalize_gradients(grad, input, mean, variance, weight, bias, ctx.eps, ctx.activation)
    through = statistics_gradient(input, mean, grads.mean, grads.variance)
    grad_input = grads.input if through is None else grads.input + through
    grad_residual = grad if ctx.has_residual else None
    return grad_input.to(input.dtype), grads.weight, grads.bias, None, None, grad_residual, None


register(
    SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context
)
instance_norm = torch.ops.styleforge.instance_norm.default
