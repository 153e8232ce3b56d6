"""Host side of csrc/norm_statistics.cu: the statistics that a norm uses, out of those of its channels."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import DTYPES, pointer
from sf_compile.cuda.loader import load
from sf_compile.ops import reference
from sf_compile.ops.norm_statistics import Arguments

SOURCE = "norm_statistics.cu"
_CONSTANTS = {"DTYPE": DTYPES[torch.float32], "PARAMETER": DTYPES[torch.float32]}
_THREADS = 256
_GROUPS_PER_BLOCK = _THREADS // 32


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (source, constants) that ``norm_statistics`` can ask for: one."""
    yield SOURCE, dict(_CONSTANTS)


@functools.cache
def _kernel(index: int) -> Kernel:
    mode = "overlapping" if torch.cuda.get_device_capability(index) >= (9, 0) else "ordinary"
    return load(SOURCE, "norm_statistics", _CONSTANTS, index, "PPPPqiffi", mode)


def norm_statistics(a: Arguments) -> tuple[Tensor, Tensor]:
    """``styleforge::norm_statistics``; its arguments have been checked.

    Statistics in float64, and those of no picture, are PyTorch's.
    """
    n, c = a.mean.shape
    if a.mean.dtype != torch.float32 or a.mean.numel() == 0 or not usable_or_warn():
        return reference.norm_statistics(a.mean, a.variance, a.groups, a.bessel, a.outer_eps)
    mean, variance = a.mean.contiguous(), a.variance.contiguous()
    out_mean, out_variance = torch.empty_like(mean), torch.empty_like(variance)
    groups = n * (c if a.groups is None else a.groups)
    _kernel(mean.device.index).launch(
        (-(-groups // _GROUPS_PER_BLOCK), 1, 1), _THREADS, 0,
        (
            pointer(mean), pointer(variance), pointer(out_mean), pointer(out_variance), groups, a.channels,
            a.bessel, a.outer_eps or 0.0, int(a.outer_eps is not None),
        ),
    )  # fmt: skip
    return out_mean, out_variance
