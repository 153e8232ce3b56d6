"""How csrc/slab.cuh cuts a picture into slabs, and the memory that its blocks meet in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile.cuda.layout import DTYPES, is_channels_last, multiprocessors, vector_width, vector_widths

STEP = 2  # vectors that a thread moves at a time
AHEAD = 3  # steps that a thread has on their way into shared memory
_MOMENTS_BYTES = 12
_ACCESS_BYTES = 16
_LANES = (16, 8, 4, 2, 1)
_LARGE_SLAB_BYTES = 400_000  # a tuning constant: between the slabs that gained from wide groups and not
_COUNTERS = 1024  # more than there are groups wherever a group has slices


class SlabVariant(NamedTuple):
    """The compile-time constants that a slab kernel takes from the picture."""

    dtype: int
    channels_last: bool
    vector: int
    lanes: int


class Slabs(NamedTuple):
    """A picture cut for one launch: ``groups`` of channels by ``slices`` of pixels."""

    variant: SlabVariant
    groups: int
    slices: int


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
    steps = pixels if channels_last else pixels // vector
    most = -(-steps * lanes // (threads * STEP))  # a slice has a step for every thread
    slices = max(1, min(blocks // groups, most))
    return Slabs(SlabVariant(DTYPES[x.dtype], channels_last, vector, lanes), groups, slices)


def _lanes(n: int, c: int, vector: int, blocks: int, size: int) -> int:
    """How many neighbouring accesses of a pixel make a group, for a picture of ``size`` bytes.

    Many, so that whole lines of memory are read; fewer (64 bytes still fill the sectors of DRAM) where
    merging the moments, a fixed time for every channel of the group and slice, would weigh against a small
    slab.
    """
    slab = size // blocks
    for lanes in _LANES:
        if c % (lanes * vector):
            continue
        slices = max(1, blocks * lanes * vector // (n * c))
        merged = slices * lanes * vector * _MOMENTS_BYTES
        if lanes <= 4 or (slab >= _LARGE_SLAB_BYTES and (slices <= 33 or 4 * merged <= slab)):
            return lanes
    return 1


def published(x: Tensor, slabs: Slabs) -> Tensor | None:
    """Room for every slab's moments; None where a group is one slab."""
    if slabs.slices == 1:
        return None
    variant = slabs.variant
    channels = slabs.groups * (variant.lanes * variant.vector if variant.channels_last else 1)
    return torch.empty(channels * slabs.slices * _MOMENTS_BYTES, dtype=torch.uint8, device=x.device)


_of_stream: dict[tuple[int, int], Tensor] = {}
_of_capture: dict[int, tuple[int, dict[int, Tensor]]] = {}


def tickets(x: Tensor, slabs: Slabs) -> int:
    """The address of the counters from which csrc/statistics.cu draws; 0 where a group is one slab."""
    counters = _counters(x, slabs)
    return 0 if counters is None else counters.data_ptr()


def arrivals(x: Tensor, slabs: Slabs) -> int:
    """The address of the counters on which csrc/instance_norm.cu waits, which are counted otherwise."""
    counters = _counters(x, slabs)
    return 0 if counters is None else counters.data_ptr() + 4 * _COUNTERS


def _counters(x: Tensor, slabs: Slabs) -> Tensor | None:
    """Two rows of counters, one a group, on which its slices meet; None where a group is one slab.

    The kernels leave them ready for the next launch on the same stream. A CUDA graph has counters of its own,
    zeroed once inside it, because graphs that were captured on one stream may be replayed side by side.
    """
    if slabs.slices == 1:
        return None
    index = x.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing():
        return _captured_counters(x.device, stream)
    found = _of_stream.get((index, stream))
    if found is None:
        found = _of_stream[index, stream] = _zeros(x.device)
    return found


def _captured_counters(device: torch.device, stream: int) -> Tensor:
    """The counters of the capture in progress on ``stream``; those of the capture before it are let go."""
    from cuda.bindings import driver

    capture = int(driver.cuStreamGetCaptureInfo(stream)[2])
    latest = _of_capture.get(device.index)
    if latest is None or latest[0] != capture:
        latest = _of_capture[device.index] = (capture, {})
    counters = latest[1].get(stream)
    if counters is None:
        counters = latest[1][stream] = _zeros(device)
    return counters


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros((2, _COUNTERS), dtype=torch.int32, device=device)
