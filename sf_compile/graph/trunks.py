"""Stage 5: the residual blocks in the middle of a style network become one op.

A *trunk* is a chain of residual blocks, each two 3x3 convolutions with their instance norms, whose tensors
nothing else reads:

    conv2d (keeps z) -> conv2d -> conv2d (adds z, keeps its own) -> conv2d -> ...

``styleforge::residual_trunk`` computes what the calls do. It decides for each call how; here only what is in
the graph is looked at.
"""

from __future__ import annotations

import logging
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph.normalize import value_of

log = logging.getLogger(__name__)

FEWEST_LAYERS = 4
"""A single block is left as it is."""

_OF_ALL = {
    "bias": None, "upsample": 1, "padding": [1, 1, 1, 1], "padding_mode": "reflect", "stride": [1, 1],
    "output_activation": "none", "statistics": True, "channels_last": True, "transposed": False,
    "out_dtype": None,
}  # fmt: skip
_RESULTS = ("input", "mean", "variance")  # what the reader of a convolution takes its first results for
_KEPT = 3  # the number of the result that is the finished input


class _Layer(NamedTuple):
    """One convolution of a trunk, and what is taken out of its result by number."""

    node: fx.Node
    items: dict[int, fx.Node]

    @property
    def arguments(self) -> dict[str, Any]:
        """Its arguments by name, as they are now: a trunk before it may have been replaced."""
        return _arguments(self.node)

    @property
    def kept_for(self) -> set[fx.Node]:
        """The readers of its finished input."""
        return set(self.items[_KEPT].users) if _KEPT in self.items else set()

    def does(self, activation: str, residual: fx.Node | None, keeps: bool) -> bool:
        """Whether it finishes its input so."""
        found = self.arguments
        return (found["activation"], found["keep_input"]) == (activation, keeps) and (
            found["residual"] is residual
        )

    def follows(self, before: _Layer) -> bool:
        """Whether it alone reads the raw output of ``before`` and its statistics, through an affine norm."""
        items = [before.items.get(i) for i in range(len(_RESULTS))]
        affine = all(isinstance(self.arguments[name], fx.Node) for name in ("norm_weight", "norm_bias"))
        return affine and all(
            item is not None and self.arguments[name] is item and set(item.users) == {self.node}
            for name, item in zip(_RESULTS, items, strict=True)
        )


def join(gm: fx.GraphModule) -> list[fx.Node]:
    """Put one call of ``residual_trunk`` in the place of every trunk of ``gm``; returns the calls, in order.

    ``gm`` is a graph that ``rewrite`` made, and computes what it did. A call has in ``meta["sites"]`` the
    sites of all its convolutions.
    """
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    layers = {node: layer for node in order if (layer := _layer(node)) is not None}
    calls: list[fx.Node] = []
    for layer in layers.values():
        trunk = _trunk(layer, layers, order)
        if len(trunk) >= FEWEST_LAYERS:
            calls.append(_replace(gm.graph, trunk))
            log.debug("trunk: one op for %d sites, %s", len(trunk), ", ".join(calls[-1].meta["sites"]))
    if calls:
        gm.graph.lint()
        gm.recompile()
    return calls


def _layer(node: fx.Node) -> _Layer | None:
    """``node`` as a convolution that a trunk may have; None if it is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.name() != "styleforge::conv2d":
        return None
    arguments = _arguments(node)
    alike = all(arguments[name] == value for name, value in _OF_ALL.items())
    if not alike or not _is_square(arguments["weight"]):
        return None
    items: dict[Any, fx.Node] = {user.args[1]: user for user in node.users if user.target is getitem}
    return _Layer(node, items) if len(items) == len(node.users) else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op's call, by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=True))


def _is_square(weight: Any) -> bool:
    """Whether a weight surely is 3x3 between as many channels."""
    value = value_of(weight)
    if value is None:
        return False
    out, channels, height, width = value.shape
    return all(statically_known_true(a == b) for a, b in ((out, channels), (height, 3), (width, 3)))


def _trunk(first: _Layer, layers: dict[fx.Node, _Layer], order: dict[fx.Node, int]) -> list[_Layer]:
    """The convolutions of the longest chain of blocks that begins with ``first``; empty if none does."""
    activation = first.arguments["activation"]
    if activation not in ("none", "relu") or not first.does(activation, None, True):
        return []
    trunk = [first]
    while (layer := _reader(trunk[-1], layers)) is not None and _continues(trunk, layer):
        trunk.append(layer)
    if len(trunk) % 2:
        trunk.pop()
    # The call comes where the last convolution was: what reads the picture that it keeps must come later.
    if trunk and any(order[user] < order[trunk[-1].node] for user in trunk[-2].kept_for):
        del trunk[-2:]
    return trunk


def _reader(layer: _Layer, layers: dict[fx.Node, _Layer]) -> _Layer | None:
    """The convolution that alone reads the raw output of ``layer`` and its statistics."""
    users = list(layer.items[0].users) if 0 in layer.items else []
    reader = layers.get(users[0]) if len(users) == 1 else None
    return reader if reader is not None and reader.follows(layer) else None


def _continues(trunk: list[_Layer], layer: _Layer) -> bool:
    """Whether ``layer``, which reads the last one of ``trunk``, is what a trunk goes on with."""
    if len(trunk) > 1 and layer.arguments["eps"] != trunk[1].arguments["eps"]:
        return False
    if layer.arguments["precision"] != trunk[0].arguments["precision"]:
        return False
    if len(trunk) % 2:
        return layer.does("relu", None, False)
    before = trunk[-2]
    return before.kept_for == {layer.node} and layer.does("none", before.items[_KEPT], True)


def _input_scales(trunk: list[_Layer]) -> list[float]:
    """The scales of the convolutions that multiply 8-bit integers, 0 for the others; empty if none does."""
    scales = [layer.arguments["input_scale"] or 0.0 for layer in trunk]
    return scales if any(scales) else []


def _replace(graph: fx.Graph, trunk: list[_Layer]) -> fx.Node:
    """Call ``residual_trunk`` in the place of the convolutions of ``trunk``."""
    first, last = trunk[0], trunk[-1]
    weights, norm_weights, norm_biases = (
        [layer.arguments[name] for layer in trunk] for name in ("weight", "norm_weight", "norm_bias")
    )
    finish = ("input", "mean", "variance", "norm_weight", "norm_bias", "eps", "activation")
    with graph.inserting_before(last.node):
        call = graph.call_function(
            torch.ops.styleforge.residual_trunk.default,
            (
                *(first.arguments[name] for name in finish), weights, norm_weights[1:], norm_biases[1:],
                last.arguments["eps"], last.arguments["precision"],
                _input_scales(trunk),
            ),
        )  # fmt: skip
    call.meta["sites"] = tuple(site for layer in trunk for site in layer.node.meta["sites"])
    results = {i: item for i, item in last.items.items() if i != _KEPT}
    results.update((i, item) for i, item in trunk[-2].items.items() if i == _KEPT)
    with graph.inserting_before(last.node):
        for i, item in sorted(results.items()):
            taken = graph.call_function(getitem, (call, i))
            taken.meta.update(item.meta)
            item.replace_all_uses_with(taken)
    for layer in reversed(trunk):
        for item in layer.items.values():
            graph.erase_node(item)
        graph.erase_node(layer.node)
    return call
