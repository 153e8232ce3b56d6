"""Pictures and norms that the tests of the C++ kernels share."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from torch import Tensor

from sf_compile.cpu import building
from sf_compile.ops import reference
from sf_compile.ops.normalize import Norm

# In bfloat16 sums are as good as eager's; single numbers are rounded to 2^-9 either way.
DTYPES = (torch.float32, torch.bfloat16)
built = pytest.mark.skipif(building.missing() is not None, reason=str(building.missing()))


def strided(x: Tensor, how: str) -> Tensor:
    """``x`` with other strides: of a larger picture, or with its axes in an order of their own."""
    n, c, h, w = x.shape
    if how in LAYOUTS:
        return x.contiguous(memory_format=LAYOUTS[how])
    if how == "crop":
        larger = x.new_full((n, c, h + 3, w + 2), torch.nan)
        larger[:, :, 2 : h + 2, 1 : w + 1] = x
        return larger[:, :, 2 : h + 2, 1 : w + 1]
    if how == "channels":
        larger = x.new_full((n, c + 3, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
        larger[:, 2 : c + 2] = x
        return larger[:, 2 : c + 2]
    return x.permute(0, 2, 3, 1).transpose(1, 2).contiguous().transpose(1, 2).permute(0, 3, 1, 2)


def norm_of(x: Tensor, per_image: bool, activation: str = "relu") -> Norm:
    mean, variance = reference.statistics(x)
    shape = x.shape[:2] if per_image else x.shape[1:2]
    return Norm(mean, variance, torch.rand(shape) + 0.5, torch.randn(shape), 1e-5, activation)
