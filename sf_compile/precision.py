"""What a convolution is computed in, by one name: ``auto``, ``fp16``, ``bf16``, ``tf32`` or ``fp32``.

Every name settles the *storage*: the dtype that operands are rounded to, in which pictures lie between fused
ops, and of which the statistics are. Sums are float32 whatever the name. ``tf32`` and ``fp32`` both store
float32; they differ in whether the products may round their operands to TF32's 10 bits.
"""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp32")
"""``auto``: as the tensors are, and in float32 as PyTorch's switches of TF32 say when it runs."""

_STORAGE = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32,
}  # fmt: skip
_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip


def storage(precision: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a ``precision`` stores what was ``dtype`` in."""
    return _STORAGE.get(precision, dtype)


def name_of(dtype: torch.dtype) -> str:
    """The precision that computes in ``dtype``, or how a float64 picture is computed: ``fp64``."""
    return _NAMES[dtype]
