"""Host side of csrc/picture.cu: bytes to a network's numbers, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import DTYPES, pointer
from sf_compile.cuda.loader import load
from sf_compile.ops import reference

SOURCE = "picture.cu"
PLANES, PIXELS, STRIDED = 0, 1, 2
_CHANNELS = 3
_THREADS = 256
_GROUP = 4  # pixels of a thread
_SIGNATURES = {"picture_to_float": "PPiiiiiiffii", "picture_to_uint8": "PPPqqqqiiiiffii"}


def constants(dtype: torch.dtype, layout: int) -> dict[str, int]:
    """The compile-time constants of the kernels for one dtype and layout of the numbers."""
    return {"DTYPE": DTYPES[dtype], "PARAMETER": DTYPES[dtype], "LAYOUT": layout}


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (source, constants) that the two ops can ask for."""
    for dtype in DTYPES:
        for layout in (PLANES, PIXELS, STRIDED):
            yield SOURCE, constants(dtype, layout)


@functools.cache
def _kernel(index: int, entry: str, dtype: torch.dtype, layout: int) -> Kernel:
    return load(SOURCE, entry, constants(dtype, layout), index, _SIGNATURES[entry])


def _usable(numbers: torch.dtype, channels: int, pixels: int) -> bool:
    return channels == _CHANNELS and numbers in DTYPES and 0 < pixels < 2**30 and usable_or_warn()


def _launch(kernel: Kernel, count: int, arguments: Sequence[int | float]) -> None:
    kernel.launch((-(-count // _THREADS), 1, 1), _THREADS, 0, arguments)


def picture_to_float(
    input: Tensor, size: Sequence[int], dtype: torch.dtype, low: float, high: float, channels_last: bool
) -> Tensor:
    """``styleforge::picture_to_float``; its arguments have been checked."""
    n, height, width, channels = input.shape
    out_height, out_width = size
    if not _usable(dtype, channels, n * out_height * out_width) or input.numel() == 0:
        return reference.picture_to_float(input, size, dtype, low, high, channels_last)
    input = input.contiguous()
    out = torch.empty(
        (n, channels, out_height, out_width), dtype=dtype, device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    groups = -(-out_width // _GROUP)
    count = n * out_height * groups
    words = width % _GROUP == 0 and input.data_ptr() % 4 == 0
    kernel = _kernel(input.device.index, "picture_to_float", dtype, PIXELS if channels_last else PLANES)
    _launch(kernel, count, (
        pointer(input), pointer(out), height, width, out_height, out_width, count, groups, high - low, low,
        int(words), int(out_width % _GROUP == 0),
    ))  # fmt: skip
    return out


def picture_to_uint8(input: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """``styleforge::picture_to_uint8``; its arguments have been checked."""
    n, channels, height, width = input.shape
    if not _usable(input.dtype, channels, n * height * width):
        return reference.picture_to_uint8(input, low, high)
    out = torch.empty((n, height, width, channels), dtype=torch.uint8, device=input.device)
    broken = torch.zeros((n,), dtype=torch.int32, device=input.device)
    layout, vectors = _layout(input)
    groups = -(-width // _GROUP)
    count = n * height * groups
    kernel = _kernel(input.device.index, "picture_to_uint8", input.dtype, layout)
    _launch(kernel, count, (
        pointer(input), pointer(out), pointer(broken), *input.stride(), height, width, count, groups, low,
        255 / (high - low), int(width % _GROUP == 0), int(vectors),
    ))  # fmt: skip
    return out, broken


def _layout(input: Tensor) -> tuple[int, bool]:
    """The kernels' layout of ``input``, and whether every four pixels of a row can be read as vectors."""
    by_image, by_channel, by_row, by_column = input.stride()
    aligned = input.data_ptr() % (_GROUP * input.element_size()) == 0 and input.shape[3] % _GROUP == 0
    if by_column == 1:
        return PLANES, aligned and not (by_image | by_channel | by_row) % _GROUP
    if by_channel == 1 and by_column == _CHANNELS:
        return PIXELS, aligned and not (by_image | by_row) % _GROUP
    return STRIDED, False
