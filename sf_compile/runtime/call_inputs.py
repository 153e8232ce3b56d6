"""What the inputs of a call are, parameters, tensors or numbers, and what its results share with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NUMBERS = (int, float, bool, type(None))


class Inputs(NamedTuple):
    """Which inputs are what, by number."""

    fixed: tuple[int, ...]
    moving: tuple[int, ...]
    numbers: tuple[int, ...]


def sorted_inputs(types: Sequence[type], bound: Collection[int]) -> Inputs | None:
    """The inputs by what they are, where those ``bound`` by number stay where they are, as parameters do.

    None where one is neither a plain tensor nor a number.
    """
    fixed = [
        i for i, one in enumerate(types)
        if one is torch.nn.Parameter or (one is Tensor and i in bound)
    ]  # fmt: skip
    moving = [i for i, one in enumerate(types) if one is Tensor and i not in bound]
    numbers = [i for i, one in enumerate(types) if one in _NUMBERS]
    known = len(fixed) + len(moving) + len(numbers) == len(types) and bool(fixed or moving)
    return Inputs(tuple(fixed), tuple(moving), tuple(numbers)) if known else None


def is_number(x: Tensor) -> bool:
    """Whether it is a number that Dynamo keeps in a tensor on the CPU."""
    return x.device.type == "cpu" and x.dim() == 0


def exactly(number: Any) -> Any:
    """A number as a part of a key: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    return (type(number), repr(number)) if isinstance(number, float | bool) else number


def times_written(x: Tensor) -> int:
    """How often a tensor was written; 0 of an inference tensor, which does not tell."""
    return 0 if x.is_inference() else x._version


def flat(results: Any) -> list[Any]:
    """Results, which graphs return as a tuple or list of tensors and numbers, or as a single one."""
    return list(results) if isinstance(results, tuple | list) else [results]


def share_memory(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether a result shares memory with an input, or with another result but itself."""
    taken = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
    for x in {id(x): x for x in results if x.numel()}.values():
        at = x.untyped_storage().data_ptr()
        if at in taken:
            return True
        taken.add(at)
    return False
