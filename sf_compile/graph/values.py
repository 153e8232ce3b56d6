"""What the stages know of a node: the value that Dynamo recorded, and why it is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda")
# What autocast computes convolutions in, where float32 would mix with it.
AUTOCAST_DTYPES = frozenset({torch.float16, torch.bfloat16})


# In a node's ``meta``, of those inside an autocast region: for which devices it is on (True), and off.
AUTOCAST = "sf_compile_autocast"


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


def arguments_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a canonical node, in the order that ``spelling`` documents."""
    return node.args


def value_of(node: Any) -> Any:
    """The fake tensor (or symbolic number) that Dynamo recorded for ``node``; None if it has none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def autocast_is_on(node: fx.Node, device: str) -> bool:
    """Whether autocast is on for such devices at ``node``, by a region of the graph or around it all."""
    region: dict[str, bool] = node.meta.get(AUTOCAST, {})
    return region.get(device, torch.is_autocast_enabled(device))


def same_shape(a: Any, b: Any) -> bool:
    """Whether two tensors surely have one shape, without adding a guard on a symbolic size."""
    return same_sizes(a.shape, b.shape)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes surely are one."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def dense(value: torch.Tensor) -> bool:
    """Whether (N, C, H, W) is surely contiguous or channels_last, the two layouts that the ops return."""
    _, c, h, w = value.shape
    for strides in ((c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c)):
        pairs = zip(value.shape, value.stride(), strides, strict=True)
        if all(statically_known_true(size == 1) or statically_known_true(a == b) for size, a, b in pairs):
            return True
    return False


def not_a_picture(node: fx.Node, what: str) -> Miss | None:
    """Why the output of ``node`` is not a picture that the ops take; None if it is one."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return Miss(node.name, f"{what} without a recorded shape")
    if value.dim() != 4:
        return Miss(node.name, f"{what} of a {value.dim()}-dimensional tensor, not (N, C, H, W)")
    if value.dtype not in DTYPES:
        return Miss(node.name, f"{what} in {value.dtype}")
    if value.device.type not in DEVICES:
        return Miss(node.name, f"{what} on device {value.device.type!r}")
    if value.layout != torch.strided:
        return Miss(node.name, f"{what} of a {value.layout} tensor")
    return None
