"""The host side of csrc/residual_trunk.cu: what it refuses, what it launches, and the kernel's indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sf_compile import ops
from sf_compile.cuda import hopper, residual_trunk
from sf_compile.cuda.argument_block import Addresses
from sf_compile.cuda.residual_trunk import Finish, Variant, pack, refusal, variants
from sf_compile.ops.library import CUDA

EPS = 1e-5


def made(n: int = 1, c: int = 64, h: int = 16, w: int = 32, depth: int = 4, dtype=torch.float16) -> list:
    """x, finish, weights and norms of a trunk."""
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    mean, variance = x.float().mean((2, 3)), x.float().var((2, 3), unbiased=False)
    weights = [(torch.randn(c, c, 3, 3) / 24).to(dtype) for _ in range(depth)]
    norms = [(torch.rand(c).to(dtype), torch.randn(c).to(dtype)) for _ in range(depth)]
    return [x, Finish(mean, variance, *norms[0], EPS, True), weights, norms[1:]]


@pytest.fixture
def on_hopper(monkeypatch):
    """CPU tensors are taken for a Hopper GPU's, which has 132 multiprocessors."""
    monkeypatch.setattr(hopper, "runs_on", lambda x: x.dtype in hopper.OPERANDS)
    monkeypatch.setattr(residual_trunk, "multiprocessors", lambda index: 132)


@pytest.mark.parametrize(
    "sizes", [{}, {"c": 128}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}, {"h": 2, "w": 2},
              {"h": 88, "w": 192}, {"h": 81, "w": 177}, {"depth": 20}]
)  # fmt: skip
def test_taken(sizes, on_hopper):
    assert refusal(*made(**sizes)) is None


@pytest.mark.parametrize(
    ("sizes", "why"),
    [({"n": 2}, "2 images"), ({"c": 32}, "32 channels"), ({"dtype": torch.float64}, "needs float16"),
     ({"h": 1}, "no pixel to reflect"), ({"h": 88, "w": 193}, "more tiles"),
     ({"h": 89, "w": 192}, "more tiles"), ({"depth": 22}, "22 convolutions")],
)  # fmt: skip
def test_refused_for_its_sizes(sizes, why, on_hopper):
    assert why in refusal(*made(**sizes))


def test_float32_is_refused_where_it_may_not_be_rounded(on_hopper):
    assert refusal(*made(dtype=torch.float32), "fp32") == "TF32 is not allowed"
    assert refusal(*made(), "fp32") is None  # what the convolutions' precision means for float16


def test_refused_for_its_tensors(on_hopper):
    x, finish, weights, norms = made()
    vector = norms[0][0]
    cases = {
        "channels_last": (x.contiguous(), finish, weights, norms),
        "other than 3x3": (x, finish, [*weights[:3], weights[3][:, :, :1]], norms),
        "in torch.float16": (x, finish, [*weights[:3], weights[3].float()], norms),
        "other channels": (x, finish, weights, [*norms[:2], (vector[:32], vector)]),
        "not contiguous": (x, finish, weights, [*norms[:2], (vector.repeat(2)[::2], vector)]),
        "not float32": (x, finish._replace(mean=finish.mean.double()), weights, norms),
        "dtype of their own": (x, finish, weights, [*norms[:2], (vector.float(), vector)]),
    }
    for why, arguments in cases.items():
        assert why in refusal(*arguments), why
    in_float = [(weight.float(), bias.float()) for weight, bias in norms]
    bare = Finish(None, None, None, None, 1.0, True)
    assert refusal(x, bare, weights, in_float) is None
    assert refusal(x, bare, weights, norms) is None


def test_a_cpu_is_refused():
    assert "compute capability 9.0" in refusal(*made())


def test_every_variant_fits_a_block():
    for _, constants in variants():
        variant = Variant(**{name.lower(): value for name, value in constants.items()})
        assert variant.shared_bytes <= hopper.SHARED_BYTES
        assert variant.threads * 168 <= 65536


def test_what_the_docs_say_of_float32():
    """docs/kernels.md: of 128 channels six stages of 36, and 28 KiB of z's halo."""
    variant = Variant.of(0, 0, 128, True)
    products = 9 * 128 * 4 // 32  # of 32 bytes of channels
    assert variant.stages == 6 and products // residual_trunk._STAGE_STEPS == 36
    tile = 128 * 4 // 64 * PLANE_BYTES
    ring = variant.stages * (variant.stage_bytes + 16)
    assert variant.shared_bytes - tile - ring - 8 * 128 - 512 == 28 * 1024


# ---- below the op ------------------------------------------------------------------------------------------


def test_a_table_of_addresses():
    table = Addresses.of([3, 0, 5])
    assert len(table) == 512 and table.addresses == (3, 5)
    assert np.frombuffer(table, np.uint64).tolist() == [3, 0, 5] + [0] * 61


def test_below_the_dispatcher_a_refused_trunk_is_its_layers(monkeypatch):
    x, finish, weights, norms = made()
    seen = []

    def layer(*a):
        seen.append(a)
        return ops.conv2d(*a)

    arguments = (x, *finish[:5], "relu", weights, *map(list, zip(*norms, strict=True)), EPS)
    run = CUDA["residual_trunk"]
    ours = type(run)(run.func, layer)(*arguments)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, ops.residual_trunk(*arguments), strict=True))


# ---- the kernel's indices, in Python -----------------------------------------------------------------------

ROWS, COLUMNS = 8, 16  # of a tile
PLANE_H, PLANE_W = ROWS + 2, COLUMNS + 2
PLANE_BYTES = -(-PLANE_H * PLANE_W * 64 // 512) * 512


def offset_in_tile(row: int, column: int, chunk: int) -> int:
    pixel = column * PLANE_H + row
    return chunk // 4 * PLANE_BYTES + pixel * 64 + ((chunk % 4 ^ (pixel >> 1 & 3)) << 4)


def reflected(at: int, size: int) -> int:
    return -at if at < 0 else 2 * size - 2 - at if at >= size else at


def needed(begin: int, count: int, size: int) -> int:
    mirrored = (2 if begin == 0 else 0) | (1 << count - 2 if begin + count == size and count > 1 else 0)
    return 1 | 1 << count - 1 | mirrored


def halo_cells(rows: int, columns: int) -> list[tuple[int, int]]:
    cells = []
    for i in range(2 * PLANE_W + 2 * ROWS):
        if i < 2 * PLANE_W:
            cells.append((0 if i < PLANE_W else rows + 1, i % PLANE_W))
        else:
            i -= 2 * PLANE_W
            cells.append((PLANE_H if i % ROWS + 1 > rows else i % ROWS + 1, 0 if i < ROWS else columns + 1))
    return [(row, column) for row, column in cells if row <= rows + 1 and column <= columns + 1]


def tiles_of(h: int, w: int) -> list[tuple[int, int, int, int]]:
    tiles_x, tiles = residual_trunk._grid(h, w)
    corners = [(tile // tiles_x * ROWS, tile % tiles_x * COLUMNS) for tile in range(tiles)]
    return [(y, x, min(ROWS, h - y), min(COLUMNS, w - x)) for y, x in corners]


@pytest.mark.parametrize(("h", "w"), [(2, 2), (9, 17), (13, 9), (16, 33), (37, 53), (10, 18)])
def test_halos_are_whole_and_of_published_pixels(h, w):
    published = set()
    for y, x, rows, columns in tiles_of(h, w):
        needed_rows, needed_columns = needed(y, rows, h), needed(x, columns, w)
        inside = [(r, c) for r in range(rows) for c in range(columns)]
        published |= {(y + r, x + c) for r, c in inside if needed_rows >> r & 1 or needed_columns >> c & 1}
    for y, x, rows, columns in tiles_of(h, w):
        cells = halo_cells(rows, columns)
        around = {(r, c) for r in range(rows + 2) for c in range(columns + 2)}
        inner = {(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)}
        assert len(cells) == len(set(cells)) and set(cells) == around - inner
        assert {(reflected(y - 1 + r, h), reflected(x - 1 + c, w)) for r, c in cells} <= published


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels", residual_trunk.CHANNELS)
def test_packed_weights_times_a_tile_are_the_convolution(channels, dtype):
    """The operands' addresses as csrc/residual_trunk.cu gives them to the tensor cores, and their swizzle."""
    picture = torch.randint(-3, 4, (1, channels, PLANE_H, PLANE_W)).to(dtype)
    weight = torch.randint(-3, 4, (channels, channels, 3, 3)).to(dtype)
    size = dtype.itemsize
    each = 16 // size  # channels of a chunk
    tile = np.zeros(channels // each // 4 * PLANE_BYTES // size, picture.numpy().dtype)
    for row in range(PLANE_H):
        for column in range(PLANE_W):
            for chunk in range(channels // each):
                at = offset_in_tile(row, column, chunk) // size
                tile[at : at + each] = picture[0, each * chunk : each * (chunk + 1), row, column]
    stream = pack(weight).reshape(-1).numpy()
    out, pixel, k = np.arange(channels), np.arange(ROWS * COLUMNS), np.arange(2 * each)
    total = np.zeros((channels, ROWS * COLUMNS), np.float32)
    for step in range(9 * channels // (2 * each)):
        plane, half, tap = step // 18, step % 18 // 9, step % 9
        start = plane * PLANE_BYTES + (tap % 3 * PLANE_H + tap // 3) * 64 + half * 32
        column = (pixel // 8 * PLANE_H * 64 + pixel % 8 * 64)[:, None] + k // each * 16 + start
        column ^= (column >> 7 & 3) << 4
        row = step * channels * 32 + (out // 64 * 2048 + out % 64 // 8 * 128 + out % 8 * 16)[:, None]
        a = stream[(row + k // each * 1024) // size + k % each]
        total += a.astype(np.float32) @ tile[column // size + k % each].astype(np.float32).T
    ours = total.reshape(channels, COLUMNS, ROWS).transpose(0, 2, 1)
    wanted: Tensor = F.conv2d(picture.float(), weight.float())[0]
    assert np.array_equal(ours, wanted.numpy())


def test_float32_weights_are_rounded_to_tf32():
    weight = torch.randn(64, 64, 3, 3)
    stream = pack(weight)
    assert (weight.view(torch.int32) & 0x1FFF).any()
    assert not (stream.view(torch.int32) & 0x1FFF).any()
    assert (stream.sum() - weight.sum()).abs() < 1e-4 * weight.abs().sum()
