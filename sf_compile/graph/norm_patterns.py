"""The rules of ``patterns`` that are about norms: those of PyTorch, and ``picture_norm``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph import spelling
from sf_compile.graph.steps import Norm
from sf_compile.graph.values import AUTOCAST_DTYPES, Miss, arguments_of, not_a_picture, value_of, whole_images


def instance_norm(node: fx.Node) -> Norm | Miss:
    """F.instance_norm: by the picture's own statistics, or by running ones as the model asked."""
    input, mean, variance, weight, bias, use_input_stats, _, eps = arguments_of(node)
    if not isinstance(use_input_stats, bool):
        return Miss(node.name, "instance norm whose use_input_stats is not a constant")
    if use_input_stats and mean is not None:
        return Miss(node.name, "instance norm in training updates its running statistics")
    return _norm(node, input, mean, variance, weight, bias, eps, "instance norm")


def batch_norm(node: fx.Node) -> Norm | Miss:
    """F.batch_norm in eval: an affine by its running statistics."""
    input, mean, variance, weight, bias, training, _, eps = arguments_of(node)
    if training is not False or mean is None:
        return Miss(node.name, "batch norm in training takes its statistics from the batch")
    return _norm(node, input, mean, variance, weight, bias, eps, "batch norm")


def group_norm(node: fx.Node) -> Norm | Miss:
    """F.group_norm: by the picture's own statistics over groups of channels."""
    input, groups, weight, bias, eps = arguments_of(node)
    if not isinstance(groups, int):
        return Miss(node.name, "group norm whose number of groups is not a constant")
    norm = _norm(node, input, None, None, weight, bias, eps, "group norm")
    if isinstance(norm, Miss) or statically_known_true(value_of(input).shape[1] == groups):
        return norm  # a group for each channel is an instance norm
    return replace(norm, groups=groups)


def layer_norm(node: fx.Node) -> Norm | Miss:
    """F.layer_norm over (C, H, W), without a weight and bias for every pixel."""
    input, shape, weight, bias, eps = arguments_of(node)
    if not whole_images(shape, value_of(input)):
        return Miss(node.name, "layer norm over other dimensions than (C, H, W)")
    if weight is not None or bias is not None:
        return Miss(node.name, "layer norm with a weight and bias for every pixel")
    norm = _norm(node, input, None, None, None, None, eps, "layer norm")
    return norm if isinstance(norm, Miss) else replace(norm, groups=1)


def picture_norm(node: fx.Node) -> Norm | Miss:
    """A hand-written norm, as graph/handwritten_norm.py put it."""
    input, weight, bias, groups, correction, eps, outer_eps = arguments_of(node)
    norm = _norm(node, input, None, None, weight, bias, eps, "norm")
    if isinstance(norm, Miss):
        return norm
    return replace(norm, groups=groups, correction=correction, outer_eps=outer_eps)


def _norm(
    node: fx.Node, input: Any, mean: Any, variance: Any, weight: Any, bias: Any, eps: Any, what: str
) -> Norm | Miss:
    if (miss := not_a_picture(node, what)) is not None:
        return miss
    before, after = value_of(input).dtype, value_of(node).dtype
    widens = before in AUTOCAST_DTYPES and after == torch.float32  # as autocast has some norms do
    if before != after and not widens:
        return Miss(node.name, f"{what} that changes the dtype")
    return Norm(node, input, mean, variance, weight, bias, eps)


NORMS: dict[Any, Callable[[fx.Node], Norm | Miss]] = {
    spelling.INSTANCE_NORM: instance_norm,
    spelling.BATCH_NORM: batch_norm,
    spelling.GROUP_NORM: group_norm,
    spelling.LAYER_NORM: layer_norm,
    spelling.PICTURE_NORM: picture_norm,
}
