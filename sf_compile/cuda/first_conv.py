"""Host side of csrc/first_conv.cu: a network's first convolution, from a picture of 1 to 4 channels.

Reads a finished picture in any layout, pads it on the way in, and writes channels_last with the statistics
of what it writes. Float32 is multiplied in TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import activation, hopper
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import DTYPES, PADS, multiprocessors, pointer
from sf_compile.cuda.loader import load
from sf_compile.cuda.packing import packed
from sf_compile.cuda.tensor_maps import channels_last_map
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent, empty_image

SOURCE = "first_conv.cu"
KERNELS = (3, 5, 7, 9)
GROUP = 32
"""Output channels of a block."""

_MAXIMUM = 2**31


class Form(NamedTuple):
    """How the pixels of a dtype make a unit of work, as csrc/first_conv.cu has it."""

    itemsize: int
    adjacent: int
    """Pixels of a column of the product: 16 bytes, of 4 channels each."""
    slots: int
    """Rows in the ring."""
    boxes: dict[int, int]
    """For each MMA_N the pixels of one store: whole groups of 8 columns, up to 256, which divide a strip."""
    overhead: int
    """What a unit costs beside its products, in columns of one; an estimate."""

    @property
    def rows(self) -> int:
        """Output rows of a unit."""
        return 2 // self.adjacent

    def strip(self, mma_n: int) -> int:
        """Pixels of a unit in a row."""
        return self.adjacent * mma_n

    def input_rows(self, kernel: int) -> int:
        """Rows that a unit reads."""
        return kernel + self.rows - 1

    def chunks(self, kernel: int) -> int:
        """Chunks of 16 bytes in a row of a window."""
        return (kernel + self.adjacent - 1) // self.adjacent

    def steps(self, kernel: int) -> int:
        """Steps of weights in shared memory: whole ones, and the odd last chunks in every order."""
        rows, chunks = self.input_rows(kernel), self.chunks(kernel)
        return rows * (chunks // 2) + (1 + rows % 2) * (chunks % 2) * ((rows + 1) // 2)

    def shared_bytes(self, kernel: int, mma_n: int) -> int:
        """Dynamic shared memory of a block."""
        staging = 2 * self.rows * self.strip(mma_n) * GROUP * self.itemsize
        ring = self.slots * 4 * self.itemsize * (self.strip(mma_n) + kernel - 1)
        barriers = 8 * (2 * self.slots + 2)
        return 1024 + staging + 2048 * self.steps(kernel) + ring + barriers

    def widths(self, kernel: int) -> list[int]:
        """The values of MMA_N whose blocks have room."""
        room = hopper.SHARED_BYTES - 1024  # for static shared memory, rounded up
        return [mma_n for mma_n in self.boxes if self.shared_bytes(kernel, mma_n) <= room]


SIXTEEN_BIT = Form(2, 2, 16, {128: 128, 184: 16, 200: 80, 240: 96, 256: 128}, 32)
TF32 = Form(4, 1, 12, {128: 64, 184: 184, 192: 96, 200: 200, 240: 120, 256: 128}, 16)
FORMS = {0: TF32, 1: SIXTEEN_BIT, 2: SIXTEEN_BIT}
"""The form for each DTYPE constant."""


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
    picture: int = -1  # the DTYPE that is read, where it is another

    def constants(self) -> dict[str, int]:
        """The compile-time constants."""
        values = {name.upper(): int(value) for name, value in self._asdict().items()}
        picture = self.dtype if self.picture < 0 else self.picture
        box = FORMS[self.dtype].boxes[self.mma_n]
        return {**values, "PARAMETER": self.dtype, "BOX": box, "PICTURE": picture}


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) for TransformerNet and its relatives, of the many that may be asked for."""
    none, relu = activation.IDENTITY, activation.RECTIFIED
    shapes = ((3, 9, 240), (3, 9, 256), (1, 9, 128), (4, 5, 200), (3, 7, 184), (3, 3, 256))
    float_shapes = ((3, 9, 192), (3, 9, 128), (1, 9, 184), (4, 5, 256), (3, 7, 240), (3, 3, 256))
    for dtype in hopper.OPERANDS.values():
        for channels, kernel, mma_n in float_shapes if dtype == 0 else shapes:
            yield SOURCE, Variant(dtype, channels, kernel, mma_n, 2, True, False, none).constants()
        if dtype != 0:
            for mma_n in (240, 256):  # of a picture in float32
                yield SOURCE, Variant(dtype, 3, 9, mma_n, 2, True, False, none, 0).constants()
        widest, wide, seven = (192, 184, 200) if dtype == 0 else (256, 240, 256)
        yield SOURCE, Variant(dtype, 3, 9, widest, 1, False, True, relu).constants()
        yield SOURCE, Variant(dtype, 3, 9, wide, 3, True, True, relu).constants()
        yield SOURCE, Variant(dtype, 3, 7, seven, 2, False, True, activation.LEAKY).constants()


@functools.cache
def _kernel(index: int, variant: Variant, mode: str) -> Kernel:
    signature = "TPPP" + activation.SIGNATURE + hopper.SUMS_SIGNATURE + "qqqi" + "i" * 9
    return load(SOURCE, "first_conv", variant.constants(), index, signature, mode)


@functools.cache
def columns(width: int, kernel: int, dtype: int) -> int:
    """MMA_N, the columns of a strip, with which rows of ``width`` pixels waste least."""
    form = FORMS[dtype]
    return min(form.widths(kernel), key=lambda n: (-(-width // form.strip(n)) * (n + form.overhead), n))


def units(a: Arguments) -> tuple[int, int, int]:
    """MMA_N, the strips of a row and the units of work of a group of channels."""
    height, width = output_size(a)
    dtype = hopper.OPERANDS[a.dtype]
    form, mma_n = FORMS[dtype], columns(width, a.weight.shape[2], dtype)
    strips = -(-width // form.strip(mma_n))
    return mma_n, strips, a.input.shape[0] * strips * -(-height // form.rows)


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
    # A unit of work is at least one pixel; offsets within an input row and padded sizes are 32-bit.
    if units(a)[-1] >= _MAXIMUM:
        return "the picture has too many rows"
    if a.input.shape[3] * a.input.stride(3) >= _MAXIMUM:
        return "the pixels of a row lie too far apart"
    return None


def pack(weight: Tensor) -> Tensor:
    """``weight`` as ``arranged`` has it for its dtype, float32 rounded to TF32."""
    return arranged(tf32.rounded(weight), FORMS[hopper.OPERANDS[weight.dtype]])


def arranged(weight: Tensor, form: Form) -> Tensor:
    """``weight`` (O, C, K, K) as (groups of 32 channels, steps, 2 chunks, 64 rows, pixels x 4 channels).

    Row 32 p + o of a chunk is channel o for output p of a column: a pixel of the pair, or its pixel in one of
    two rows. The steps: two chunks of an input row, row by row; then, where rows have an odd number of
    chunks, the last chunks of the rows (0, 1), (2, 3), ... and, of an odd number of rows, behind zeros, of
    the last one, for a unit whose first row has an even slot; and then, of an odd number of rows, those of
    the rows (1, 2), (3, 4), ... and of row 0, for an odd slot.
    """
    out_channels, channels, kernel, _ = weight.shape
    groups, count, chunks = -(-out_channels // GROUP), form.input_rows(kernel), form.chunks(kernel)
    windows = weight.new_zeros(2, groups * GROUP, 4, count, chunks * form.adjacent)
    for output in (0, 1):
        y, x = (0, output) if form.rows == 1 else (output, 0)
        windows[output, :out_channels, :channels, y : y + kernel, x : x + kernel] = weight
    rows = windows.view(2, groups, GROUP, 4, count, chunks, form.adjacent).permute(1, 4, 5, 0, 2, 6, 3)
    rows = rows.reshape(groups, count, chunks, 2 * GROUP, 4 * form.adjacent)

    def whole_steps(chunks: Tensor) -> Tensor:
        return chunks.reshape(groups, -1, 2, 2 * GROUP, 4 * form.adjacent)

    parts = [whole_steps(rows[:, :, : chunks // 2 * 2])]
    if chunks % 2:
        last = rows[:, :, -1]
        if count % 2 == 0:
            parts.append(whole_steps(last))
        else:
            for first, alone in ((0, kernel - 1), (1, 0)):
                parts.append(whole_steps(last[:, first : first + kernel - 1]))
                parts.append(whole_steps(torch.stack((torch.zeros_like(last[:, alone]), last[:, alone]), 1)))
    return torch.cat(parts, 1)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d`` of arguments that were not refused."""
    n, channels, height, width = a.input.shape
    out_channels = a.weight.shape[0]
    left, _, top, _ = a.padding
    out_height, out_width = output_size(a)
    out = empty_image((n, out_channels, out_height, out_width), a.input, True, a.dtype)
    mean, variance = hopper.statistics_outputs(a)
    dtype, kernel = hopper.OPERANDS[a.dtype], a.weight.shape[2]
    mma_n, strips, count = units(a)
    variant = Variant(
        dtype, channels, kernel, mma_n,
        PADS[a.padding_mode], a.statistics, a.bias is not None, activation.code(a.output_activation),
        -1 if a.input.dtype == a.dtype else DTYPES[a.input.dtype],
    )  # fmt: skip
    groups = -(-out_channels // GROUP)
    index = a.input.device.index
    blocks = min(count, multiprocessors(index) // groups)
    weights = packed(a.weight, "first_conv", pack)
    box = (GROUP, 1, FORMS[dtype].boxes[mma_n])
    _kernel(index, variant, weights.launch_mode).launch(
        (groups * blocks, 1, 1), 384, FORMS[dtype].shared_bytes(kernel, mma_n),
        (channels_last_map(out.data_ptr(), out.dtype, tuple(out.shape), box, 1), pointer(a.input),
         weights.weight.data_ptr(), pointer(a.bias), activation.arguments(a.output_activation),
         *hopper.sums_arguments(a, mean, variance),
         *a.input.stride(), n, height, width, out_channels, out_height, out_width, top, left, strips),
    )  # fmt: skip
    return out, mean, variance, absent(a.input, a.dtype)
