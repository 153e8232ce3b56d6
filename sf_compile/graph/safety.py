"""Why a well-formed site would not do what eager does, for reasons that lie around it in the graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from sf_compile.graph.normalize import NormalizedGraph, writes, written
from sf_compile.graph.sites import Match
from sf_compile.graph.values import value_of


def transform(graph: fx.Graph) -> str | None:
    """The first node that enters or leaves a torch.func transform (grad, vmap, jvp, ...)."""
    return next((node.name for node in graph.nodes if _is_functorch(node)), None)


def _is_functorch(node: fx.Node) -> bool:
    return "functorch" in (getattr(node.target, "__module__", None) or "")


def overwritten(site: Match, graph: NormalizedGraph, order: Mapping[fx.Node, int]) -> str | None:
    """Why ``site`` could not be differentiated where eager can; None where it can be.

    A fused op keeps its operands for the backward pass. What eager only adds, or copies by padding or
    enlarging it, it does not keep, and what writes to it later then does no harm. ``order`` has the place of
    every node of the graph.
    """
    switches = any(node.target is torch._C._set_grad_enabled for node in graph.barriers)
    if not (torch.is_grad_enabled() or switches):
        return None
    operands = [
        site.input,
        None if site.conv is None else site.conv.bias,
        None if site.norm is None else site.norm.bias,
        None if site.add is None else site.add.residual,
    ]
    kept = {_memory(node): node.name for node in operands if node is not None}
    for node in graph.barriers:
        if writes(node) and order[node] > order[site.anchor]:
            memory = _memory(written(node))
            if memory is not None and memory in kept:
                return f"{node.name} writes to {kept[memory]}, which the backward pass would read"
    return None


def _memory(node: fx.Node | None) -> int | None:
    """What tells the memory of ``node``, which its views share, from any other; None if that is not known."""
    while node is not None and value_of(node) is None:  # our own view of a norm's scale or shift
        node = next(iter(node.all_input_nodes), None)
    value = value_of(node)
    known = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if known else None
