"""Stage 1: a copy of Dynamo's graph in the canonical spelling.

The copy computes exactly what the original does. In-place operations become out-of-place ones
where that cannot be seen: the tensor written to was made inside the graph by an operation that
returns a tensor of its own, and nothing that ran before could be a view of it. Later readers of
the overwritten tensor then read the new one. Every other in-place operation stays as it is, and
``barriers`` lists it: no fused operation may reach across a barrier. A norm that a model spells out becomes
one node (graph/handwritten_norm.py).
"""

from __future__ import annotations

import inspect
import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from sf_compile.graph import handwritten_norm
from sf_compile.graph.signatures import canonical
from sf_compile.graph.spelling import ADD, FRESH, WITH_NUMBER, Spelling, is_identity
from sf_compile.graph.values import AUTOCAST, Miss, same_shape, value_of

log = logging.getLogger(__name__)

_INPLACE_NAMES = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
    "ilshift", "irshift", "iconcat",
)  # fmt: skip
_INPLACE_OPERATORS = frozenset(getattr(operator, name) for name in _INPLACE_NAMES) | {
    operator.setitem,
    operator.delitem,
}
_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
# Between a tensor and its reader, these change what the reader computes or what autograd records.
_MODE_SWITCHES = frozenset(
    {
        _ENTER_AUTOCAST,
        torch._C._set_grad_enabled,
        torch.autograd.grad_mode._enter_inference_mode,
        torch.autograd.grad_mode._exit_inference_mode,
    }
)


@dataclass(frozen=True)
class NormalizedGraph:
    """A canonical copy of a graph module, with what the matcher must respect.

    Attributes:
        root: The module that was copied, with the tensors and modules that the copy names too.
        graph: The copy.
        canonical: The nodes in canonical form; any other node with such a target (``torch.add`` of
            a number, say) means something else.
        barriers: Nodes that write into a tensor or switch a mode, in graph order.
        misses: What looks like a hand-written norm and is left as it is, with the reason.
    """

    root: fx.GraphModule
    graph: fx.Graph
    canonical: frozenset[fx.Node]
    barriers: tuple[fx.Node, ...]
    misses: tuple[Miss, ...] = ()

    def as_module(self) -> fx.GraphModule:
        """A module that runs the graph as it is now; generating its code takes longer than the matching."""
        return fx.GraphModule(self.root, self.graph)


def normalize(gm: fx.GraphModule, example_inputs: list[Any] | None = None) -> NormalizedGraph:
    """Copy ``gm`` into the canonical spelling; ``gm`` itself is not changed.

    Args:
        gm: A graph of call_function and call_method nodes, as Dynamo makes them.
        example_inputs: Real or fake inputs, needed only where nodes carry no ``example_value``.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output: Any = graph.graph_copy(gm.graph, copies, return_output_node=True)
    if output is not None:
        value, original_output = output
        graph.output(value).meta.update(original_output.meta)
    _record_values(gm, graph, example_inputs)
    _mark_autocast(graph)
    misses = handwritten_norm.gather(graph, barriers(graph))
    respelled: set[fx.Node] = set()
    for node in list(graph.nodes):
        if is_identity(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
            continue
        spelling = canonical(node)
        if spelling is None or not _is_tensor_operation(node, spelling):
            continue
        if spelling.inplace and not _make_functional(node, spelling):
            continue
        _respell(node, spelling)
        respelled.add(node)
    graph.lint()
    return NormalizedGraph(
        gm, graph, frozenset(respelled), barriers(graph), tuple(misses)
    )


def _record_values(root: fx.GraphModule, graph: fx.Graph, example_inputs: list[Any] | None) -> None:
    """Fill in ``example_value`` for graphs that were not made by Dynamo.

    Dynamo's own graphs are left alone: they have nodes without a value (mode switches), and running
    one again with symbolic sizes would add guards, or fail on an ``.item()``.
    """
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    if example_inputs is None or any("example_value" in node.meta for node in calls):
        return
    FakeTensorProp(fx.GraphModule(root, graph)).propagate(*example_inputs)
    for node in graph.nodes:
        if "example_value" not in node.meta and "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]


def _is_tensor_operation(node: fx.Node, spelling: Spelling) -> bool:
    """``operator.add`` also adds numbers, and broadcasts or promotes: only equal tensors are an ``add``."""
    out, first = value_of(node), value_of(spelling.args[0])
    if not isinstance(out, torch.Tensor) or not isinstance(first, torch.Tensor):
        return False
    if spelling.target in WITH_NUMBER:
        return first.dtype == out.dtype
    if spelling.target is not ADD:
        return True
    second = value_of(spelling.args[1])
    return (
        isinstance(second, torch.Tensor)
        and first.dtype == second.dtype == out.dtype
        and first.device == second.device
        and same_shape(first, second)
    )


def _make_functional(node: fx.Node, spelling: Spelling) -> bool:
    """Redirect later readers of the tensor that ``node`` overwrites to its result, if nobody can tell."""
    base = spelling.args[0]
    if base.op != "call_function" or base.target not in FRESH or base.kwargs.get("out") is not None:
        log.debug("in-place %s kept: %s may be seen outside the graph or through a view", node, base)
        return False
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    earlier = [user for user in base.users if order[user] < order[node]]
    if any(user.target not in FRESH for user in earlier):
        log.debug("in-place %s kept: an earlier reader of %s may be a view of it", node, base)
        return False
    if any(n.target in _MODE_SWITCHES and order[base] < i < order[node] for n, i in order.items()):
        log.debug("in-place %s kept: %s was made in another mode", node, base)
        return False
    base.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
    return True


def _respell(node: fx.Node, spelling: Spelling) -> None:
    if (node.op, node.target, node.args) == ("call_function", spelling.target, spelling.args):
        return
    node.op, node.target = "call_function", spelling.target
    node.args, node.kwargs = spelling.args, {}


def barriers(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes that write into a tensor or switch a mode, in graph order."""
    return tuple(node for node in graph.nodes if writes(node) or node.target in _MODE_SWITCHES)


def writes(node: fx.Node) -> bool:
    """Whether ``node`` may write into one of its arguments, by PyTorch's naming rules and schemas."""
    if node.op == "call_method":
        name = str(node.target)
        dunder = name.startswith("__") and name.endswith("__")
        if dunder:
            return name in ("__setitem__", "__delitem__") or name[2:-2] in _INPLACE_NAMES
        return name.endswith("_")
    if node.op != "call_function":
        return node.op == "call_module"
    target: Any = node.target
    if target in _INPLACE_OPERATORS or node.kwargs.get("out") is not None:
        return True
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        # An overload with an out= argument is another matter: that one is in the node's kwargs.
        schemas = (getattr(target, overload)._schema for overload in target.overloads())
        arguments = (argument for schema in schemas for argument in schema.arguments)
        return any(a.alias_info is not None and a.alias_info.is_write and not a.is_out for a in arguments)
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name == "triton_kernel_wrapper_mutation" or _inplace_argument(node)


def _inplace_argument(node: fx.Node) -> bool:
    """``F.leaky_relu(x, 0.2, True)``: the value bound to a parameter called ``inplace``."""
    if not inspect.isfunction(node.target):
        return bool(node.kwargs.get("inplace", False))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False
    return bool(bound.arguments.get("inplace", False))


def written(node: fx.Node) -> fx.Node | None:
    """What a node that writes writes to: what its ``out`` is, or its first argument."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    inputs = node.all_input_nodes
    return inputs[0] if inputs else None


def _mark_autocast(graph: fx.Graph) -> None:
    """Tell every node inside an autocast region so."""
    regions: list[dict[str, bool]] = []
    for node in graph.nodes:
        if node.target is _ENTER_AUTOCAST:
            device, _, enabled, *_ = node.args
            regions.append({**(regions[-1] if regions else {}), str(device): bool(enabled)})
        elif node.target is _EXIT_AUTOCAST:
            regions.pop()
        elif regions:
            node.meta[AUTOCAST] = regions[-1]
