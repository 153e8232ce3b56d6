"""After stage 4, with ``precision="int8"``: which convolutions of a graph may multiply 8-bit integers.

Which of them do, and by what scales, a call settles (``sf_compile.runtime.calibration``). Here only what is
in the graph is looked at, and a graph with given scales made.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph.normalize import value_of

FEWEST_CHANNELS = 128
"""Of a convolution's input: with fewer, the pass that rounds it costs more than its products save."""

ENOUGH_PRODUCTS = 512
"""Of each number of the input, one for each output that it goes into: integers save of their time, and
rounding costs as much whatever their count."""

_SCALE = "input_scale"


def candidates(gm: fx.GraphModule) -> dict[str, str | None]:
    """The convolutions of ``gm`` by the name of their site: why each multiplies no integers, None if it may.

    ``gm`` is a graph that ``rewrite`` made.
    """
    return {_site(node): _refusal(node) for node in filter(_is_convolution, gm.graph.nodes)}


def with_scales(gm: fx.GraphModule, scales: Mapping[str, float]) -> fx.GraphModule:
    """A copy of ``gm`` in which the convolutions of these sites have that ``input_scale``, others none."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in filter(_is_convolution, graph.nodes):
        names = _names(node)
        values = dict(zip(names, node.args, strict=True)) | {_SCALE: scales.get(_site(node))}
        node.args = tuple(values[name] for name in names)
    graph.lint()
    return fx.GraphModule(gm, graph)


def _is_convolution(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.name() == "styleforge::conv2d"


def _site(node: fx.Node) -> str:
    (site,) = node.meta["sites"]
    return str(site)


def _names(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]


def _refusal(node: fx.Node) -> str | None:
    a: dict[str, Any] = dict(zip(_names(node), node.args, strict=True))
    if a["transposed"]:
        return "a transposed convolution"
    if not _is_statistic(a["mean"]) or not a["statistics"]:
        return "it does not stand between two instance norms"
    if a["bias"] is not None or a["output_activation"] != "none" or a["out_dtype"] is not None:
        return "a bias, an activation or another dtype of its output"
    weight = value_of(a["weight"])
    if weight is None:
        return "a weight of unknown shape"
    out, channels, height, width = weight.shape
    if a["upsample"] != 1:
        square = statically_known_true(height == 3) and statically_known_true(width == 3)
        if not (a["upsample"] == 2 and square and a["padding"] == [1] * 4 and a["stride"] == [1, 1]):
            return "an upsampling other than by 2 before a 3x3 convolution padded by 1"
    if not (statically_known_true(channels % 16 == 0) and statically_known_true(out % 8 == 0)):
        return f"{channels} -> {out} channels are no multiples of 16 and 8"
    if not statically_known_true(channels >= FEWEST_CHANNELS):
        return f"{channels} channels are few: rounding the input takes longer than is saved by its products"
    # Of the sub-pixel form four parities of four taps each.
    products = (16 if a["upsample"] == 2 else height * width) * out // (a["stride"][0] * a["stride"][1])
    if not statically_known_true(products >= ENOUGH_PRODUCTS):
        return f"{products} products of a number of its input gain less than rounding it costs"
    return None


def _is_statistic(mean: Any) -> bool:
    """Whether ``mean`` is what a convolution of ours, or statistics of a norm's own, say it is."""
    if not isinstance(mean, fx.Node) or mean.target is not getitem or not isinstance(mean.args[0], fx.Node):
        return False
    return isinstance(mean.args[0].target, torch._ops.OpOverload)
