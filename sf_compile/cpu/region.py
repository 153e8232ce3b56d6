"""A region on a CPU: its ops one after another, called as functions where nobody would miss the dispatcher.

Through the dispatcher and PyTorch's wrapper of a Python-registered gradient a call takes longer than its
checks and allocations together, and as long as the convolution of a picture of some thousand pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sf_compile.cuda.repeated import watched
from sf_compile.ops.library import CPU

_PLAIN = frozenset((Tensor, torch.nn.Parameter, int, float, bool))


class Direct:
    """Computes what ``inner`` does, a graph of ``styleforge`` ops that returns a tuple of tensors.

    Calls that need gradients, that are traced, transformed or watched by a mode of PyTorch, and inputs that
    are no plain tensors of a CPU, go through the dispatcher. May be called by several threads at once.
    """

    def __init__(self, inner: fx.GraphModule) -> None:
        self._ops = getattr(inner, "forward", inner)
        self._functions = _without_dispatcher(inner)
        self._tensors: dict[tuple[type, ...], tuple[int, ...] | None] = {}

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The tuple that ``inner`` returns."""
        types = tuple(map(type, inputs))
        try:
            positions = self._tensors[types]
        except KeyError:
            positions = self._tensors[types] = _positions(types)
        if positions is None or watched():
            return self._ops(*inputs)
        needs_gradient = torch.is_grad_enabled()
        for i in positions:
            x = inputs[i]
            if (needs_gradient and x.requires_grad) or not x.is_cpu or x.is_neg():
                return self._ops(*inputs)
        return self._functions(*inputs)


def _positions(types: tuple[type, ...]) -> tuple[int, ...] | None:
    """Which inputs are tensors; None where one is neither a plain tensor, a parameter nor a number."""
    if not _PLAIN.issuperset(types):
        return None
    return tuple(i for i, one in enumerate(types) if issubclass(one, Tensor))


def _without_dispatcher(inner: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """The ``forward`` of a copy of ``inner`` that calls the ops' CPU implementations."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(inner.graph, {}))
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = CPU[node.target._schema.name.removeprefix("styleforge::")]
    forward: Callable[..., tuple[Tensor, ...]] = fx.GraphModule(torch.nn.Module(), graph).forward
    return forward
