"""Host side of csrc/halo_conv.cu: convolutions of channels_last pictures on Hopper's tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import activation, hopper
from sf_compile.cuda.launcher import Kernel, load
from sf_compile.cuda.layout import PADS, is_channels_last, multiprocessors, pointer
from sf_compile.cuda.packing import packed
from sf_compile.cuda.tensor_maps import TensorMap, channels_last_map
from sf_compile.ops.conv2d import Arguments, absent
from sf_compile.ops.library import empty_image
from sf_compile.ops.quantization import quantized_weights, taps_of

SOURCE = "halo_conv.cu"
_THREADS = 384
_TILE_H, _TILE_W = 8, 32
_ROUND = {0: 2, 1: 4, 2: 4}  # columns of a tile that are stored at a time, by DTYPE
_ACTIVATIONS = 2 * activation.SIGNATURE  # of the input, of the output
_SIGNATURE = "P" + hopper.NORM_SIGNATURE + _ACTIVATIONS + "PP" + hopper.SUMS_SIGNATURE + "iiiiiiiiiqq"
_MOST_SLOTS = 8
_STAGES_BYTES = 4 * 4096
_RECIPROCAL = 1 << 42
QUANTIZED = {torch.int8: 1, torch.uint8: 2}
"""The value of QUANTIZED for an input of 8-bit integers."""
_MOST_TILES = 1 << 21  # of a launch: what the kernel divides by a reciprocal


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
        return _TILE_H + (rows - 1) // self.stride, _TILE_W + (columns - 1) // self.stride

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


def _variant(a: Arguments) -> Variant:
    # Of an input that is yet to be rounded, what it is rounded to makes no difference to what fits.
    quantized = QUANTIZED.get(a.input.dtype, int(a.input_scale is not None))
    subpixel = a.upsample == 2 or a.transposed
    # The windows of the sub-pixel form are alike whatever the kernel: one variant for all.
    kh, kw, stride = (3, 3, 1) if subpixel else (a.weight.shape[2], a.weight.shape[3], a.stride[0])
    # A window of a transposed convolution may lie outside with taps of which the kernel has none.
    pad = PADS[a.padding_mode] if any(a.padding) or a.transposed else 0
    if subpixel and pad == PADS["reflect"]:
        pad = PADS["replicate"]  # what reflecting the enlarged picture by one pixel comes to
    return Variant(
        hopper.OPERANDS[a.dtype], hopper.parameter(a) or 0, a.input.shape[1], a.out_channels,
        kh, kw, stride, subpixel, pad, activation.code(a.activation), a.normalizes and not quantized,
        a.statistics, a.bias is not None, activation.code(a.output_activation), quantized,
    )  # fmt: skip


def _usable_picture(x: Tensor) -> bool:
    return is_channels_last(x) and x.data_ptr() % 16 == 0


def refusal(a: Arguments) -> str | None:
    """Why this kernel does not run ``a``; None where it does."""
    reason = hopper.refusal(a)
    if reason is not None:
        return reason
    reason = activation.refusal(a.activation)
    if reason is not None:
        return reason
    n, c, h, w = a.input.shape
    o, (kh, kw) = a.out_channels, a.weight.shape[2:]
    left, right, top, bottom = a.padding
    stride = 1 if a.transposed else a.stride[0]  # of the windows
    if c % 8 or o % 8 or o == 0:
        return f"{c} -> {o} channels: whole 16-byte accesses need multiples of 8"
    if a.input_scale is not None and c % 16:
        return f"{c} channels of 8-bit integers: whole 16-byte accesses need multiples of 16"
    if not a.channels_last or not _usable_picture(a.input):
        return "the picture is not channels_last"
    if a.residual is not None or a.keep_input:
        return "a residual, or an input that is kept, is finished by a pass of its own"
    if a.transposed:
        if a.upsample != 1 or tuple(a.stride) != (2, 2):
            return f"a transposed convolution of stride {tuple(a.stride)}, upsampling by {a.upsample}"
        if not (_sees_two(kh, top, bottom) and _sees_two(kw, left, right)):
            return f"a transposed {kh}x{kw} convolution padded by {tuple(a.padding)}"
    elif a.upsample == 2:
        if (kh, kw) != (3, 3) or tuple(a.stride) != (1, 1) or tuple(a.padding) != (1, 1, 1, 1):
            return "an upsampling other than by 2, followed by a 3x3 convolution padded by 1"
    elif a.upsample != 1:
        return f"upsampling by {a.upsample}"
    elif tuple(a.stride) not in ((1, 1), (2, 2)) or min(kh, kw) < stride:
        return f"stride {tuple(a.stride)} of a {kh}x{kw} kernel"
    elif max(kh, kw) > 7:
        return f"a {kh}x{kw} kernel"
    # A mirrored pixel has to lie in the tile that needs it.
    if a.upsample == 1 and not a.transposed:
        reflects = a.padding_mode == "reflect"
        far = 2 if reflects else 1
        if top >= kh or left >= kw or far * bottom > kh - 1 or far * right > kw - 1:
            return f"a padding of {tuple(a.padding)} is wide for a {kh}x{kw} kernel"
    variant = _variant(a)
    memory = variant.memory()
    if memory is None:
        return f"a {kh}x{kw} kernel over {c} channels does not fit into shared memory"
    if variant.row_blocks > multiprocessors(a.input.device.index):
        return f"{o} output channels are more than the GPU has multiprocessors for"
    tiles = n * (h // (_TILE_H * stride) + 2) * (w // (_TILE_W * stride) + 2)
    if tiles > _MOST_TILES or h * w * c >= 2**31:
        return "the picture is larger than the kernel counts"
    return None


def _sees_two(taps: int, before: int, after: int) -> bool:
    """Whether a transposed convolution of stride 2 sees the pixels that the sub-pixel form does.

    Along one axis: of every output pixel of one parity the same two source pixels, and twice as many in all.
    """
    return taps - 3 <= before <= 1 and before + after == taps - 2


@functools.cache
def _kernel(index: int, variant: Variant, mode: str) -> Kernel:
    signature = ("TF" if variant.subpixel else "TT") + _SIGNATURE + ("f" if variant.quantized else "")
    return load(SOURCE, "halo_conv", variant.constants(), index, signature, mode)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; the caller has asked ``refusal``.

    An input of int8 or uint8 is in units of ``input_scale``; of its norm, which was applied, only mean and
    variance are looked at.
    """
    x, index = a.input, a.input.device.index
    n, c, h, w = x.shape
    o, (kh, kw) = a.out_channels, a.weight.shape[2:]
    left, right, top, bottom = a.padding
    variant = _variant(a)
    memory = variant.memory()
    assert memory is not None
    if variant.subpixel:
        out_h, out_w = 2 * h, 2 * w
        windows_y, windows_x = h + int(variant.phase_rows < 32), w + int(variant.phase_rows < 64)
    else:
        out_h = windows_y = (h + top + bottom - kh) // variant.stride + 1
        out_w = windows_x = (w + left + right - kw) // variant.stride + 1
    tiles_x = -(-windows_x // _TILE_W)
    tiles_per_image = tiles_x * -(-windows_y // _TILE_H)
    blocks = min(multiprocessors(index) // variant.row_blocks, n * tiles_per_image) * variant.row_blocks
    out = empty_image((n, o, out_h, out_w), x, True, a.dtype)
    mean, variance = hopper.statistics_outputs(a)
    form = f"halo_conv subpixel={variant.subpixel} slot={variant.slot_channels}"
    pack = functools.partial(_pack, variant)
    scale: tuple[float, ...] = ()
    if variant.quantized:
        assert a.input_scale is not None
        form, pack, scale = f"{form} int8", functools.partial(_pack_integers, variant), (a.input_scale,)
    if a.transposed:
        form += f" transposed {top} {left}"
        pack = functools.partial(_pack_transposed, variant, top, left)
        top = left = 1  # windows begin where those of a picture enlarged by 2 do
    weights = packed(a.weight, form, pack)
    box = (variant.slot_channels, *variant.plane)
    exact = a.normalizes  # rounded to TF32 when it is finished, else by the copy
    kind = torch.uint8 if variant.quantized else x.dtype  # bytes are copied alike whatever they are
    maps = [channels_last_map(x.data_ptr(), kind, (n, c, h, w), box, variant.stride, to_tf32=not exact)]
    box = (min(variant.phase_rows, 64, 128 // variant.element_bytes), _TILE_H, _ROUND[variant.dtype])
    if variant.subpixel:
        pixel = variant.element_bytes * o
        parities = [out.data_ptr() + pixel * (p * out_w + q) for p in (0, 1) for q in (0, 1)]
        shape = (n, o, h, w)
        outputs = [channels_last_map(at, a.dtype, shape, box, spread=2) for at in parities]
        maps.append(TensorMap.joined(outputs))
    else:
        maps.append(channels_last_map(out.data_ptr(), a.dtype, (n, o, out_h, out_w), box))
    _kernel(index, variant, weights.launch_mode).launch(
        (blocks, 1, 1), _THREADS, memory.bytes,
        (
            *maps, weights.weight.data_ptr(), *hopper.norm_arguments(a), activation.arguments(a.activation),
            activation.arguments(a.output_activation),
            out.data_ptr(), pointer(a.bias),
            *hopper.sums_arguments(a, mean, variance), n, h, w, out_h, out_w, top, left, tiles_x,
            tiles_per_image, -(-_RECIPROCAL // tiles_x), -(-_RECIPROCAL // tiles_per_image), *scale,
        ),
    )  # fmt: skip
    return out, mean, variance, absent(x, a.dtype)


def _pack(variant: Variant, weight: Tensor) -> Tensor:
    """Weights (O, C, kh, kw) as (row block, slot, tap, chunk of 16 bytes of channels, 64 rows, channels)."""
    return _rows(variant, subpixel_weights(weight) if variant.subpixel else weight[None])


def _pack_integers(variant: Variant, weight: Tensor) -> Tensor:
    """Weights (O, C, kh, kw) as 8-bit integers in that layout, and behind them each row's scale, as bytes."""
    integers, scales = quantized_weights(taps_of(weight, variant.subpixel))
    rows = scales.new_zeros((len(scales), variant.phase_rows))
    rows[:, : scales.shape[1]] = scales
    return torch.cat((_rows(variant, integers).flatten(), rows.flatten().view(torch.int8)))


def _pack_transposed(variant: Variant, top: int, left: int, weight: Tensor) -> Tensor:
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


def subpixel_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) after a nearest upsampling by 2, as (4, O, C, 2, 2) on the small picture.

    The first index is 2 p + q for output rows of parity p and columns of parity q. Along one axis an even
    output sees source pixels (i - 1, i) with weights (w0, w1 + w2), an odd one (i, i + 1) with (w0 + w1, w2).
    The sums are rounded once.
    """
    rows = _summed(weight.double(), 2)
    return torch.stack([part for row in rows for part in _summed(row, 3)]).to(weight.dtype)


def transposed_weights(weight: Tensor, top: int, left: int) -> Tensor:
    """(C, O, kh, kw) of a transposed convolution of stride 2, as (4, O, C, 2, 2) on its source.

    ``top`` and ``left`` are cut off its result. Indexed as ``subpixel_weights`` are. Along one axis output
    pixel 2 i + p has source pixel i - 1 + p + j times tap before - p + 2 - 2 j: every other one of the four
    taps from before - 1 on, backwards, and those that the kernel does not have are zeros.
    """
    kh, kw = weight.shape[2:]
    four = torch.nn.functional.pad(weight.transpose(0, 1), (1 - left, left + 3 - kw, 1 - top, top + 3 - kh))
    backwards = four.flip(2, 3)
    return torch.stack([backwards[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)])


def _summed(weight: Tensor, dim: int) -> list[Tensor]:
    """Three weights along ``dim`` as the two that an even output sees, and the two that an odd one does."""
    first, second, third = weight.split(1, dim)
    return [torch.cat((first, second + third), dim), torch.cat((first + second, third), dim)]
