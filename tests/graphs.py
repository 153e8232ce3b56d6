"""Graphs for the tests of the pipeline: built by hand, or captured live by Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

import sf_compile.ops  # noqa: F401  registers the ops that rewritten graphs call
from sf_compile.backend import Analysis, analyse, flat_graph, grouped
from sf_compile.graph.regions import Region
from sf_compile.graph.rewrite import rewrite
from sf_compile.options import Options

SHAPE = (2, 4, 12, 10)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def hand(build: Callable[..., Any]) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph of ``build(graph, x, r, w, v)``, and inputs for it.

    x and r are pictures, w the weight of a 3 x 3 convolution, v one number a channel.
    """
    graph = fx.Graph()
    graph.output(build(graph, *(graph.placeholder(name) for name in "xrwv")))
    inputs = [torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(4, 4, 3, 3), torch.rand(4)]
    return fx.GraphModule(nn.Module(), graph), inputs


def named(graph: fx.Graph, name: str) -> fx.Node:
    """The node called ``name``."""
    return next(node for node in graph.nodes if node.name == name)


def targets(graph: fx.Graph) -> list[Any]:
    """What the graph calls, in order."""
    return [node.target for node in graph.nodes if node.op.startswith("call")]


def rewritten_graph(analysis: Analysis, options: Options) -> tuple[fx.GraphModule, list[Region]]:
    """The graph that replaces Dynamo's, made of the copy in ``analysis``, and its regions."""
    return grouped(flat_graph(analysis), options)


def capture(
    model: Any, *inputs: Any, dynamic: bool | None = None, options: Options | None = None
) -> Analysis:
    """The analysis of the one graph that Dynamo makes of ``model(*inputs)``, in the current grad mode."""
    analyses: list[Analysis] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        analyses.append(analyse(gm, example_inputs, options or Options()))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=collect, dynamic=dynamic, fullgraph=True)(*inputs)
    (analysis,) = analyses
    return analysis


class Rewritten(NamedTuple):
    """One graph that Dynamo handed over, what was decided, and the module that replaces it."""

    gm: fx.GraphModule
    inputs: list[Any]
    analysis: Analysis
    module: fx.GraphModule


def fuse(
    model: Any, dynamic: bool | None = None, options: Options | None = None
) -> tuple[Any, list[Rewritten]]:
    """``model`` compiled with the pipeline, and the list that its graphs are added to."""
    made: list[Rewritten] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        analysis = analyse(gm, example_inputs, options or Options())
        module = rewrite(analysis.normalized, analysis.plan)
        made.append(Rewritten(gm, example_inputs, analysis, module))
        return module.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True), made


def found(analysis: Analysis) -> list[str]:
    return [site.pattern for site in analysis.matches.sites]
