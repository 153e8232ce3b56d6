"""The ATen spelling of torch.export, to Dynamo's and back.

A graph of torch.export calls ``aten.conv2d.default`` where Dynamo's calls ``torch.conv2d``. ``from_aten``
respells what the matcher knows, so that the stages see one kind of graph; ``to_aten`` puts what they left
alone back, because an exported program holds nothing but ATen and registered operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sf_compile.graph import spelling

aten = torch.ops.aten

_CUDNN = "cudnn_enabled"
"""Key in a node's ``meta`` of the one argument that Dynamo's spelling of a norm does not have."""

# Same arguments in both spellings.
_ALIKE: dict[Any, Any] = {
    aten.conv2d.default: spelling.CONV2D,
    aten.conv2d.padding: spelling.CONV2D,
    aten.conv_transpose2d.input: spelling.CONV_TRANSPOSE2D,
    aten.pad.default: spelling.PAD,
    aten.relu.default: spelling.RELU,
    aten.relu_.default: torch.relu_,
    aten.leaky_relu.default: spelling.LEAKY_RELU,
    aten.prelu.default: spelling.PRELU,
    aten.elu.default: spelling.ELU,
    aten.hardtanh.default: spelling.HARDTANH,
    aten.clamp.default: spelling.CLAMP,
    aten.tanh.default: spelling.TANH,
    aten.sigmoid.default: spelling.SIGMOID,
    aten.silu.default: spelling.SILU,
    aten.add.Tensor: spelling.ADD,
    aten.add_.Tensor: operator.iadd,
}
_NORMS = {aten.instance_norm.default: spelling.INSTANCE_NORM, aten.batch_norm.default: spelling.BATCH_NORM}


def from_aten(graph: fx.Graph) -> None:
    """Spell ATen calls of ``graph`` as Dynamo would, where both say the same; the others stay."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _ALIKE and not (node.kwargs and node.target is aten.add_.Tensor):
            node.target = _ALIKE[node.target]
        elif node.target in _NORMS:
            input, weight, bias, mean, variance, training, momentum, eps, node.meta[_CUDNN] = node.args
            node.target = _NORMS[node.target]
            node.args = (input, mean, variance, weight, bias, training, momentum, eps)
        elif node.target is aten.upsample_nearest2d.vec:
            input, size, scales = (*node.args, None)[:3]
            node.target, node.args = spelling.INTERPOLATE, (input, size, scales, "nearest")


def to_aten(graph: fx.Graph) -> None:
    """The opposite of ``from_aten``, of nodes that ``normalize`` may have respelled in between."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _BACK:
            node.target, node.args = _BACK[node.target](node)


def _conv2d(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    padding = node.args[4] if len(node.args) > 4 else 0
    return (aten.conv2d.padding if isinstance(padding, str) else aten.conv2d.default), node.args


def _norm(target: Any) -> Callable[[fx.Node], tuple[Any, tuple[Any, ...]]]:
    def spell(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
        input, mean, variance, weight, bias, training, momentum, eps = node.args
        return target, (
            input, weight, bias, mean, variance, training, momentum, eps, node.meta.pop(_CUDNN)
        )  # fmt: skip

    return spell


def _upsample(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return aten.upsample_nearest2d.vec, node.args[:3]


def _alike(target: Any) -> Callable[[fx.Node], tuple[Any, tuple[Any, ...]]]:
    return lambda node: (target, node.args)


_BACK: dict[Any, Callable[[fx.Node], tuple[Any, tuple[Any, ...]]]] = {
    **{torch_spelling: _alike(target) for target, torch_spelling in _ALIKE.items()},
    **{torch_spelling: _norm(target) for target, torch_spelling in _NORMS.items()},
    spelling.CONV2D: _conv2d,
    spelling.INTERPOLATE: _upsample,
}
