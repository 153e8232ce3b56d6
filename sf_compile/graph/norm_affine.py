"""The scale and shift after a norm, one number a channel, or a channel and image, whatever the spelling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph.expressions import read, readers, unexpanded, views
from sf_compile.graph.values import Miss, same_shape, same_sizes, value_of
from sf_compile.graph.walls import Walls


@dataclass(frozen=True)
class Vector:
    """``node`` holds the numbers of (C,), or of (N, C), or of a tensor that ``call`` makes one of those."""

    node: fx.Node
    call: tuple[Any, tuple[Any, ...]] | None = None

    def placed(self, graph: fx.Graph, reader: fx.Node, walls: Walls) -> fx.Node:
        """The node of (C,) or (N, C) for ``reader``, made early: it would part ops that follow each other."""
        if self.call is None:
            return self.node
        function, arguments = self.call
        if any(walls.between(self.node, reader)):
            with graph.inserting_before(reader):
                return graph.call_function(function, (self.node, *arguments))
        after = self.node
        while after.op == "placeholder" and after.next.op == "placeholder":
            after = after.next
        with graph.inserting_after(after):
            return graph.call_function(function, (self.node, *arguments))


@dataclass(frozen=True)
class Affine:
    """``weight`` and ``bias`` make ``end`` of a norm; ``nodes`` are the norm's own end and what lies between.

    ``misses`` say what could not be taken along.
    """

    end: fx.Node
    weight: Vector | None = None
    bias: Vector | None = None
    nodes: tuple[fx.Node, ...] = ()
    misses: tuple[Miss, ...] = ()


def vector_of(node: Any, picture: Tensor, reader: fx.Node, walls: Walls) -> Vector | str | None:
    """What ``reader`` multiplies with, or adds to, all pixels of a channel of ``picture`` (N, C, H, W) alike.

    Returns a reason for a tensor that does not, and None for what is no tensor, or is one of another dtype.
    """
    value = value_of(node)
    if not isinstance(node, fx.Node) or not isinstance(value, Tensor):
        return None
    if value.dtype != picture.dtype or value.device != picture.device:
        return None
    small = unexpanded(node)[-1]
    shape = tuple(value_of(small).shape)
    if len(shape) > 4:
        return None
    images, channels, *pixel = [1] * (4 - len(shape)) + list(shape)
    if not all(statically_known_true(size == 1) for size in pixel):
        return "differs from pixel to pixel"
    if not statically_known_true(channels == picture.shape[1]):
        return "is not of one number a channel"
    shared = statically_known_true(images == 1)
    if not shared and not statically_known_true(images == picture.shape[0]):
        return "is of another number of images"
    wanted = picture.shape[1:2] if shared else picture.shape[:2]
    return _source(small, wanted, reader, walls) or Vector(small, (torch.flatten, () if shared else (1,)))


def vectors_of(nodes: Sequence[Any], picture: Tensor, reader: fx.Node, walls: Walls) -> list[Vector | None]:
    """Of weights and biases (N C,) that belong to the channels of all images of ``picture``, and of None."""
    shape = picture.shape[:2]
    return [
        None
        if node is None
        else _source(node, shape, reader, walls) or Vector(node, (torch.reshape, ((-1, shape[1]),)))
        for node in nodes
    ]


def _source(node: fx.Node, shape: Sequence[Any], reader: fx.Node, walls: Walls) -> Vector | None:
    """The tensor of ``shape`` that ``node`` is a view of, if the view surely shows what it holds."""
    path = views(node)
    for i, source in enumerate(path):
        if same_sizes(value_of(source).shape, shape):
            # Some views are copies: then the source must not have been written since.
            return Vector(source) if i == 0 or not any(walls.between(path[i - 1], reader)) else None
    return None


def follow(affine: Affine, picture: Tensor, walls: Walls) -> Affine:
    """``affine`` with the multiplication and the addition that alone read it, and no wall on the way."""
    while len(readers(affine.end)) == 1 and affine.bias is None:
        (reader,) = readers(affine.end)
        call = read(reader)
        if call is None or call.name not in ("mul", "add") or any(walls.between(affine.end, reader)):
            break
        first, second = call.arguments
        alone = (first is affine.end) != (second is affine.end)
        if not alone or (call.inplace and first is not affine.end):
            break
        if call.name == "mul" and affine.weight is not None:
            break
        found = vector_of(second if first is affine.end else first, picture, reader, walls)
        if isinstance(found, str) and call.name == "mul":
            return replace(affine, misses=(Miss(reader.name, f"what a norm is multiplied by {found}"),))
        # What is as large as the picture and added to it is a residual.
        if not isinstance(found, Vector) or not same_shape(value_of(reader), picture):
            break
        weight = found if call.name == "mul" else affine.weight
        bias = found if call.name == "add" else None
        affine = Affine(reader, weight, bias, (*affine.nodes, affine.end))
    return affine
