"""What csrc/halo_conv.cu is compiled for: its constants, its shared memory, and how its weights lie."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import activation, hopper
from sf_compile.ops.quantization import quantized_weights, taps_of
from sf_compile.subpixel import subpixel_weights, transposed_weights

SOURCE = "halo_conv.cu"
TILE_H, TILE_W = 8, 32
_MOST_SLOTS = 8
_STAGES_BYTES = 4 * 4096
QUANTIZED = {torch.int8: 1, torch.uint8: 2}
"""The value of QUANTIZED for an input of 8-bit integers."""


class Memory(NamedTuple):
    """How a block's shared memory is used: SLOTS and STREAMED of the source, and bytes in all."""

    slots: int
    streamed: bool
    bytes: int


class Variant(NamedTuple):
    """The compile-time constants of one kernel, but for those that follow from the others."""

    dtype: int
    parameter: int
    channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride: int
    subpixel: bool
    pad: int
    activation: int
    transform: bool
    statistics: bool
    bias: bool
    output_activation: int
    quantized: int = 0

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a picture."""
        return 4 if self.dtype == 0 else 2

    @property
    def operand_bytes(self) -> int:
        """Bytes of an element of what is multiplied."""
        return 1 if self.quantized else self.element_bytes

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel that the ring's slots hold: 32 where 64 are too empty, too few or too large."""
        whole = self.channels * self.operand_bytes
        small = whole <= 32 or (self.stride == 2 and whole > 64) or self._memory(64) is None
        return 32 if small else 64

    @property
    def slot_channels(self) -> int:
        """Channels that the ring's slots hold."""
        return self.pixel_bytes // self.operand_bytes

    @property
    def depth(self) -> int:
        """Slots that a tile's input takes."""
        return -(-self.channels // self.slot_channels)

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the convolution as it is computed."""
        return (2, 2) if self.subpixel else (self.kernel_h, self.kernel_w)

    @property
    def phase_rows(self) -> int:
        """Rows of the product for one parity of the output: the output channels, padded."""
        if self.subpixel and self.out_channels <= 32:
            return 16 if self.out_channels <= 16 else 32
        return -(-self.out_channels // 64) * 64

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 rows of the product."""
        return (4 if self.subpixel else 1) * self.phase_rows // 64

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a slot's plane."""
        rows, columns = self.taps
        return TILE_H + (rows - 1) // self.stride, TILE_W + (columns - 1) // self.stride

    def memory(self) -> Memory | None:
        """How a block's shared memory is used; None where it does not suffice."""
        return self._memory(self.pixel_bytes)

    @functools.cache  # noqa: B019 - variants are few and live as long as the process anyway
    def _memory(self, pixel_bytes: int) -> Memory | None:
        """The same with slots of ``pixel_bytes`` a pixel."""
        depth = -(-self.channels * self.operand_bytes // pixel_bytes)
        rows, columns = self.plane
        picture = self.stride**2 * -(-rows * columns * pixel_bytes // 512) * 512
        all_affines = depth * pixel_bytes // self.operand_bytes * 8
        fixed = _STAGES_BYTES + all_affines + 8 * (3 * _MOST_SLOTS + depth + 3)
        room = hopper.SHARED_BYTES - fixed
        for streamed in (False, True):
            weights = self.taps[0] * self.taps[1] * 64 * pixel_bytes * (1 if streamed else depth)
            held, slot = (0, picture + weights) if streamed else (weights, picture)
            slots = min((room - held) // slot, _MOST_SLOTS)
            if slots >= 2:
                return Memory(slots, streamed, held + slots * slot + fixed)
        return None

    def constants(self) -> dict[str, int]:
        """By the names that the kernel source uses."""
        memory = self.memory()
        assert memory is not None
        return {
            **{name.upper(): int(value) for name, value in self._asdict().items()},
            "SLOT_CHANNELS": self.slot_channels, "SLOTS": memory.slots, "STREAMED": int(memory.streamed),
        }  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) of the layers of the networks that this package knows, and of the general path."""
    kinds: list[tuple[int, int, int, int, bool, int, bool, bool, bool, bool, bool]] = [
        # channels, out, kernel, stride, subpixel, pad, relu, transform, statistics, bias, output ReLU
        (32, 64, 3, 2, False, 2, True, True, True, False, False),
        (64, 128, 3, 2, False, 2, True, True, True, False, False),
        (128, 128, 3, 1, False, 2, True, True, True, False, False),
        (128, 128, 3, 1, False, 2, False, False, True, False, False),
        (128, 64, 3, 1, True, 3, False, False, True, False, False),
        (64, 32, 3, 1, True, 3, True, True, True, False, False),
        (16, 32, 3, 2, False, 2, True, True, True, False, False),
        (64, 64, 3, 1, False, 2, True, True, True, False, False),
        (64, 64, 3, 1, False, 2, False, False, True, False, False),
        (64, 32, 3, 1, True, 3, False, False, True, False, False),
        (32, 32, 3, 1, False, 2, False, False, True, False, False),
        (32, 16, 3, 1, True, 3, True, True, True, False, False),
        (16, 8, 3, 1, True, 1, True, True, True, False, False),
        (8, 16, 3, 2, False, 1, True, True, True, False, False),
        (256, 256, 3, 1, False, 2, True, True, True, False, False),
        (256, 256, 3, 1, False, 2, False, False, True, False, False),
        (512, 256, 3, 1, False, 2, False, False, False, True, True),
        (64, 256, 1, 1, False, 0, True, True, True, False, False),
        (24, 40, 5, 1, False, 1, False, False, False, True, True),
        (256, 128, 3, 1, True, 1, False, False, True, False, False),  # transposed
        (128, 64, 3, 1, True, 1, True, True, True, False, False),
        (64, 32, 3, 1, True, 1, True, True, True, False, False),
    ]
    for channels, out, kernel, *rest in kinds:
        for dtype in hopper.OPERANDS.values():
            variant = Variant(dtype, dtype, channels, out, kernel, kernel, *rest)  # type: ignore[arg-type]
            yield SOURCE, variant.constants()
    plain = Variant(1, 1, 64, 64, 3, 3, 1, False, 2, 0, False, False, True, 0)
    normed = plain._replace(transform=True, statistics=True, bias=False)
    yield SOURCE, plain._replace(output_activation=activation.LEAKY).constants()
    yield SOURCE, plain._replace(output_activation=activation.SILU).constants()
    yield SOURCE, normed._replace(activation=activation.LEAKY).constants()
    yield SOURCE, normed._replace(activation=activation.CLAMPED).constants()
    integers = Variant(1, 0, 128, 128, 3, 3, 1, False, 2, 0, False, True, False, 0, 1)
    for channels in (64, 128, 256):
        for quantized in QUANTIZED.values():
            for dtype in hopper.SIXTEEN_BIT.values():
                made = integers._replace(dtype=dtype, channels=channels, out_channels=channels)
                yield SOURCE, made._replace(quantized=quantized).constants()
        halved = integers._replace(channels=channels, out_channels=channels // 2)
        yield SOURCE, halved._replace(subpixel=True, pad=3).constants()
    yield SOURCE, integers._replace(channels=64, stride=2).constants()
    yield SOURCE, integers._replace(pad=1).constants()


def pack(variant: Variant, weight: Tensor) -> Tensor:
    """Weights (O, C, kh, kw) as (row block, slot, tap, chunk of 16 bytes of channels, 64 rows, channels)."""
    return _rows(variant, subpixel_weights(weight) if variant.subpixel else weight[None])


def pack_integers(variant: Variant, weight: Tensor) -> Tensor:
    """Weights (O, C, kh, kw) as 8-bit integers in that layout, and behind them each row's scale, as bytes."""
    integers, scales = quantized_weights(taps_of(weight, variant.subpixel))
    rows = scales.new_zeros((len(scales), variant.phase_rows))
    rows[:, : scales.shape[1]] = scales
    return torch.cat((_rows(variant, integers).flatten(), rows.flatten().view(torch.int8)))


def pack_transposed(variant: Variant, top: int, left: int, weight: Tensor) -> Tensor:
    """Weights (C, O, kh, kw) of a transposed convolution, in the same layout."""
    return _rows(variant, transposed_weights(weight, top, left))


def _rows(variant: Variant, taps: Tensor) -> Tensor:
    """Weights (phase, O, C, rows, columns) of the convolutions as they are computed, in that layout."""
    _, o, c, _, _ = taps.shape
    depth = variant.depth * variant.slot_channels
    rows = taps.new_zeros((len(taps), variant.phase_rows, depth, *taps.shape[3:]))
    rows[:, :o, :c] = taps
    chunk = 16 // variant.operand_bytes
    slot = variant.slot_channels // chunk, chunk
    blocks = tf32.rounded(rows).reshape(variant.row_blocks, 64, variant.depth, *slot, -1)
    return blocks.permute(0, 2, 5, 3, 1, 4).contiguous()
