"""Stage 6: fused ops that follow each other become one call.

A *region* is a run of ``styleforge`` ops with nothing between them in the graph's order. It becomes a module
of the rewritten graph that holds the same ops in a graph of its own, so that whoever runs it sees them all
at once. An operation between two ops that reads nothing of theirs, such as the layer that makes a style's
scale and shift, is put in front of them before.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from sf_compile.graph.normalize import barriers

OPS = (
    "conv2d", "normalize", "instance_norm", "instance_statistics", "norm_statistics", "residual_trunk",
)  # fmt: skip
"""The ops, of the ``styleforge`` namespace, that a region may hold: those that earlier stages write."""


class Region(nn.Module):
    """Fused ops run as one: ``inner`` has them one by one, and returns a tuple.

    ``runner`` makes of ``inner`` what is called instead.
    """

    def __init__(self, inner: fx.GraphModule, runner: Callable[[fx.GraphModule], Callable[..., Any]]) -> None:
        super().__init__()
        self.inner = inner
        self.run = runner(inner)

    def forward(self, *inputs: Any) -> Any:
        """The tuple that ``inner`` returns for ``inputs``."""
        return self.run(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        """Without the hooks of a module: there are none, and looking for them takes microseconds."""
        return self.run(*inputs)

    @property
    def sites(self) -> tuple[str, ...]:
        """For each op the names of its sites' anchors, as ``rewrite`` noted them, one after another."""
        return tuple(site for op in filter(is_op, self.inner.graph.nodes) for site in op.meta["sites"])

    def __str__(self) -> str:
        ops = sum(map(is_op, self.inner.graph.nodes))
        return f"{ops} ops in one call, of {', '.join(dict.fromkeys(self.sites))}"


def group(gm: fx.GraphModule, runner: Callable[[fx.GraphModule], Callable[..., Any]]) -> list[Region]:
    """Put every run of two ops or more in ``gm`` into a region; returns the regions, in order.

    An op that stands for several sites is a run by itself.
    ``gm`` computes what it did; ``runner`` is what ``Region`` takes.
    """
    _clear(gm.graph)
    regions: list[Region] = []
    for run in _runs(gm.graph):
        region = Region(_extracted(run), runner)
        name = f"region_{len(regions)}"
        gm.add_submodule(name, region)
        _replace(gm.graph, run, name)
        regions.append(region)
    if regions:
        gm.graph.lint()
        gm.recompile()
    return regions


def is_op(node: fx.Node) -> bool:
    """Whether ``node`` calls one of the ops that a region may hold."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.name() in {f"styleforge::{op}" for op in OPS}


def _clear(graph: fx.Graph) -> None:
    """Move what stands between ops, and does without their results, in front of them.

    Our ops write into nothing, so only an operation that writes, or that switches a mode, may not cross them.
    What is moved keeps its order.
    """
    fixed = frozenset(barriers(graph))
    run: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if is_op(node) or (node.target is getitem and node.args[0] in run):
            run[node] = None
        elif node.users and node not in fixed and not any(input in run for input in node.all_input_nodes):
            if run and node.op != "placeholder":
                next(iter(run)).prepend(node)
        else:
            run.clear()


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """The longest runs of neighbouring ops, and of what is taken out of their results, worth a region."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if is_op(node) or (node.target is getitem and node.args[0] in runs[-1]):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if _stands_for(run) > 1 and all(map(_is_tensor, _results(run)))]


def _stands_for(run: list[fx.Node]) -> int:
    """How many ops ``rewrite`` wrote for what ``run`` does, at least."""
    return sum(len(node.meta["sites"]) for node in run if is_op(node))


def _results(run: list[fx.Node]) -> list[fx.Node]:
    """The nodes that something outside of the run reads."""
    return [node for node in run if any(user not in run for user in node.users)]


def _is_tensor(node: fx.Node) -> bool:
    """Whether an op or an item taken of one is a single tensor, not several."""
    return node.target is getitem or len(node.target._schema.returns) == 1  # type: ignore[union-attr]


def _inputs(run: list[fx.Node]) -> list[fx.Node]:
    """The nodes outside of the run that it reads, each once, in the order of reading."""
    return list(dict.fromkeys(node for reader in run for node in reader.all_input_nodes if node not in run))


def _extracted(run: list[fx.Node]) -> fx.GraphModule:
    """A graph of ``run`` alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in _inputs(run)}
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in _results(run)))
    graph.lint()
    return fx.GraphModule(nn.Module(), graph)


def _replace(graph: fx.Graph, run: list[fx.Node], name: str) -> None:
    """Call the submodule ``name`` in the place of ``run``."""
    with graph.inserting_after(run[-1]):
        call = graph.call_module(name, tuple(_inputs(run)))
    with graph.inserting_after(call):
        for i, node in reversed(list(enumerate(_results(run)))):
            item = graph.call_function(getitem, (call, i))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in run)
    for node in reversed(run):
        graph.erase_node(node)
