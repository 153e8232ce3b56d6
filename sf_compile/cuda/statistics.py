"""Host side of csrc/statistics.cu: mean and variance of every (image, channel) on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import DTYPES, is_channels_last, pointer
from sf_compile.cuda.loader import load
from sf_compile.cuda.slabs import AHEAD, STEP, SlabVariant, cut, published, slab_variants, tickets
from sf_compile.ops import reference

SOURCE = "statistics.cu"
_THREADS = 512
_RESIDENT = 2  # blocks that a multiprocessor holds at once


def constants(variant: SlabVariant) -> dict[str, int]:
    """The compile-time constants of one kernel."""
    return {
        "DTYPE": variant.dtype, "PARAMETER": variant.dtype, "CHANNELS_LAST": int(variant.channels_last),
        "VECTOR": variant.vector, "LANES": variant.lanes,
    }  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (source, constants) that ``statistics`` can ask for."""
    for variant in slab_variants():
        yield SOURCE, constants(variant)


@functools.cache
def _kernel(index: int, variant: SlabVariant) -> Kernel:
    return load(SOURCE, "statistics", constants(variant), index, "PPPPPiqii")


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the pixels of each channel of ``x`` (N, C, H, W).

    Returns two (N, C) float32 tensors (float64 for float64 input, which PyTorch computes). The same picture
    gives the same bits on every run. Reads ``x`` once.
    """
    n, c, h, w = x.shape
    if x.dtype not in DTYPES or x.numel() == 0 or not usable_or_warn():
        return reference.statistics(x)
    if not x.is_contiguous() and not is_channels_last(x):
        x = x.contiguous()
    slabs = cut(x, _THREADS, _RESIDENT)
    mean = torch.empty((n, c), dtype=torch.float32, device=x.device)
    variance = torch.empty((n, c), dtype=torch.float32, device=x.device)
    moments = published(x, slabs)
    ring = AHEAD * STEP * _THREADS * slabs.variant.vector * x.element_size()
    _kernel(x.device.index, slabs.variant).launch(
        slabs.grid, _THREADS, ring,
        (pointer(x), pointer(mean), pointer(variance), pointer(moments), tickets(x, slabs), c, h * w,
         slabs.turns, slabs.rest),
    )  # fmt: skip
    return mean, variance
