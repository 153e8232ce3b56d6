"""Whether the calls of a graph can be captured in CUDA graphs, by what is in it; read-only.

What a call must not do is told at each call (``sf_compile.runtime.cuda_graphs``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sf_compile.graph.normalize import NormalizedGraph, writes, written
from sf_compile.graph.spelling import FRESH
from sf_compile.graph.values import value_of

_WAITS = frozenset({"item", "tolist", "numpy", "nonzero", "masked_select", "unique", "synchronize"})
"""Operations, by name, whose host side waits for the GPU."""

_OWN = FRESH | {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul,
    torch.div, torch.cat, torch.stack, torch.clone,
}  # fmt: skip
"""Operations whose result shares no memory with what they read."""


def refusal(graph: NormalizedGraph) -> str | None:
    """Why calls of ``graph`` cannot be captured; None where they can, as far as the graph tells."""
    devices: dict[Any, str] = {}
    for node in graph.graph.nodes:
        if node.op == "output" or is_number(node):
            continue
        if _reads_number(node):
            continue
        for value in _tensors(value_of(node)):
            devices.setdefault(value.device, node.name)
            if value.device.type != "cuda":
                return f"{node.name} is on the {value.device.type.upper()}"
            if free_unbacked_symbols(value):
                return f"the size of {node.name} depends on numbers in a tensor"
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        if node.op.startswith("call") and name in _WAITS:
            return f"{node.name} waits for the GPU"
        if writes(node) and _may_be_input(written(node)):
            return f"{node.name} may write to an input"
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        return f"its tensors are on several devices: {places}"
    return None if devices else "there is no tensor in it"


def bound(graph: fx.Graph) -> frozenset[int]:
    """The inputs, by number, that stay where they are from call to call: parameters and buffers."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return frozenset(
        number
        for number, node in enumerate(placeholders)
        if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    )


def is_number(node: fx.Node) -> bool:
    """Whether an input is a tensor, on the CPU, of one number that is only taken out of it.

    Dynamo makes one of each number of a module with ``dynamic=True``.
    """
    value = value_of(node)
    if node.op != "placeholder" or not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    return value.dim() == 0 and all(map(_takes_number, node.users))


def _takes_number(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def _reads_number(node: fx.Node) -> bool:
    return _takes_number(node) and is_number(node.all_input_nodes[0])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _may_be_input(node: fx.Node | None) -> bool:
    """Whether ``node`` may be an input of the graph, or share its memory."""
    while node is not None:
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "call_function" and node.target in _OWN and node.kwargs.get("out") is None:
            return False
        inputs = node.all_input_nodes
        node = inputs[0] if inputs else None
    return False
