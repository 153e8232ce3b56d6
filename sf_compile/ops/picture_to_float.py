"""``styleforge::picture_to_float``: pictures of bytes become a network's input.

    out[n, c, y, x] = input[n, y', x', c] * (high - low) / 255 + low

computed in float32 (float64 for a float64 result) and rounded once. ``size`` may be larger than the picture:
y' and x' then mirror it at its right and lower edge, again and again if need be, without repeating the edge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import FLOATING, require
from sf_compile.ops.library import register

SCHEMA = (
    "picture_to_float(Tensor input, SymInt[2] size, ScalarType dtype, float low=0., float high=255., "
    "bool channels_last=False) -> Tensor"
)


def _check(input: Tensor, size: Any, dtype: torch.dtype, low: float, high: float) -> None:
    require(
        input.dim() == 4 and input.dtype == torch.uint8,
        lambda: f"styleforge::picture_to_float: input must be uint8 (N, H, W, C), got {input.dtype} "
        f"{tuple(input.shape)}",
    )
    require(
        dtype in FLOATING,
        lambda: "styleforge::picture_to_float: dtype must be float16, bfloat16, float32 or float64, got "
        f"{dtype}",
    )
    require(
        len(size) == 2 and size[0] >= input.shape[1] and size[1] >= input.shape[2],
        lambda: f"styleforge::picture_to_float: size {list(size)} is smaller than the picture, "
        f"{input.shape[1]} x {input.shape[2]}",
    )
    require(
        low < high, lambda: f"styleforge::picture_to_float: low {low} must be below high {high}"
    )


def _cpu(
    input: Tensor, size: Any, dtype: torch.dtype, low: float = 0.0, high: float = 255.0,
    channels_last: bool = False,
) -> Tensor:  # fmt: skip
    _check(input, size, dtype, low, high)
    return reference.picture_to_float(input, size, dtype, low, high, channels_last)


def _cuda(
    input: Tensor, size: Any, dtype: torch.dtype, low: float = 0.0, high: float = 255.0,
    channels_last: bool = False,
) -> Tensor:  # fmt: skip
    from sf_compile.cuda import picture as cuda

    _check(input, size, dtype, low, high)
    return cuda.picture_to_float(input, size, dtype, low, high, channels_last)


def _fake(
    input: Tensor, size: Any, dtype: torch.dtype, low: float = 0.0, high: float = 255.0,
    channels_last: bool = False,
) -> Tensor:  # fmt: skip
    _check(input, size, dtype, low, high)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (input.shape[0], input.shape[3], *size)
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    """Bytes have no gradient."""
    return (None,) * 6


register(SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context)
picture_to_float = torch.ops.styleforge.picture_to_float.default
