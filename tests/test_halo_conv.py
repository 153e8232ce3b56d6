"""csrc/halo_conv.cu on the CPU: packed weights, borders, shared memory and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sf_compile.cuda import halo_conv, halo_variant, hopper
from sf_compile.cuda.halo_variant import Variant
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.subpixel import subpixel_weights

TILE = (8, 32)  # as in the source: rows, columns
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}
COUNTS = list(itertools.product((8, 16, 24, 32, 64, 128), (8, 16, 32, 40, 64, 128)))


def variant(channels: int, out_channels: int, kernel: tuple[int, int] = (3, 3), **changes) -> Variant:
    plain = Variant(
        1, 1, channels, out_channels, *kernel, stride=1, subpixel=False, pad=2, activation=1, transform=True,
        statistics=True, bias=False, output_activation=0,
    )  # fmt: skip
    return plain._replace(**changes)


# ---- packed weights ----------------------------------------------------------------------------------------


def products(v: Variant, packed: Tensor, padded: Tensor) -> list[Tensor]:
    """What the packed weights of each row block make of a padded picture (C, H, W): (64, rows, columns)."""
    taps_y, taps_x = v.taps
    width = 4 if v.dtype == 0 else 8  # channels in 16 bytes
    shape = (v.row_blocks, v.depth, taps_y * taps_x, v.slot_channels // width, 64, width)
    assert packed.shape == shape and packed.is_contiguous()
    z = torch.zeros(v.depth * v.slot_channels, *padded.shape[1:], dtype=padded.dtype)
    z[: v.channels] = padded
    results = []
    for block in packed:
        rows = torch.zeros(64, v.depth * v.slot_channels, taps_y, taps_x, dtype=packed.dtype)
        for slot, tap, chunk in itertools.product(*(range(n) for n in shape[1:4])):
            first = slot * v.slot_channels + width * chunk
            rows[:, first : first + width, tap // taps_x, tap % taps_x] = block[slot, tap, chunk]
        assert not rows[:, v.channels :].any(), "channels that do not exist"
        results.append(F.conv2d(z[None], rows, stride=v.stride)[0])
    return results


@pytest.mark.parametrize("dtype", [0, 1], ids=["float32", "sixteen-bit"])
@pytest.mark.parametrize(("channels", "out_channels"), COUNTS)
def test_packed_weights_of_a_plain_convolution(channels, out_channels, dtype):
    for kernel, stride in (((3, 3), 1), ((1, 1), 1), ((3, 5), 1), ((3, 3), 2), ((4, 4), 2)):
        v = variant(channels, out_channels, kernel, stride=stride, dtype=dtype)
        # Whole numbers, so that float64 is exact in any order.
        weight = torch.randint(-9, 10, (out_channels, channels, *kernel)).double()
        padded = torch.randint(-9, 10, (channels, 7, 9)).double()
        out = torch.cat(products(v, halo_variant.pack(v, weight), padded))
        assert torch.equal(out[:out_channels], F.conv2d(padded[None], weight, stride=stride)[0])
        assert not out[out_channels:].any()


def enlarged_by(v: Variant, packed: Tensor, padded: Tensor) -> Tensor:
    """What a sub-pixel form's packed weights make of a picture (C, H, W) padded by 1: (O, 2 H, 2 W)."""
    out_channels, height, width = v.out_channels, padded.shape[1] - 2, padded.shape[2] - 2
    shared_y, shared_x = out_channels <= 16, out_channels <= 32  # parities that share a row block
    assert v.phase_rows == (16 if shared_y else 32 if shared_x else -(-out_channels // 64) * 64)
    out = torch.full((out_channels, 2 * height, 2 * width), float("nan"), dtype=torch.float64)
    for block, product in enumerate(products(v, packed, padded)):
        for row in range(0, 64, min(v.phase_rows, 64)):
            phase, channel = divmod(block * 64 + row, v.phase_rows)
            p, q = divmod(phase, 2)
            # Windows begin at (y - 1, x - 1) where parities share a row block, else at (y - 1 + p, ...);
            # then the odd parity's are the rows 2 y - 1, over one more window.
            y0, y1 = (0 if shared_y else p), height + shared_y
            x0, x1 = (0 if shared_x else q), width + shared_x
            windows = product[row : row + min(v.phase_rows, out_channels - channel), y0:, x0:]
            for y, x_ in itertools.product(range(y1), range(x1)):
                to_y = 2 * y + (-p if shared_y else p)
                to_x = 2 * x_ + (-q if shared_x else q)
                if 0 <= to_y < 2 * height and 0 <= to_x < 2 * width:
                    to = out[channel : channel + len(windows), to_y, to_x]
                    assert to.isnan().all(), "each output pixel is written once"
                    to.copy_(windows[:64, y, x_])
    return out


@pytest.mark.parametrize("dtype", [0, 1], ids=["float32", "sixteen-bit"])
@pytest.mark.parametrize(("channels", "out_channels"), COUNTS)
def test_packed_weights_of_an_enlarging_convolution(channels, out_channels, dtype):
    v = variant(channels, out_channels, subpixel=True, dtype=dtype)
    weight = torch.randint(-9, 10, (out_channels, channels, 3, 3)).double()
    x = torch.randint(-9, 10, (1, channels, 5, 6)).double()
    enlarged = F.interpolate(x, scale_factor=2.0)
    for mode in MODES:
        # Reflecting the enlarged picture by a pixel is replicating the small one's.
        padded = F.pad(x, [1] * 4, mode=MODES["replicate" if mode == "reflect" else mode])[0]
        out = enlarged_by(v, halo_variant.pack(v, weight), padded)
        exact = F.conv2d(F.pad(enlarged, [1] * 4, mode=MODES[mode]), weight)[0]
        assert torch.equal(out, exact)


def test_summed_weights_are_rounded_once():
    weight = (torch.randn(16, 8, 3, 3) * 100).half()
    exact = subpixel_weights(weight.double())
    summed = subpixel_weights(weight)
    assert summed.dtype == torch.float16 and torch.equal(summed, exact.half())
    corners = (summed[0, ..., 0, 0], summed[1, ..., 0, 1], summed[2, ..., 1, 0], summed[3, ..., 1, 1])
    for corner, original in zip(corners, ((0, 0), (0, 2), (2, 0), (2, 2)), strict=True):
        assert torch.equal(corner, weight[..., original[0], original[1]])


# ---- borders -----------------------------------------------------------------------------------------------


def mirrored(at: int, size: int, mode: str) -> int:
    if mode == "reflect":
        return -at if at < 0 else 2 * size - 2 - at if at >= size else at
    return min(max(at, 0), size - 1)


def halo(first: int, size: int, extent: int, taps: int, mode: str) -> list[int | None]:
    """The source pixels in one row or column of a slot after the kernel has filled its border; None: zero.

    A slot holds ``extent`` pixels from ``first`` on, zeros outside the picture as the copy engine fills them.
    """
    fetched = [first + i if 0 <= first + i < size else None for i in range(extent)]
    held = list(fetched)
    before = max(-first, 0)
    for line in range(before + min(max(first + extent - size, 0), taps - 1)):
        at = first + line + (0 if line < before else size - first - before)
        source = mirrored(at, size, mode) - first
        assert 0 <= at - first < extent, "only its own slot is written"
        if mode == "zeros":
            held[at - first] = None
        elif 0 <= source < extent:
            held[at - first] = fetched[source]
    return held


def admitted(kernel: int, stride: int, mode: str, before: int, after: int, size: int) -> bool:
    x = torch.empty(1, 8, size, size, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(8, 8, kernel, kernel, dtype=torch.float16)
    a = Arguments(
        x, weight, None, None, None, None, None, 1e-5, "none", None, 1, [before, after] * 2, mode,
        [stride] * 2, "none", True, False, True,
    )  # fmt: skip
    if size + before + after < kernel or (mode == "reflect" and max(before, after) >= size):
        return False  # the op's own check
    return halo_conv.refusal(a) is None


@pytest.fixture
def as_on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "refusal", lambda a: None)
    monkeypatch.setattr(halo_conv, "multiprocessors", lambda index: 132)


@pytest.mark.usefixtures("as_on_hopper")
@pytest.mark.parametrize("kernel", range(1, 8))
def test_every_admitted_padding_is_found_in_the_tile(kernel):
    """A window that counts sees the padded picture, whatever sizes and paddings are not refused."""
    seen = 0
    cases = itertools.product((1, 2), MODES, range(kernel + 1), range(kernel + 1), (1, 2, 3, 7, 9, 33, 66))
    for stride, mode, before, after, size in cases:
        if not admitted(kernel, stride, mode, before, after, size):
            continue
        seen += 1
        windows = (size + before + after - kernel) // stride + 1
        for tile in TILE:
            for begin in range(0, windows, tile):
                first = begin * stride - before
                extent = (tile - 1) * stride + kernel
                held = halo(first, size, extent, kernel, mode if before or after else "zeros")
                for window in range(min(tile, windows - begin)):
                    for at in range(first + window * stride, first + window * stride + kernel):
                        inside = 0 <= at < size
                        expected = None if mode == "zeros" and not inside else mirrored(at, size, mode)
                        assert held[at - first] == expected, (stride, mode, before, after, size)
    assert seen > (0 if kernel == 1 else 50)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("origin", [-1, 0])
@pytest.mark.parametrize("shared", [False, True])
def test_windows_of_an_enlarging_convolution(mode, origin, shared):
    """The odd parity's windows begin at the pixel itself, the others' a pixel before it."""
    if shared and origin == 0:
        return  # shared windows begin a pixel before
    for size, tile in itertools.product((*range(1, 12), 31, 32, 33, 64, 65), TILE):
        for begin in range(0, size + shared, tile):
            held = halo(begin + origin, size, tile + 1, 2, mode)
            for window in range(min(tile, size + shared - begin)):
                for tap in (0, 1):
                    at = begin + origin + window + tap
                    outside = mode == "zeros" and not 0 <= at < size
                    assert held[window + tap] == (None if outside else mirrored(at, size, mode))


# ---- shared memory -----------------------------------------------------------------------------------------


def layout_bytes(v: Variant, slots: int, streamed: bool) -> int:
    """Where the shared memory of csrc/halo_conv.cu ends, by its own arithmetic."""
    c, size = v.slot_channels, 4 if v.dtype == 0 else 2
    assert c * size in (32, 64), "rows that a swizzle exists for"
    taps_y, taps_x = (2, 2) if v.subpixel else (v.kernel_h, v.kernel_w)
    depth = (v.channels + c - 1) // c
    plane = (TILE[0] + (taps_y - 1) // v.stride) * (TILE[1] + (taps_x - 1) // v.stride) * c * size
    picture = v.stride * v.stride * ((plane + 511) // 512 * 512)
    weights = taps_y * taps_x * 64 * c * size
    slot = picture + (weights if streamed else 0)
    assert slot % 512 == 0, "slots begin with a swizzle pattern"
    stages = 4 * (4 * 8 * 128)
    affines = depth * c * 8
    barriers = 8 * (3 * slots + depth + 1)
    counts = 4 * 3
    return stages + slots * slot + (0 if streamed else depth * weights) + affines + barriers + counts


def test_shared_memory_suffices_and_is_there():
    held = streamed = refused = 0
    sweep = itertools.product(range(8, 1025, 8), range(1, 8), (1, 2), (False, True), (0, 1))
    for channels, kernel, stride, subpixel, dtype in sweep:
        if kernel < stride or (subpixel and (kernel, stride) != (3, 1)):
            continue
        v = variant(channels, 64, (kernel,) * 2, stride=stride, subpixel=subpixel, dtype=dtype)
        memory = v.memory()
        if memory is None:
            refused += 1
            assert layout_bytes(v, 2, True) + 8 * 6 > hopper.SHARED_BYTES
            continue
        assert 2 <= memory.slots <= 8
        assert layout_bytes(v, memory.slots, memory.streamed) <= memory.bytes
        assert memory.bytes <= hopper.SHARED_BYTES == 232_448
        held, streamed = held + (not memory.streamed), streamed + memory.streamed
    assert min(held, streamed, refused) > 100


def test_variants_are_distinct_and_fit():
    made = list(halo_variant.variants())
    assert len(made) == 87 and {source for source, _ in made} == {halo_conv.SOURCE}
    assert len({tuple(sorted(constants.items())) for _, constants in made}) == len(made)
    names = {"SLOT_CHANNELS", "SLOTS", "STREAMED", *(field.upper() for field in Variant._fields)}
    for _, constants in made:
        assert set(constants) == names and all(type(value) is int for value in constants.values())


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_on_hopper")
def test_refusals_name_the_reason():
    def picture(c, h=16, w=32, layout=torch.channels_last):
        return torch.zeros(1, c, h, w).half().contiguous(memory_format=layout)

    def layer(c, o, kernel=(3, 3)):
        return {"input": picture(c), "weight": torch.zeros(o, c, *kernel).half()}

    a = Arguments(
        picture(128), torch.zeros(128, 128, 3, 3).half(), None, None, None, None, None, 1e-5, "none", None,
        1, [1, 1, 1, 1], "reflect", [1, 1], "none", True, False, True,
    )  # fmt: skip
    assert halo_conv.refusal(a) is None
    odd = torch.zeros(128 * 16 * 32 + 1).half()[1:].view(1, 16, 32, 128).permute(0, 3, 1, 2)
    many = torch.empty(3 << 20, 128, 2, 2, dtype=torch.float16, device="meta")
    many = many.contiguous(memory_format=torch.channels_last)
    for change, reason in (
        (layer(12, 16), "multiples of 8"),
        (layer(16, 12), "multiples of 8"),
        ({"channels_last": False}, "not channels_last"),
        ({"input": picture(128, layout=torch.contiguous_format)}, "not channels_last"),
        ({"input": odd}, "not channels_last"),  # 2 bytes off: no tensor map has it
        ({"upsample": 3}, "upsampling by 3"),
        ({"upsample": 2, "padding": [0, 0, 0, 0]}, "3x3 convolution padded by 1"),
        ({"upsample": 2, "stride": [2, 2]}, "3x3 convolution padded by 1"),
        ({**layer(32, 32, (5, 5)), "upsample": 2}, "3x3 convolution padded by 1"),
        ({"stride": [1, 2]}, "stride"),
        ({"stride": [3, 3]}, "stride"),
        ({**layer(32, 32, (1, 1)), "stride": [2, 2], "padding": [0] * 4}, "stride"),  # pixels nobody reads
        (layer(16, 16, (9, 9)), "9x9 kernel"),
        ({"residual": picture(128)}, "finished by a pass of its own"),
        ({"activation": "relu", "keep_input": True}, "finished by a pass of its own"),
        ({"padding": [0, 2, 0, 0]}, "wide"),  # reflected from beyond the last window
        ({"padding": [0, 0, 3, 0], "padding_mode": "zeros"}, "wide"),
        ({**layer(32, 32, (1, 1)), "padding_mode": "zeros"}, "wide"),
        ({**layer(64, 64, (7, 7)), "padding": [3] * 4}, "shared memory"),
        (layer(8, 64 * 133), "multiprocessors"),
        ({"activation": "tanh"}, "in a pass of its own"),
        ({"activation": "relu * 2.0 + 0.0"}, "in a pass of its own"),
        ({"input": many}, "larger than the kernel counts"),
    ):
        refused = halo_conv.refusal(a._replace(**change))
        assert refused is not None and reason in refused, (change.keys(), refused)


def test_refusals_of_every_kernel_of_the_family(monkeypatch):
    x = torch.zeros(1, 16, 8, 8).half().contiguous(memory_format=torch.channels_last)
    vector = torch.ones(16)
    a = Arguments(
        x, torch.zeros(16, 16, 3, 3).half(), None, vector, vector, None, None, 1e-5, "none", None, 1,
        [1, 1, 1, 1], "reflect", [1, 1], "none", True, False, True,
    )  # fmt: skip
    assert "9.0" in halo_conv.refusal(a)
    assert "9.0" in hopper.refusal(a)

    class OnGpu:
        """A tensor that says it is on a GPU."""

        is_cuda, device = True, torch.device("cuda", 0)

        def __init__(self, x: Tensor) -> None:
            self.dtype, self.numel = x.dtype, x.numel

    monkeypatch.setattr(hopper, "available", lambda index: True)
    monkeypatch.setattr(hopper, "usable_or_warn", lambda: True)
    a = a._replace(input=OnGpu(x))
    assert hopper.refusal(a) is None
    for change, reason in (
        ({"input": OnGpu(x.double())}, "torch.float64"),
        ({"precision": "fp32"}, "TF32 is not allowed"),
        ({"input": OnGpu(x[:0])}, "empty"),
        ({"norm_weight": vector.half(), "norm_bias": vector}, "dtype of their own"),
        ({"norm_weight": vector.double()}, "dtype of their own"),
        ({"mean": torch.ones(32)[::2]}, "not contiguous"),
        ({"mean": vector.half(), "variance": vector.half()}, "not float32"),
    ):
        assert reason in hopper.refusal(a._replace(**change))
    monkeypatch.setattr(hopper, "usable_or_warn", lambda: False)
    assert "NVRTC" in hopper.refusal(a)
    monkeypatch.setattr(hopper, "available", lambda index: False)
    assert "9.0" in hopper.refusal(a)
