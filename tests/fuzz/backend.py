"""The backend as torch.compile's, checking what it does to each graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from fuzz.programs import Program
from sf_compile.backend import analyse, compile_graph
from sf_compile.graph.normalize import value_of
from sf_compile.ops.residual_trunk import Arguments, residual_trunk
from sf_compile.options import Options

WEIGHTS = Arguments._fields.index("weights")


@dataclass
class Compiled:
    """One graph that Dynamo handed over, what the backend made of it, and the ops that then ran.

    ``strides`` are those that Dynamo recorded for its results, of pictures of the first call's size.
    """

    decisions: list[tuple[str, str]]
    expected: Counter[str] = field(default_factory=Counter)
    executed: list[Counter[str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    strides: set[tuple[int, ...]] = field(default_factory=set)


def count(ops: Counter[str], op: Any, args: Any) -> None:
    """Add a call of one of our ops; of a trunk its convolutions.

    Wherever something watches a trunk it is made of those, but the inference mode shows it whole.
    """
    if op is residual_trunk:
        ops["styleforge::conv2d"] += len(args[WEIGHTS])
    else:
        ops[op.name()] += 1


class _Executed(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "styleforge":
            count(self.ops, func, args)
        return func(*args, **(kwargs or {}))


class Backend:
    """The backend itself, checking what it does to each graph."""

    def __init__(self, program: Program) -> None:
        self.options = Options(layout=program.inner_layout)
        self.fallback = program.fallback
        self.graphs: list[Compiled] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        before = _printed(gm)
        analysis = analyse(gm, example_inputs, self.options)
        plan = str(analysis.plan)
        graph = Compiled([(d.site.anchor.name, d.site.pattern) for d in analysis.plan.decisions])
        self.graphs.append(graph)
        recorded = (value_of(node) for node in gm.graph.output_node().all_input_nodes)
        for value in recorded:
            if isinstance(value, Tensor):
                graph.strides.add(tuple(map(_hint, value.stride())))
        first, second = (compile_graph(gm, example_inputs, self.options) for _ in range(2))
        if not graph.decisions:
            if first != gm.forward or getattr(first, "__self__", None) is not gm:
                graph.faults.append("a graph with nothing to fuse was not returned as it came")
        else:
            rewritten = first.__self__  # type: ignore[attr-defined]
            if _code(rewritten) != _code(second.__self__):  # type: ignore[attr-defined]
                graph.faults.append("compiled twice, two different graphs")
            ops = list(_ops(rewritten))
            for op in ops:
                count(graph.expected, op.target, op.args)
            anchors = [name for name, _ in graph.decisions]
            run = dict.fromkeys(site for op in ops for site in op.meta["sites"])
            if not set(run) <= set(anchors) or set(anchors) - set(run) - _folded(analysis):
                graph.faults.append(f"planned {anchors}, rewritten {list(run)}:\n{plan}")
        if _printed(gm) != before:
            graph.faults.append("Dynamo's own graph was changed")
        if self.fallback != "eager":
            fallback = torch._dynamo.lookup_backend(self.fallback)
            return compile_graph(gm, example_inputs, Options(fallback=fallback, layout=self.options.layout))

        def counted(*args: Any) -> Any:
            # A mode changes how a region runs on a GPU: it watches the first call, not the later ones.
            if graph.executed:
                return first(*args)
            with _Executed() as seen:
                out = first(*args)
            graph.executed.append(seen.ops)
            return out

        return counted


def _hint(step: Any) -> int:
    """A stride; of a symbolic one what it was when the graph was captured, without a guard."""
    return int(step.node.hint) if isinstance(step, torch.SymInt) else int(step)


def _printed(gm: fx.GraphModule) -> str:
    return "\n".join(
        f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}" for node in gm.graph.nodes
    )


def _code(gm: fx.GraphModule) -> str:
    inner = [module.inner.code for module in gm.modules() if hasattr(module, "inner")]
    return "\n".join([gm.code, *inner])


def _ops(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Calls of our ops, inside of regions too."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and hasattr(gm.get_submodule(node.target), "inner"):
            yield from _ops(gm.get_submodule(node.target).inner)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "styleforge":
            yield node


def _folded(analysis: Any) -> set[str]:
    """Anchors of norms with running statistics whose finish another site's op applies: no op of their own."""
    return {
        d.site.anchor.name
        for d in analysis.plan.decisions
        if d.finish == "deferred" and d.site.conv is None and d.site.norm.mean is not None
    }  # fmt: skip
