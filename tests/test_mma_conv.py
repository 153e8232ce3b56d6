"""csrc/mma_conv.cu on the CPU: run by an emulator; how it is cut, packed weights, refusals."""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from emulated_kernel import EmulatedKernel, guarded
from halo_layers import equal
from mma_layers import (
    BARE,
    CASES,
    DOUBLING,
    FIRST,
    HALVING,
    LAST,
    PLAIN,
    PLANAR,
    SKIP,
    WIDE_DOUBLING,
    Layer,
    check,
    made,
)
from torch import Tensor

from sf_compile.cuda import hopper, mma_conv, mma_tiling, mma_variant
from sf_compile.cuda.mma_tiling import Tiling
from sf_compile.ops.conv2d_arguments import Arguments

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")


@pytest.fixture
def emulated(monkeypatch):
    """Launches run on the CPU, on a GPU of two multiprocessors; returns the kernels that were made."""
    kernels: list[EmulatedKernel] = []
    workspaces: dict[int, Tensor] = {}

    def kernel(index, variant, tiling, mode):
        constants = variant.constants(tiling)
        kernels.append(EmulatedKernel(constants, mma_conv._SIGNATURE, seed=17 * len(kernels) + 1))
        return kernels[-1]

    def zeroed(device, purpose, size):
        memory = workspaces.setdefault(size, torch.zeros(size, dtype=torch.uint8))
        assert not memory.any(), "every launch leaves the workspace as it was"
        return memory.data_ptr()

    monkeypatch.setattr(mma_conv, "_kernel", kernel)
    monkeypatch.setattr(mma_conv, "multiprocessors", lambda index: 2)
    monkeypatch.setattr(mma_conv, "shared_bytes", lambda index: mma_variant.SHARED_BYTES["sm_90a"])
    monkeypatch.setattr(hopper, "zeroed", zeroed)
    return kernels


def on_cpu(layer: Layer, size: tuple[int, int, int], dtype: torch.dtype = torch.float16) -> Arguments:
    """Arguments in memory that ends where nothing may be read."""
    a = made(layer, size, dtype, "cpu")
    names = ("input", "residual", "bias", "mean", "variance", "norm_weight", "norm_bias")
    present = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    return a._replace(**{name: guarded(x) for name, x in present.items()})


EMULATED = (
    (PLAIN, (1, 37, 35), torch.float16),
    (SKIP, (2, 20, 19), torch.bfloat16),
    (PLANAR, (3, 11, 22), torch.float16),
    (FIRST, (1, 20, 23), torch.float16),
    (LAST, (1, 17, 20), torch.float16),
    (HALVING, (1, 37, 35), torch.bfloat16),
    (DOUBLING, (1, 9, 10), torch.float16),
    (WIDE_DOUBLING, (2, 17, 18), torch.float16),
    (WIDE_DOUBLING._replace(mode="zeros", bias=True), (1, 1, 16), torch.float16),
    (DOUBLING._replace(out_channels=20), (1, 9, 10), torch.float16),
    (DOUBLING._replace(output=False), (1, 9, 10), torch.float16),
    (Layer(33, 5, (4, 2), (3, 0, 2, 1), "zeros", (1, 2), residual=False), (1, 22, 35), torch.float16),
    (Layer(8, 24, (2, 6), (2, 3, 1, 0), "replicate", bias=True), (1, 12, 19), torch.float16),
    (PLAIN, (1, 37, 35), torch.float32),
    (SKIP, (2, 20, 19), torch.float32),
    (PLANAR, (3, 11, 22), torch.float32),
    (FIRST, (1, 20, 23), torch.float32),
    (LAST, (1, 17, 20), torch.float32),
    (HALVING, (1, 37, 35), torch.float32),
    (DOUBLING, (1, 9, 10), torch.float32),
    (WIDE_DOUBLING, (1, 17, 18), torch.float32),
    (Layer(2, 24, (5, 5), (2, 2, 2, 2), "zeros", bias=True, keep=True), (1, 12, 19), torch.float32),
    (Layer(6, 8, norm="none", relu=False, output_relu=True, output=False), (1, 12, 20), torch.float32),
)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("layer", "size", "dtype"), EMULATED)
def test_the_source_against_float64(layer, size, dtype):
    check(on_cpu(layer, size, dtype))


@needs_compiler
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(32, 2, 4, 2, 3, 3, 2),
        Tiling(64, 1, 4, 1, 4, 1, 3),
        Tiling(32, 4, 4, 1, 1, 3, 0),
        Tiling(32, 1, 2, 1, 8, 3, 2),
        Tiling(64, 2, 2, 1, 6, 1, 3),
    ],
    ids=["ring of chunks", "ring of columns", "resident, two blocks of channels", "8 products", "6 products"],
)
def test_every_way_to_hold_weights(emulated, monkeypatch, tiling):
    """Whatever warps run first: the results are the same bits."""
    monkeypatch.setattr(mma_conv, "fastest", lambda *layer: tiling)
    a = on_cpu(Layer(40, 44), (2, 5, 18))
    results = check(a)
    assert equal(mma_conv.conv2d(a), results)
    assert emulated[0].seed != emulated[1].seed


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("layer", "tiling"),
    [
        (LAST, Tiling(32, 2, 4, 1, 2, 1, 3)),
        (Layer(16, 16, (11, 11), (5, 5, 5, 5)), Tiling(32, 2, 2, 1, 2, 1, 3)),
        (Layer(12, 8, (3, 3), residual=True, keep=True), Tiling(32, 2, 4, 1, 1, 3, 0)),
        (Layer(32, 8, (3, 3), residual=True, keep=True), Tiling(64, 2, 1, 1, 1, 3, 0)),
    ],
    ids=["whole rounds, fewer than steps", "some in no round", "fewer than a round", "a batch beyond"],
)
def test_units_beyond_the_halo_are_left_alone(monkeypatch, layer, tiling):
    """The steps have room for more units than the halo has: nothing is read or written for those."""
    cut = mma_conv._variant(made(layer, (1, 9, 20), device="cpu")).layer
    units, rounds = tiling.halo_pixels(cut) * tiling.chunk_bytes // 16, tiling.threads * tiling.x_steps(cut)
    assert units % rounds or units == 3 * rounds  # which come by twos
    monkeypatch.setattr(mma_conv, "fastest", lambda *_: tiling)
    check(on_cpu(layer, (1, 9, 20)))


# ---- how it is cut -----------------------------------------------------------------------------------------


def test_every_case_is_cut_so_that_it_fits_on_every_architecture():
    for (layer, (n, h, w), _), dtype in product(CASES, (torch.float16, torch.float32)):
        for shared in set(mma_variant.SHARED_BYTES.values()):
            a = made(layer, (n, h, w), dtype, "cpu")
            variant = mma_conv._variant(a)
            cut = mma_tiling.fastest(variant.layer, shared, 108, (n, *mma_conv._positions(a, variant)))
            assert cut is not None
            assert cut.shared_bytes(variant.layer) <= shared
            assert cut.blocks * cut.threads * cut.registers(variant.layer) <= 65536
            rows, columns = mma_conv._positions(a, variant)
            tiles = n * -(-rows // cut.tile[0]) * -(-columns // cut.tile[1])
            assert cut.blocks <= -(-tiles * cut.channel_blocks(variant.layer) // 108)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", range(1, 12))
def test_something_fits_for_every_kernel(kernel, stride):
    for channels, dtype in product((1, 3, 8, 16, 33, 128, 512), (torch.float16, torch.float32)):
        a = made(Layer(channels, 1), (1, 2, 2), dtype, "cpu")
        layer = mma_conv._variant(a).layer._replace(
            out_channels=512, kernel_h=kernel, kernel_w=kernel, stride_y=stride, stride_x=stride
        )
        for shared in set(mma_variant.SHARED_BYTES.values()):
            assert mma_tiling.fastest(layer, shared, 108, (1, 1080, 1920)) is not None


def test_small_pictures_are_cut_into_smaller_tiles():
    layer = mma_conv._variant(made(PLAIN, (1, 16, 16), device="cpu")).layer
    large, small = (
        mma_tiling.fastest(layer, mma_variant.SHARED_BYTES["sm_90a"], 132, (1, side, side))
        for side in (1024, 64)
    )
    assert large is not None and small is not None and large.tile[0] > small.tile[0]


def test_variants_are_distinct():
    for arch in mma_variant.SHARED_BYTES:
        made_variants = list(mma_variant.variants(arch))
        assert {source for source, _ in made_variants} == {mma_variant.SOURCE} and len(made_variants) <= 40
        assert len({tuple(sorted(constants.items())) for _, constants in made_variants}) == len(made_variants)


# ---- packed weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiling", "channels"),
    [
        (Tiling(32, 4, 4, 2, 4, 3, 2), 128),
        (Tiling(32, 1, 4, 1, 3, 3, 0), 33),
        (Tiling(64, 2, 4, 1, 2, 1, 3), 40),
        (Tiling(16, 2, 4, 2, 3, 2, 0), 7),
        (Tiling(8, 4, 4, 1, 1, 1, 0), 3),
        (Tiling(32, 4, 4, 1, 8, 1, 3), 16),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_packed_weights_are_the_registers_of_products(tiling, channels, size):
    """Products of the packed fragments, by the layout in the PTX ISA, are the convolution."""
    out_channels, kh, kw = 44, 3, 3
    weight = torch.randint(-9, 10, (out_channels, channels, kh, kw)).double()
    padded = torch.randint(-9, 10, (1, channels, 6, 8)).double()
    packed = mma_variant.pack(tiling, size, False, weight)
    assert packed.is_contiguous()
    layer = mma_conv._variant(made(PLAIN, (1, 4, 4), device="cpu")).layer
    layer = layer._replace(size=size, channels=channels, out_channels=out_channels)
    chunk, word = tiling.chunk_bytes // size, 4 // size
    blocks, chunks, steps = tiling.channel_blocks(layer), tiling.chunks(layer), tiling.x_steps(layer)
    assert packed.numel() * size == blocks * tiling.steps(layer) * tiling.stage_bytes(layer)
    found = torch.zeros(blocks * tiling.block_channels, chunks * chunk, kh, steps * tiling.step_taps)
    together = 1 if tiling.tiles_n % 2 else 2
    shape = (blocks, chunks, steps, tiling.depths, kh, tiling.warps_n, -1, 32, together, 2, word)
    for block, at, step, depth, ky, warp in torch.cartesian_prod(*map(torch.arange, shape[:6])).tolist():
        fragments = packed.reshape(shape)[block, at, step, depth, ky, warp]
        for pair, lane, one, half, two in torch.cartesian_prod(*map(torch.arange, fragments.shape)).tolist():
            n = ((block * tiling.warps_n + warp) * tiling.tiles_n + pair * together + one) * 8 + lane // 4
            k = 16 // size * half + lane % 4 * word + two
            channel, tap = (
                (at * chunk + 32 // size * depth + k, 0)
                if tiling.chunk_bytes >= 32
                else (at * chunk + k % chunk, k // chunk)
            )
            found[n, channel, ky, step * tiling.step_taps + tap] = fragments[pair, lane, one, half, two]
    assert not found[out_channels:].any() and not found[:, channels:].any() and not found[..., kw:].any()
    out = F.conv2d(padded, found[:out_channels, :channels, :, :kw].double())
    assert torch.equal(out, F.conv2d(padded, weight))


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A CPU picture is taken for one on a GPU."""
    monkeypatch.setattr(mma_conv, "_has_mma", lambda index: True)
    monkeypatch.setattr(hopper, "usable_or_warn", lambda: True)
    monkeypatch.setattr(mma_conv, "multiprocessors", lambda index: 108)
    monkeypatch.setattr(mma_conv, "shared_bytes", lambda index: 101_376)
    monkeypatch.setattr(Tensor, "is_cuda", True)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_refusals_name_the_reason():
    a = made(SKIP, (2, 16, 20), device="cpu")
    assert mma_conv.refusal(a) is None
    for layer, size, _ in CASES:
        assert mma_conv.refusal(made(layer, size, device="cpu")) is None
    wide = torch.empty((1, 33, 1 << 16, 1 << 15), dtype=torch.float16, device="meta")
    for change, reason in (
        ({"input": a.input[:, :, ::2]}, "neither contiguous nor channels_last"),
        ({"residual": a.input.transpose(2, 3)}, "neither contiguous nor channels_last"),
        ({"stride": [1, 2]}, "kept input before a stride"),
        ({"input": wide, "residual": None, "keep_input": False}, "larger than the kernel counts"),
        ({"activation": "tanh"}, "tanh"),
        ({"weight": a.weight[:0]}, "empty"),
        ({"input": a.input.float(), "residual": a.residual.float(), "precision": "fp32"}, "TF32"),
        ({"weight": torch.empty(8, 33, 99, 99, dtype=torch.float16), "padding": [99] * 4}, "shared memory"),
    ):
        refused = mma_conv.refusal(a._replace(**change))
        assert refused is not None and reason in refused, (change.keys(), refused)


def test_refusals_of_a_device():
    assert "8.0" in mma_conv.refusal(made(PLAIN, (1, 8, 8), device="cpu"))


def test_what_is_left_to_another_convolution_on_hopper(monkeypatch):
    deep, wider = Layer(128, 128), Layer(64, 64, kernel=(7, 7), padding=(3, 3, 3, 3))
    a, b = (made(layer, (1, 8, 8), device="cpu") for layer in (deep, wider))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for is_hopper in (True, False):
        monkeypatch.setattr(hopper, "available", lambda index, found=is_hopper: found)
        assert mma_conv.prefers(a) != is_hopper and mma_conv.prefers(b)


def test_what_is_left_to_another_convolution():
    assert mma_conv.prefers(made(PLAIN, (1, 8, 8), device="cpu"))
    assert mma_conv.prefers(made(BARE, (1, 8, 8), device="cpu"))
    assert mma_conv.prefers(made(Layer(128, 128), (1, 8, 8), device="cpu"))
    assert mma_conv.prefers(made(Layer(514, 514), (1, 8, 8), device="cpu"))
    assert not mma_conv.prefers(made(Layer(512, 512), (1, 8, 8), device="cpu"))
