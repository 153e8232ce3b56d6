"""How csrc/slab.cuh cuts a picture into slabs, and the memory that its blocks meet in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile.cuda.layout import DTYPES, is_channels_last, multiprocessors, vector_width, vector_widths
from sf_compile.cuda.workspace import zeroed

STEP = 2  # vectors that a thread moves at a time
AHEAD = 3  # steps that a thread has on their way into shared memory
_WORD_BYTES = 8  # a channel's moments, as a slab publishes them
_ACCESS_BYTES = 16
_LANES = (16, 8, 4, 2, 1)
_FEW_LANES = 4  # 64 bytes of a pixel
_MERGING = 4  # a tuning constant: bytes of a slab that are worth one byte of moments read to merge
_COUNTERS = 1024  # more than there are groups wherever a group has slices


class SlabVariant(NamedTuple):
    """The compile-time constants that a slab kernel takes from the picture."""

    dtype: int
    channels_last: bool
    vector: int
    lanes: int


class Slabs(NamedTuple):
    """A picture cut for one launch: ``groups`` of channels by ``slices`` of pixels.

    The threads of a group's slices take ``turns`` whole turns through its positions, and ``rest`` are left.
    """

    variant: SlabVariant
    groups: int
    slices: int
    turns: int
    rest: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid to launch, in blocks."""
        return self.groups, self.slices, 1

    @property
    def group(self) -> int:
        """The channels of a group."""
        return self.variant.lanes * self.variant.vector if self.variant.channels_last else 1

    @property
    def words(self) -> int:
        """How many moments the slabs publish together; 0 where a group is one slab."""
        return self.groups * self.slices * self.group if self.slices > 1 else 0


def slab_variants() -> Iterator[SlabVariant]:
    """Every ``SlabVariant`` that ``cut`` returns."""
    for dtype in DTYPES.values():
        widths = vector_widths(dtype)
        for vector in widths:
            yield SlabVariant(dtype, False, vector, 1)
            for lanes in _LANES if vector == widths[-1] else (1,):
                yield SlabVariant(dtype, True, vector, lanes)


def cut(x: Tensor, threads: int, resident: int, *others: Tensor | None) -> Slabs:
    """Cut ``x`` (N, C, H, W), dense in one of the two layouts; ``others`` are accessed alongside it.

    ``threads`` is the size of a block, ``resident`` how many of them a multiprocessor holds: slices are made
    only while groups leave room for more blocks.
    """
    n, c, h, w = x.shape
    pixels = h * w
    channels_last = is_channels_last(x) and not x.is_contiguous()
    vector = vector_width(c if channels_last else pixels, x, *others)
    blocks = multiprocessors(x.device.index) * resident
    lanes, groups = 1, n * c
    # An access narrower than 16 bytes means an odd number of them a pixel: nothing to pair up.
    if channels_last and vector * x.element_size() == _ACCESS_BYTES:
        lanes = _lanes(n, c, vector, blocks, x.numel() * x.element_size())
    if channels_last:
        groups = n * c // (lanes * vector)
    positions = pixels if channels_last else pixels // vector
    rows = STEP * threads // lanes  # positions that a block takes in one step
    slices = max(1, min(blocks // groups, -(-positions // rows)))
    turns, rest = divmod(positions, rows * slices)
    return Slabs(SlabVariant(DTYPES[x.dtype], channels_last, vector, lanes), groups, slices, turns, rest)


def _lanes(n: int, c: int, vector: int, blocks: int, size: int) -> int:
    """How many neighbouring accesses of a pixel make a group, for a picture of ``size`` bytes.

    Many, so that whole lines of memory are read; fewer (64 bytes still fill the sectors of DRAM) where what
    each block reads of the other slices' moments would weigh against its slab.
    """
    slab = size // blocks
    for lanes in _LANES:
        if c % (lanes * vector):
            continue
        slices = max(1, blocks * lanes * vector // (n * c))
        if lanes <= _FEW_LANES or _MERGING * slices * lanes * vector * _WORD_BYTES <= slab:
            return lanes
    return 1


def published(x: Tensor, slabs: Slabs) -> Tensor | None:
    """Room for what the slabs of csrc/statistics.cu publish; None where a group is one slab."""
    if not slabs.words:
        return None
    return torch.empty(slabs.words * _WORD_BYTES, dtype=torch.uint8, device=x.device)


def phased(x: Tensor, slabs: Slabs) -> int:
    """The address of what the slabs of csrc/instance_norm.cu publish; 0 where a group is one slab.

    Each launch turns the phase of every word, from 0 at first, so all launches that share the memory must
    have the same number of words.
    """
    return zeroed(x.device, f"{slabs.words} moments", _WORD_BYTES * slabs.words) if slabs.words else 0


def tickets(x: Tensor, slabs: Slabs) -> int:
    """The address of the counters from which csrc/statistics.cu draws; 0 where a group is one slab."""
    return zeroed(x.device, "tickets", 4 * _COUNTERS) if slabs.words else 0
