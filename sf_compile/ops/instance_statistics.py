"""``styleforge::instance_statistics``: mean and biased variance of every (image, channel)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import check_image, statistics_dtype
from sf_compile.ops.library import register

SCHEMA = "instance_statistics(Tensor input) -> (Tensor mean, Tensor variance)"


def statistics_gradient(
    input: Tensor, mean: Tensor, grad_mean: Tensor | None, grad_variance: Tensor | None
) -> Tensor | None:
    """d(loss)/d(input), in the statistics' dtype, from the gradients of its mean and variance.

    dmean/dx = 1 / (H W) and dvariance/dx = 2 (x - mean) / (H W).
    """
    pixels = input.shape[2] * input.shape[3]
    grad = None
    if grad_mean is not None:
        grad = reference.per_channel(grad_mean / pixels).expand(input.shape)
    if grad_variance is not None:
        centred = input.to(mean.dtype) - reference.per_channel(mean)
        through_variance = centred * reference.per_channel(grad_variance * 2 / pixels)
        grad = through_variance if grad is None else grad + through_variance
    return grad


def _cpu(input: Tensor) -> tuple[Tensor, Tensor]:
    from sf_compile.cpu import kernels

    check_image("instance_statistics", input)
    return kernels.statistics(input) if kernels.take(input) else reference.statistics(input)


def _cuda(input: Tensor) -> tuple[Tensor, Tensor]:
    from sf_compile.cuda import statistics

    check_image("instance_statistics", input)
    return statistics.statistics(input)


def _fake(input: Tensor) -> tuple[Tensor, Tensor]:
    check_image("instance_statistics", input)
    shape, dtype = input.shape[:2], statistics_dtype(input.dtype)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx: Any, grad_mean: Tensor | None, grad_variance: Tensor | None) -> Tensor | None:
    input, mean = ctx.saved_tensors
    grad = statistics_gradient(input, mean, grad_mean, grad_variance)
    return None if grad is None else grad.to(input.dtype)


register(
    SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context
)
instance_statistics = torch.ops.styleforge.instance_statistics.default
