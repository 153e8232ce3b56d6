"""What the stages know of a node: the value that Dynamo recorded, and why it is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclass(frozen=True)
class Miss:
    """``node`` is left as it is, because of ``reason``."""

    node: str
    reason: str


def whole_images(normalized_shape: Any, value: Any) -> bool:
    """Whether a layer norm over ``normalized_shape`` surely is over (C, H, W) of ``value``, (N, C, H, W)."""
    shape = value_of(normalized_shape) if isinstance(normalized_shape, fx.Node) else normalized_shape
    if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(shape, tuple | list):
        return False
    sizes = [value_of(size) if isinstance(size, fx.Node) else size for size in shape]
    return None not in sizes and same_sizes(sizes, value.shape[1:])


def value_of(node: Any) -> Any:
    """The fake tensor (or symbolic number) that Dynamo recorded for ``node``; None if it has none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def same_shape(a: Any, b: Any) -> bool:
    """Whether two tensors surely have one shape, without adding a guard on a symbolic size."""
    return same_sizes(a.shape, b.shape)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes surely are one."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
