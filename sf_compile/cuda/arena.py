"""Places in one allocation for tensors that live no longer than a run of kernels does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ALIGNMENT = 512
"""Of every tensor's place, in bytes: what the caching allocator gives, too."""


class Lifetime(NamedTuple):
    """How much memory a tensor needs, and the first and the last launch, counted from 0, that touch it."""

    bytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether some launch needs both; a launch's inputs live as long as its outputs."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """A place for each of ``lifetimes``: its offset in bytes in an allocation of ``bytes``."""

    lifetimes: tuple[Lifetime, ...]
    offsets: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        total = sum(_rounded(life.bytes) for life in self.lifetimes)
        lines = [f"{len(self.lifetimes)} buffers of {total} bytes in {self.bytes}"]
        rows = sorted(zip(self.lifetimes, self.offsets, strict=True), key=lambda row: row[0].first)
        lines += [
            f"  launches {life.first:>3} to {life.last:>3}  offset {offset:>12}  {life.bytes:>12} bytes"
            for life, offset in rows
        ]
        return "\n".join(lines)


def plan(lifetimes: Sequence[Lifetime]) -> Arena:
    """Place the largest first, each as low as those that it meets leave room."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].bytes, lifetimes[i].first)):
        life = lifetimes[index]
        taken = sorted((offsets[i], lifetimes[i].bytes) for i in placed if lifetimes[i].meets(life))
        offset = 0
        for start, size in taken:
            if offset + life.bytes <= start:
                break
            offset = max(offset, start + _rounded(size))
        offsets[index] = offset
        placed.append(index)
    ends = [offset + _rounded(life.bytes) for offset, life in zip(offsets, lifetimes, strict=True)]
    return Arena(tuple(lifetimes), tuple(offsets), max(ends, default=0))


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
