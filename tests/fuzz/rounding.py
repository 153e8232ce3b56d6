"""How far a result may be from the exact one: 1.25 times eager's own error, or what rounding alone does.

A network can magnify the rounding of one operation without bound (the norm of a plane that is constant but
for rounding), and a gradient jumps where an activation bends. ``noise`` measures that: the network runs in
float64 with every operation's result perturbed by one rounding of the dtype in question, at random. A sum or
mean is off by a rounding of the sum of its terms' sizes as well: that of a plane that a norm has centred is
nothing else, nor is the gradient of a bias that a norm removes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PROMISED = 1.25
RUNS, MORE_RUNS = 4, 64
"""More where few do not explain an error: whether a pixel crosses an activation's bend is up to chance."""
SUMS = {"aten::mean": 1, "aten::sum": 1, "aten::_adaptive_avg_pool2d": 1, "aten::convolution_backward": 3}
"""By what adds up numbers, of how many of its first arguments those are products."""
NORM_GRADIENT = "aten::native_batch_norm_backward"
SLACK = {torch.float64: 32, torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
"""How many times the largest perturbation of ``RUNS`` a result may be off; 16-bit sums have 32-bit terms."""


def distance(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact|| in float64 over what is finite in ``exact``; infinite for a stray NaN."""
    out, exact = out.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    if not bool(out[finite].isfinite().all()):
        return float("inf")
    return float((out - exact)[finite].norm() / exact[finite].norm().clamp_min(1e-30))


class _Rounded(TorchDispatchMode):
    """Every result in float64 is off by up to one unit of rounding, as if it had been stored."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        writes = any(r.alias_info is not None for r in func._schema.returns)
        exact = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if name in SUMS and exact and not writes:
            terms = SUMS[name]
            sizes = func(*(x.abs() for x in args[:terms]), *args[terms:], **(kwargs or {}))
            out = tree_map(lambda x, size: None if x is None else x + self.off(size), out, sizes)
        elif name == NORM_GRADIENT and exact:
            out = self.norm_gradient(out, *args)
        return out if writes else tree_map(self.perturbed, out)

    def off(self, size: Tensor) -> Tensor:
        """How far off a sum of terms is whose sizes add up to ``size``.

        They are added in 32 bits, or in 64 of a network in float64.
        """
        return min(self.unit, torch.finfo(torch.float32).eps) * size * (2 * torch.rand_like(size) - 1)

    def norm_gradient(self, out: Any, grad: Tensor, x: Tensor, weight: Any, *settings: Any) -> Any:
        """``out``, the gradients of a norm by a picture's own statistics, with its sums off.

        That by x is weight / std * (g - mean(g) - z mean(g z)) of the gradient g by the result, and of z, the
        picture normalised: where a mean is off, every pixel of the plane is. Those by weight and bias are the
        sums of g z and of g.
        """
        by_x, by_weight, by_bias = out
        mean, invstd = (v.view(-1, 1, 1) for v in settings[2:4])
        z, axes = (x - mean) * invstd, (0, 2, 3)
        if by_x is not None:
            scale = invstd if weight is None else invstd * weight.view(-1, 1, 1)
            first, second = (self.off(v.abs().mean(axes, keepdim=True)) for v in (grad, grad * z))
            by_x = by_x - scale * (first + z * second)
        if by_weight is not None:
            by_weight = by_weight + self.off((grad * z).abs().sum(axes))
        if by_bias is not None:
            by_bias = by_bias + self.off(grad.abs().sum(axes))
        return by_x, by_weight, by_bias

    def perturbed(self, x: Any) -> Any:
        """``x`` itself, with other last digits."""
        if isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel():
            x.mul_(1 + self.unit * (2 * torch.rand(x.shape, dtype=x.dtype, device=x.device) - 1))
        return x


def noise(
    run: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], dtype: torch.dtype, runs: int = RUNS
) -> list[float]:
    """How far rounding to ``dtype`` moves each result of ``run``, which computes ``exact`` in float64.

    That is the farthest of ``runs`` times.
    """
    worst = [0.0] * len(exact)
    for _ in range(runs):
        with _Rounded(torch.finfo(dtype).eps):
            outs = run()
        worst = [max(w, distance(o, e)) for w, o, e in zip(worst, outs, exact, strict=True)]
    return worst
