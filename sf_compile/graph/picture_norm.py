"""The canonical spelling of the norms for which PyTorch has no function."""

from __future__ import annotations

import torch
from torch import Tensor


def picture_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int | None, correction: float,
    eps: float, outer_eps: float | None,
) -> Tensor:  # fmt: skip
    """(x - mean) / (sqrt(variance + eps) + outer_eps) * weight + bias, by each picture's own statistics.

    ``input`` is (N, C, H, W); mean and variance, with ``correction`` taken off its n, are of ``groups``
    equal shares of the channels (None: each channel alone). ``weight`` and ``bias`` are (C,) or (N, C).
    ``outer_eps`` None is none.
    """
    n, c = input.shape[:2]
    pixels = input.reshape(n, c if groups is None else groups, -1)
    variance, mean = torch.var_mean(pixels, 2, correction=correction, keepdim=True)
    root = torch.sqrt(variance + eps)
    out = ((pixels - mean) / (root if outer_eps is None else root + outer_eps)).reshape(input.shape)
    if weight is not None:
        out = out * weight.reshape(-1, c, 1, 1)
    return out if bias is None else out + bias.reshape(-1, c, 1, 1)
