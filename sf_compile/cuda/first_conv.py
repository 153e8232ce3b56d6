"""Host side of csrc/first_conv.cu: a network's first convolution, from a picture of 1 to 4 channels.

Reads a finished picture in any layout, pads it on the way in, and writes channels_last with the statistics
of what it writes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile.cuda import activation, hopper
from sf_compile.cuda.launcher import Kernel, load
from sf_compile.cuda.layout import PADS, multiprocessors, pointer
from sf_compile.cuda.packing import packed
from sf_compile.cuda.tensor_maps import channels_last_map
from sf_compile.ops.conv2d import Arguments, absent
from sf_compile.ops.library import empty_image

SOURCE = "first_conv.cu"
KERNELS = (3, 5, 7, 9)
GROUP = 32
"""Output channels of a block."""

BOXES = {128: 128, 184: 16, 200: 80, 240: 96, 256: 128}
"""For each MMA_N the pixels of one store: whole groups of 16, up to 256, which divide a strip of 2 MMA_N."""

_UNIT_OVERHEAD = 32
"""What a unit of work costs beside its products, in columns of one; an estimate."""

_SLOTS = 16
_MAXIMUM = 2**31


class Variant(NamedTuple):
    """What one kernel is compiled for; the names in capitals are its constants."""

    dtype: int
    channels: int
    kernel: int
    mma_n: int
    pad: int
    statistics: bool
    bias: bool
    output_activation: int

    def constants(self) -> dict[str, int]:
        """The compile-time constants."""
        values = {name.upper(): int(value) for name, value in self._asdict().items()}
        return {**values, "PARAMETER": self.dtype, "BOX": BOXES[self.mma_n]}

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        staging = 2 * 64 * 2 * self.mma_n
        rows = _SLOTS * 8 * (2 * self.mma_n + self.kernel - 1)
        barriers = 8 * (2 * _SLOTS + 2)
        return 1024 + staging + 2048 * steps(self.kernel) + rows + barriers


def steps(kernel: int) -> int:
    """k16 steps of weights in shared memory: whole ones, and both orders of the odd last chunks."""
    chunks = (kernel + 1) // 2
    return kernel * (chunks // 2) + 2 * (chunks % 2) * (kernel // 2 + 1)


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) for TransformerNet and its relatives, of the many that may be asked for."""
    none, relu = activation.IDENTITY, activation.RECTIFIED
    shapes = ((3, 9, 240), (3, 9, 256), (1, 9, 128), (4, 5, 200), (3, 7, 184), (3, 3, 256))
    for dtype in hopper.SIXTEEN_BIT.values():
        for channels, kernel, mma_n in shapes:
            yield SOURCE, Variant(dtype, channels, kernel, mma_n, 2, True, False, none).constants()
        yield SOURCE, Variant(dtype, 3, 9, 256, 1, False, True, relu).constants()
        yield SOURCE, Variant(dtype, 3, 9, 240, 3, True, True, relu).constants()
        yield SOURCE, Variant(dtype, 3, 7, 256, 2, False, True, activation.LEAKY).constants()


@functools.cache
def _kernel(index: int, variant: Variant, mode: str) -> Kernel:
    signature = "TPPP" + activation.SIGNATURE + hopper.SUMS_SIGNATURE + "qqqi" + "i" * 9
    return load(SOURCE, "first_conv", variant.constants(), index, signature, mode)


@functools.cache
def columns(width: int) -> int:
    """MMA_N, half the pixels of a strip, with which rows of ``width`` pixels waste least."""
    return min(BOXES, key=lambda n: (-(-width // (2 * n)) * (n + _UNIT_OVERHEAD), n))


def output_size(a: Arguments) -> tuple[int, int]:
    """Height and width of the output."""
    left, right, top, bottom = a.padding
    kernel = a.weight.shape[2]
    return a.input.shape[2] + top + bottom - kernel + 1, a.input.shape[3] + left + right - kernel + 1


def refusal(a: Arguments) -> str | None:
    """Why this kernel does not run ``a``; None where it does."""
    reason = hopper.refusal(a)
    if reason is not None:
        return reason
    out_channels, channels, *kernel = a.weight.shape
    if a.normalizes or a.upsample != 1:
        return "only pads on the way in"
    if not a.channels_last:
        return "writes channels_last only"
    if not 1 <= channels <= 4:
        return f"reads 1 to 4 channels, not {channels}"
    if out_channels % 8 or not 8 <= out_channels <= 128:
        return f"writes a multiple of 8 channels up to 128, not {out_channels}"
    if kernel[0] not in KERNELS or kernel[0] != kernel[1]:
        return f"has square kernels of {', '.join(map(str, KERNELS))}, not {kernel[0]} x {kernel[1]}"
    if list(a.stride) != [1, 1]:
        return f"has stride 1, not {list(a.stride)}"
    height, width = output_size(a)
    # A unit of work is at least one pixel; offsets within an input row and padded sizes are 32-bit.
    if a.input.shape[0] * height * -(-width // (2 * columns(width))) >= _MAXIMUM:
        return "the picture has too many rows"
    if a.input.shape[3] * a.input.stride(3) >= _MAXIMUM:
        return "the pixels of a row lie too far apart"
    return None


def pack(weight: Tensor) -> Tensor:
    """``weight`` (O, C, K, K) as (groups of 32 channels, steps, 2 chunks, 64 rows, 2 pixels x 4 channels).

    Row 32 p + o of a chunk is channel o for pixel p of a pair. The steps: two chunks of an input row, row by
    row; then, where rows have an odd number of chunks, the last chunks of the rows (0, 1), (2, 3), ... and,
    behind zeros, of the last row, for a unit whose first row has an even slot; then those of the rows (1, 2),
    (3, 4), ... and of row 0, for an odd one.
    """
    out_channels, channels, kernel, _ = weight.shape
    groups, chunks = -(-out_channels // GROUP), (kernel + 1) // 2
    windows = weight.new_zeros(2, groups * GROUP, 4, kernel, kernel + 1)
    for pixel in (0, 1):
        windows[pixel, :out_channels, :channels, :, pixel : pixel + kernel] = weight
    rows = windows.view(2, groups, GROUP, 4, kernel, chunks, 2).permute(1, 4, 5, 0, 2, 6, 3)
    rows = rows.reshape(groups, kernel, chunks, 2 * GROUP, 8)
    parts = [rows[:, :, : chunks // 2 * 2].reshape(groups, -1, 2, 2 * GROUP, 8)]
    if chunks % 2:
        last = rows[:, :, -1]
        for first, alone in ((0, kernel - 1), (1, 0)):
            parts.append(last[:, first : first + kernel - 1].reshape(groups, -1, 2, 2 * GROUP, 8))
            parts.append(torch.stack((torch.zeros_like(last[:, alone]), last[:, alone]), 1)[:, None])
    return torch.cat(parts, 1)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d`` of arguments that were not refused."""
    n, channels, height, width = a.input.shape
    out_channels = a.weight.shape[0]
    left, _, top, _ = a.padding
    out_height, out_width = output_size(a)
    out = empty_image((n, out_channels, out_height, out_width), a.input, True)
    mean, variance = hopper.statistics_outputs(a)
    variant = Variant(
        hopper.SIXTEEN_BIT[a.input.dtype], channels, a.weight.shape[2], columns(out_width),
        PADS[a.padding_mode], a.statistics, a.bias is not None, activation.code(a.output_activation),
    )  # fmt: skip
    strips = -(-out_width // (2 * variant.mma_n))
    groups = -(-out_channels // GROUP)
    index = a.input.device.index
    blocks = min(n * strips * out_height, multiprocessors(index) // groups)
    weights = packed(a.weight, "first_conv", pack)
    box = (GROUP, 1, BOXES[variant.mma_n])
    _kernel(index, variant, weights.launch_mode).launch(
        (groups * blocks, 1, 1), 384, variant.shared_bytes(),
        (channels_last_map(out.data_ptr(), out.dtype, tuple(out.shape), box, 1), pointer(a.input),
         weights.weight.data_ptr(), pointer(a.bias), activation.arguments(a.output_activation),
         *hopper.sums_arguments(a, mean, variance),
         *a.input.stride(), n, height, width, out_channels, out_height, out_width, top, left, strips),
    )  # fmt: skip
    return out, mean, variance, absent(a.input, a.input.dtype)
