"""How far a result may be from the exact one: 1.25 times eager's own error, or what rounding alone does.

A network can magnify the rounding of one operation without bound (the norm of a plane that is constant but
for rounding), and a gradient jumps where an activation bends. ``noise`` measures that: the network runs in
float64 with every operation's result perturbed by one rounding of the dtype in question, at random. A sum or
mean is off by a rounding of the sum of its terms' sizes as well: that of a plane that a norm has centred is
nothing else, nor is the gradient of a bias that a norm removes. And a plane that is exactly constant stays so
in any arithmetic, where norms magnify a gradient as they do nowhere else: the backward pass is perturbed by
itself too.
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
    """Every result in float64 is off by up to one unit of rounding, as if it had been stored.

    Or, unless ``forward``, those of the backward pass alone.
    """

    def __init__(self, unit: float, forward: bool) -> None:
        super().__init__()
        self.unit, self.forward = unit, forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.forward and torch._C._current_graph_task_id() < 0:
            return out
        name = func._schema.name
        writes = any(r.alias_info is not None for r in func._schema.returns)
        exact = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if name in SUMS and exact and not writes:
            terms = SUMS[name]
            sizes = func(*(x.abs() for x in args[:terms]), *args[terms:], **(kwargs or {}))
            out = tree_map(lambda x, size: None if x is None else x + self.off(size), out, sizes)
        return out if writes else tree_map(self.perturbed, out)

    def off(self, size: Tensor) -> Tensor:
        """How far off a sum of terms is whose sizes add up to ``size``.

        They are added in 32 bits, or in 64 of a network in float64.
        """
        return min(self.unit, torch.finfo(torch.float32).eps) * size * (2 * torch.rand_like(size) - 1)

    def perturbed(self, x: Any) -> Any:
        """``x`` itself, with other last digits."""
        if isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel():
            x.mul_(1 + self.unit * (2 * torch.rand(x.shape, dtype=x.dtype, device=x.device) - 1))
        return x


def noise(
    run: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], dtype: torch.dtype, runs: int = RUNS
) -> list[float]:
    """How far rounding to ``dtype`` moves each result of ``run``, which computes ``exact`` in float64.

    That is the farthest of ``runs`` times, and of as many in which the backward pass alone is perturbed.
    """
    worst = [0.0] * len(exact)
    for number in range(2 * runs):
        with _Rounded(torch.finfo(dtype).eps, forward=number < runs):
            outs = run()
        worst = [max(w, distance(o, e)) for w, o, e in zip(worst, outs, exact, strict=True)]
    return worst
