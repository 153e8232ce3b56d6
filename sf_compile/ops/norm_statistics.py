"""``styleforge::norm_statistics``: the statistics that a norm uses, out of those of every (image, channel).

Instance norms, group norms and layer norms over (C, H, W), with the biased or the unbiased variance and with
eps inside or outside of the root, differ in their statistics alone. This op works on (N, C) numbers, after
which ``normalize`` and ``conv2d`` apply every such norm in the same way:

    M, V     mean and biased variance of the pixels of each group of channels
    U        = V n / (n - correction), n the pixels of the group
    variance = U, or (sqrt(U) + outer_eps)^2, whose root is the standard deviation plus outer_eps

each for every channel of the group. Where U is 0 all pixels are M, and what divides them does not matter:
with an outer_eps above 0 the root is then no less than |M| / 1024, since x / root - M / root would lose its
digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import check_image, check_norm, require, statistics_dtype
from sf_compile.ops.library import register

SCHEMA = (
    "norm_statistics(Tensor input, Tensor mean, Tensor variance, int? groups=None, float correction=0., "
    "float? outer_eps=None) -> (Tensor mean, Tensor variance)"
)


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order.

    ``mean`` and ``variance`` (N, C) are those of every channel of ``input`` (N, C, H, W), of which only the
    shape is looked at. ``groups`` divides C; None is a group for every channel.
    """

    input: Tensor
    mean: Tensor
    variance: Tensor
    groups: int | None = None
    correction: float = 0.0
    outer_eps: float | None = None

    @property
    def channels(self) -> Any:
        """Channels of a group."""
        return 1 if self.groups is None else self.input.shape[1] // self.groups

    @property
    def bessel(self) -> float:
        """n / (n - correction); infinite where nothing is left of n, as in ``torch.var``."""
        n = self.channels * self.input.shape[2] * self.input.shape[3]
        return n / (n - self.correction) if n > self.correction else float("inf")


def _check(a: Arguments) -> None:
    check_image("norm_statistics", a.input)
    dtype = statistics_dtype(a.input.dtype)
    check_norm("norm_statistics", a.input, a.mean, a.variance, None, None)
    require(
        a.mean.dim() == 2 and a.mean.dtype == a.variance.dtype == dtype,
        lambda: (
            f"styleforge::norm_statistics: mean {tuple(a.mean.shape)} in {a.mean.dtype} and variance in "
            f"{a.variance.dtype} must be ({a.input.shape[0]}, {a.input.shape[1]}) in {dtype}"
        ),
    )
    if a.groups is not None:
        require(
            a.groups >= 1 and a.input.shape[1] % a.groups == 0,
            lambda: f"styleforge::norm_statistics: {a.groups} groups of {a.input.shape[1]} channels",
        )


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    from sf_compile.cpu import kernels

    a = Arguments(*arguments)
    _check(a)
    compute = kernels.norm_statistics if kernels.take(a.input) else reference.norm_statistics
    return compute(a.mean, a.variance, a.groups, a.bessel, a.outer_eps)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from sf_compile.cuda import norm_statistics as cuda

    a = Arguments(*arguments)
    _check(a)
    return cuda.norm_statistics(a)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    _check(a)
    return a.mean.new_empty(a.mean.shape), a.variance.new_empty(a.variance.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a = Arguments(*inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.mean, a.variance)
    ctx.groups, ctx.channels, ctx.outer_eps = a.groups, a.channels, a.outer_eps
    ctx.pixels, ctx.correction = a.channels * a.input.shape[2] * a.input.shape[3], a.correction


def _backward(ctx: Any, grad_mean: Tensor | None, grad_variance: Tensor | None) -> tuple[Tensor | None, ...]:
    """With k channels of a group: dM/dm = 1 / k, dV/dv = 1 / k and dV/dm = 2 (m - M) / k."""
    mean, variance = ctx.saved_tensors

    def of_groups(vector: Tensor, reduce: Any) -> Tensor:
        if ctx.groups is None:
            return vector
        grouped = vector.unflatten(1, (ctx.groups, -1))
        return reduce(grouped, 2, keepdim=True).expand_as(grouped).flatten(1)

    to_mean = None if grad_mean is None else of_groups(grad_mean, torch.sum) / ctx.channels
    to_variance = None
    if grad_variance is not None:
        remaining = ctx.pixels - ctx.correction
        grad = of_groups(grad_variance, torch.sum) * ctx.pixels / remaining / ctx.channels
        centred = mean - of_groups(mean, torch.mean)
        if ctx.outer_eps is not None:
            biased = of_groups(variance + centred.square(), torch.mean)
            deviation = (biased * ctx.pixels / remaining).sqrt()
            # Where the deviation is 0 every pixel is the mean, and nothing goes back through the variance.
            grad = torch.where(deviation == 0, 0, grad * (1 + ctx.outer_eps / deviation))
        to_variance = grad
        through = grad * 2 * centred
        to_mean = through if to_mean is None else to_mean + through
    return None, to_mean, to_variance, None, None, None


register(SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context)
norm_statistics = torch.ops.styleforge.norm_statistics.default
