"""What cuts rows and columns off a picture: a slice, or a padding by negative sizes.

Networks ported from TensorFlow crop what a transposed convolution of PyTorch's makes.

Like the rules of ``patterns``: from one canonical node to a ``Crop``, or a ``Miss`` with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.graph import spelling
from sf_compile.graph.normalize import value_of
from sf_compile.graph.steps import Crop
from sf_compile.graph.values import Miss

CROPS = frozenset({spelling.GETITEM, spelling.PAD})
"""The canonical operations that can be a crop."""


def crop(node: fx.Node) -> Crop | Miss:
    """A slice of rows and columns by constant sizes, or a padding by negative ones."""
    input, index, *rest = node.args
    if node.target is spelling.PAD:
        sizes = _cut_by_pad(index, *rest)
    else:
        sizes = _cut_by_index(index, value_of(input))
    if sizes is None:
        return Miss(node.name, "no crop of rows and columns by constant sizes")
    left, right, top, bottom = sizes
    assert isinstance(input, fx.Node)
    large, small = value_of(input).shape, value_of(node).shape
    if len(small) != 4 or not (
        statically_known_true(small[2] == large[2] - top - bottom)
        and statically_known_true(small[3] == large[3] - left - right)
    ):
        return Miss(node.name, "a crop of more than there is")
    return Crop(node, input, (left, right, top, bottom))


def _cut_by_pad(padding: Any, mode: Any, value: Any) -> tuple[int, int, int, int] | None:
    if mode != "constant" or not isinstance(padding, tuple) or len(padding) not in (2, 4):
        return None
    if not all(isinstance(size, int) and size <= 0 for size in padding):
        return None
    left, right, top, bottom = (-size for size in (*padding, 0, 0)[:4])
    return left, right, top, bottom


def _cut_by_index(index: Any, value: torch.Tensor) -> tuple[int, int, int, int] | None:
    """What ``x[index]`` cuts off an x like ``value``; None where it does anything else."""
    slices = list(index) if isinstance(index, tuple) else [index]
    if value.dim() != 4 or len(slices) > 4 + (slices[:1] == [Ellipsis]):
        return None
    if slices[:1] == [Ellipsis]:
        slices = [slice(None)] * (5 - len(slices)) + slices[1:]
    slices += [slice(None)] * (4 - len(slices))
    cuts = [_cut(part, size) for part, size in zip(slices, value.shape, strict=True)]
    if cuts[:2] != [(0, 0), (0, 0)] or cuts[2] is None or cuts[3] is None:
        return None
    return *cuts[3], *cuts[2]


def _cut(part: Any, size: Any) -> tuple[int, int] | None:
    """What a slice cuts off the beginning and end of ``size`` values; None if that is no constant."""
    if not isinstance(part, slice) or part.step not in (None, 1):
        return None
    start = 0 if part.start is None else part.start
    if not isinstance(start, int) or start < 0:
        return None
    if part.stop is None:
        return start, 0
    if not isinstance(part.stop, int):
        return None
    if part.stop < 0:
        return start, -part.stop
    # (Longer slices end where the values do.)
    return (start, max(size - part.stop, 0)) if isinstance(size, int) else None
