"""TF32: float32 convolved with operands of 10 bits of mantissa, where PyTorch's settings allow it."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed() -> bool:
    """Whether PyTorch convolves float32 in TF32 (``torch.backends.cudnn``; by default it does)."""
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


def rounded(weight: Tensor) -> Tensor:
    """Float32 ``weight`` rounded to TF32, ties away from zero as by ``cvt.rna``; others as they are."""
    if weight.dtype != torch.float32:
        return weight
    bits = weight.contiguous().view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return torch.where(finite, (bits + 0x1000) & -0x2000, bits).view(torch.float32)
