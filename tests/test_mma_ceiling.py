"""The rate of products by mma.sync: csrc/mma_ceiling.cu, and the rows that are counted against it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bench_command import run_bench
from emulated_kernel import EmulatedKernel

from sf_compile import tf32
from sf_compile.bench import ceilings, network
from sf_compile.cuda import hopper, mma_ceiling

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    shape = (24, 32) if dtype == torch.float32 else (24, 32, 2)
    return torch.randn(shape, device=device).to(dtype)


def expected(words: torch.Tensor, rounds: int) -> torch.Tensor:
    """The sum of each lane's share of the products, by the layout of operands in the PTX ISA."""
    words = tf32.rounded(words).double().cpu().reshape(24, 32, -1)
    depth = 8 * words.shape[2]
    # (operand, half of the depth, half of the rows, row, word of the depth, number of the word)
    left = words[:16].reshape(4, 2, 2, 8, 4, -1).permute(0, 2, 3, 1, 4, 5).reshape(4, 16, depth)
    right = words[16:].reshape(4, 2, 8, 4, -1).permute(0, 2, 1, 3, 4).reshape(4, 8, depth)
    whole = torch.einsum("imk,jnk->mn", left, right) * rounds
    # A lane has two columns of a row, and of the row eight below.
    return (whole[:8] + whole[8:]).reshape(8, 4, 2).sum(2).flatten()


@pytest.fixture
def emulated(monkeypatch):
    """Launches run on the CPU, on a GPU of one multiprocessor."""
    monkeypatch.setattr(mma_ceiling, "multiprocessors", lambda index: 1)
    monkeypatch.setattr(
        mma_ceiling,
        "_kernel",
        lambda index, dtype: EmulatedKernel(mma_ceiling.constants(dtype), "PPi", source=mma_ceiling.SOURCE),
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_are_those_that_are_counted(dtype):
    words = operands(dtype)
    launch, flop = mma_ceiling.products(words, 8)
    depth = 8 if dtype == torch.float32 else 16
    assert flop == 2 * (256 // 32) * 8 * 16 * (2 * 16 * 8 * depth)  # blocks, warps, rounds, products
    assert torch.allclose(launch().view(-1, 32).double(), expected(words, 8), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("words", [torch.zeros(24, 32, dtype=torch.float16), torch.zeros(24, 16)])
def test_other_operands_are_refused(words):
    with pytest.raises(ValueError, match="no operands"):
        mma_ceiling.products(words, 8)
    with pytest.raises(ValueError, match="rounds"):
        mma_ceiling.products(operands(torch.float16), 6)


def test_the_general_kernels_are_those_of_every_gpu(monkeypatch):
    monkeypatch.setattr(hopper, "usable_or_warn", lambda: True)
    for capability, wanted, found in (
        ((9, 0), "auto", "sm_90a"),
        ((9, 0), "general", "general"),
        ((8, 6), "auto", "general"),
        ((12, 0), "auto", "general"),
        ((7, 5), "general", None),
    ):
        hopper.available.cache_clear()
        monkeypatch.setenv(hopper.KERNELS, wanted)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert hopper.kernels(0) == found
    hopper.available.cache_clear()
    assert ceilings.kernels_of(torch.device("cpu")) is None


def test_rows_are_counted_against_it_where_the_general_kernels_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def products(words: torch.Tensor, rounds: int) -> object:
        asked.append((words.dtype, words.shape))
        return lambda: None, 10**9

    for module in (ceilings, network):
        monkeypatch.setattr(module, "kernels_of", lambda device: "general")
    monkeypatch.setattr(mma_ceiling, "products", products)
    monkeypatch.setattr(tf32, "allowed", lambda precision: True)
    network_rows, layer_rows = tmp_path / "network.json", tmp_path / "layers.json"
    small = ("--sizes", "32x32", "--width", "8", "--blocks", "1", "--peers", "eager,styleforge")
    assert run_bench(*small, "--output", str(network_rows)) == 0
    table = capsys.readouterr().out
    eager, ours = json.loads(network_rows.read_text())
    assert (eager["kernels"], ours["kernels"]) == (None, "general")
    for row in (eager, ours):
        flop = row["floor_ms"] * row["ceiling_tflops"]
        assert row["share_of_mma"] == pytest.approx(flop / row["median_ms"] / row["mma_tflops"], rel=1e-3)
        assert f"{row['share_of_mma']:.1%}" in table
    assert run_bench("--suite", "layers", "--sizes", "16x16", "--output", str(layer_rows)) == 0
    assert "of mma.sync" in capsys.readouterr().out
    for row in json.loads(layer_rows.read_text()):
        assert row["share_of_mma"] == pytest.approx(row["tflops"] / row["mma_tflops"], rel=1e-3)
    assert asked == [(torch.float32, (24, 32))] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_on_a_gpu(dtype):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("mma.sync of these types needs compute capability 8.0")
    words = operands(dtype, "cuda")
    launch, _ = mma_ceiling.products(words, 16)
    sums = launch().view(-1, 32).double().cpu()
    assert torch.allclose(sums, expected(words, 16).expand_as(sums), rtol=1e-3, atol=5e-2)
