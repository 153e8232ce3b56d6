"""What the host side of a kernel needs to know of a tensor: its dense layout, its widest aligned access."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The value of the kernels' DTYPE and PARAMETER constants for each dtype they are compiled for."""

PADS = {"zeros": 1, "reflect": 2, "replicate": 3}
"""The kernels' number for each padding mode; 0 is none."""


def vector_widths(dtype: int) -> tuple[int, ...]:
    """Every width that ``vector_width`` can return for a DTYPE."""
    return (1, 2, 4) if dtype == 0 else (1, 2, 4, 8)


def parameter_dtypes(dtype: int) -> tuple[int, ...]:
    """The PARAMETER values a kernel is compiled for: the picture's dtype, and float32."""
    return (0,) if dtype == 0 else (dtype, 0)


def parameter_dtype(dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> int | None:
    """PARAMETER for a norm's weight and bias beside a picture; None where no kernel takes them."""
    found = {v.dtype for v in (weight, bias) if v is not None} or {dtype}
    return DTYPES.get(found.pop()) if len(found) == 1 and found <= {dtype, torch.float32} else None


def is_channels_last(x: Tensor) -> bool:
    """Whether the pixels of ``x`` (N, C, H, W) are dense with channels innermost."""
    return x.is_contiguous(memory_format=torch.channels_last)


def image_stride(vector: Tensor | None) -> int:
    """Elements from an image's numbers to the next's in (N, C); 0 where all images share (C,), or of none."""
    return 0 if vector is None or vector.dim() == 1 else vector.stride(0)


def dense_channels(vector: Tensor | None) -> bool:
    """Whether the channels of (C,) or (N, C) lie next to each other; so of none."""
    return vector is None or vector.shape[-1] < 2 or vector.stride(-1) == 1


def vector_width(extent: int, *tensors: Tensor | None) -> int:
    """Elements an access can have: up to 16 bytes, dividing ``extent``, aligned in every tensor given."""
    bits = extent
    widest = 16
    for x in tensors:
        if x is not None:
            size = x.element_size()
            bits |= x.data_ptr() // size
            widest = min(widest, 16 // size)
    return min(bits & -bits, widest) if bits else widest


@functools.cache
def multiprocessors(index: int) -> int:
    """How many multiprocessors CUDA device ``index`` has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def shared_bytes(index: int) -> int:
    """Shared memory that a block may have on CUDA device ``index``, in bytes."""
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.shared_memory_per_block_optin


def pointer(x: Tensor | None) -> int:
    """The address of the first element, or 0."""
    return 0 if x is None else x.data_ptr()
