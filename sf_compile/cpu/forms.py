"""Which convolutions are computed in a form with fewer products; see ``sf_compile.cpu.convolution``."""

from __future__ import annotations

import functools

import torch

WINOGRAD_CHANNELS = 16
"""What the channels of Winograd's form are multiples of."""

_LEAST_CHANNELS = 32  # below, its transforms cost more than its products save


@functools.cache
def _has_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def is_winograd(kernel: tuple[int, ...], stride: tuple[int, ...], channels: int, out_channels: int) -> bool:
    """Whether such a convolution in float32, of enough pixels, is computed in Winograd's."""
    return (
        kernel == (3, 3)
        and stride == (1, 1)
        and _has_vectors()
        and min(channels, out_channels) >= _LEAST_CHANNELS
        and channels % WINOGRAD_CHANNELS == 0
        and out_channels % WINOGRAD_CHANNELS == 0
    )
