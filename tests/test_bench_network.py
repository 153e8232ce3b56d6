"""``styleforge bench``, suite network: which network is timed, and what its compilation takes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from bench_command import run_bench

from sf_compile import tf32
from sf_compile.bench import building, checks, network
from sf_compile.bench.peers import PEERS, of_precisions
from sf_compile.bench.rows import BenchmarkError
from sf_compile.bench.subject import Subject
from sf_compile.bench.work import Size, transformer_net_flop
from sf_compile.models import TensorFlowTransformNet
from sf_compile.options import Options


def test_the_backend_is_timed_with_its_compile_times(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert run_bench("--sizes", "32x32,32x36", "--peers", "eager,styleforge", "--output", str(output)) == 0
    eager, styleforge, _, second = json.loads(output.read_text())
    assert (eager["peer"], styleforge["peer"]) == ("eager", "styleforge")
    assert styleforge["compile_cold_s"] > 0 and styleforge["compile_warm_s"] > 0
    assert styleforge["graphs"] is False
    # The kernels of the first size are still loaded: no cold start can be shown for the second.
    assert second["compile_cold_s"] is None and second["compile_warm_s"] > 0


@dataclasses.dataclass(eq=False)
class Loaded:
    """What is asked of a loaded kernel."""

    load_seconds: float


@pytest.mark.parametrize(("unloaded", "expected"), [(True, (0.5, 0.25)), (False, (None, None))])
def test_the_kernels_share_of_a_first_call_is_its_own(
    unloaded: bool, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, *made = (Loaded(seconds) for seconds in (9.0, 0.375, 0.125))
    loaded = [before]
    reloaded_from: list[str | None] = []

    def backend(model: torch.nn.Module) -> network.Call:
        def call(value: torch.Tensor) -> torch.Tensor:
            loaded.extend(kernel for kernel in made if kernel not in loaded)
            return value

        return call

    def reload(kernel: Loaded) -> Loaded:
        reloaded_from.append(os.environ.get("STYLEFORGE_CACHE_DIR"))
        return Loaded(kernel.load_seconds / 2)

    monkeypatch.setattr(building.loader, "loaded", lambda: tuple(loaded))
    monkeypatch.setattr(building.loader, "reload", reload)
    peer = dataclasses.replace(PEERS["styleforge"], build=backend)
    built = building.build(peer, torch.nn.Identity(), torch.zeros(1), tmp_path, unloaded=unloaded)
    assert (built.kernels_cold_s, built.kernels_warm_s) == expected
    # From the cubins that the cold call has left.
    assert all(str(folder).startswith(str(tmp_path)) for folder in reloaded_from)
    assert len(reloaded_from) == (2 if unloaded else 0)


def test_a_precision_is_timed_against_eager_in_it(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ("--sizes", "32x36", "--width", "8", "--blocks", "1", "--peers", "eager,styleforge")
    assert run_bench(*arguments, "--precision", "bf16", "--output", str(output)) == 0
    eager, styleforge = json.loads(output.read_text())
    assert (eager["precision"], styleforge["precision"]) == ("auto", "bf16")
    assert eager["dtype"] == styleforge["dtype"] == "float32"
    assert eager["error_vs_float64"] < 1e-4 < styleforge["error_vs_float64"]
    assert run_bench("--suite", "layers", "--precision", "fp16") == 1


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp32,auto", True)])
def test_a_run_turns_tf32_off_for_true_float32_alone(precision, allowed, monkeypatch) -> None:
    seen: list[bool] = []

    def timed(*_):
        seen.append(tf32.allowed("auto"))
        return []

    monkeypatch.setattr(network, "_time", timed)
    arguments = ("--sizes", "32x36", "--width", "8", "--blocks", "1", "--peers", "eager,styleforge")
    assert run_bench(*arguments, "--precision", precision) == 0
    assert seen == [allowed] and tf32.allowed("auto")


def test_precisions_are_timed_side_by_side(tmp_path: Path, capsys) -> None:
    output = tmp_path / "rows.json"
    arguments = ("--sizes", "32x36", "--width", "8", "--blocks", "1", "--peers", "eager,styleforge")
    assert run_bench(*arguments, "--precision", "auto,fp16,bf16", "--output", str(output)) == 0
    rows = json.loads(output.read_text())
    assert [(row["peer"], row["precision"]) for row in rows] == [
        ("eager", "auto"), ("styleforge", "auto"), ("styleforge", "fp16"), ("styleforge", "bf16"),
    ]  # fmt: skip
    errors = [row["error_vs_float64"] for row in rows]
    assert errors[1] < 1e-4 < errors[2] < errors[3]
    assert len({row["run"] for row in rows}) == 1
    # Kernels of one may serve another, so no compilation is a cold one.
    assert all(row["compile_cold_s"] is None and row["kernels_cold_s"] is None for row in rows)
    with pytest.raises(SystemExit):
        run_bench(*arguments, "--precision", "fp16,half")
    assert "'half' is not a precision; choose from auto, fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "precisions", "expected"),
    [
        ("cpu", ("auto",), [True, False, False]),
        ("cuda", ("auto",), [True, True, False]),
        ("cuda", ("fp16",), [True, False, False]),
        ("cuda", ("auto", "fp16"), [False, False, False]),
    ],
)
def test_what_finds_kernels_loaded_is_not_cold(device, precisions, expected) -> None:
    peers = of_precisions([PEERS["eager"], PEERS["styleforge"], PEERS["styleforge-graph"]], precisions)
    built: set[torch.dtype] = set()
    dtypes = (torch.float32, torch.float16, torch.float32)  # the last at another size
    assert [network._unloaded(peers, dtype, torch.device(device), built) for dtype in dtypes] == expected


def test_nothing_is_compiled_while_it_is_timed(monkeypatch) -> None:
    """Dynamo forgets what was compiled for one precision when it compiles the next."""
    graphs = torch._dynamo.utils.counters["stats"]
    compiled: list[int] = []

    def timed(runners, *_):
        before = graphs["unique_graphs"]
        for runner in runners:
            runner.call(runner.inputs[0])
        compiled.append(graphs["unique_graphs"] - before)
        return []

    monkeypatch.setattr(network, "_time", timed)
    arguments = ("--sizes", "32x36", "--width", "8", "--blocks", "1", "--peers", "eager,styleforge")
    assert run_bench(*arguments, "--precision", "auto,fp16,bf16") == 0
    assert compiled == [0] and graphs["unique_graphs"] > 0


def test_ratios_are_over_what_follows_the_model(tmp_path: Path, capsys) -> None:
    arguments = ("--sizes", "32x36", "--width", "8", "--blocks", "1", "--peers", "styleforge", "--quick")
    assert run_bench(*arguments, "--precision", "bf16,auto") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("styleforge ")]
    (bf16,), (auto,) = ([line for line in lines if line[1] == name] for name in ("bf16", "auto"))
    assert auto[9] == "1.00" and float(bf16[9]) == pytest.approx(float(bf16[4]) / float(auto[4]), rel=0.02)


def test_integers_are_held_to_their_distance_from_fp16(tmp_path: Path, monkeypatch, capsys) -> None:
    output = tmp_path / "rows.json"
    arguments = ("--sizes", "32x36", "--width", "32", "--blocks", "1", "--peers", "eager,styleforge")
    assert run_bench(*arguments, "--precision", "int8", "--output", str(output)) == 0
    eager, styleforge = json.loads(output.read_text())
    assert (eager["precision"], styleforge["precision"]) == ("auto", "int8")
    assert eager["psnr_db"] is None and 38 < styleforge["psnr_db"] < 90
    assert f"{styleforge['psnr_db']:.1f}" in capsys.readouterr().out
    monkeypatch.setattr(network, "Options", lambda: Options(min_psnr=90))
    assert run_bench(*arguments, "--precision", "int8") == 1
    assert "90 are promised; nothing was timed after it" in capsys.readouterr().err


def test_integers_that_nothing_multiplies_have_no_row(capsys) -> None:
    arguments = ("--sizes", "32x36", "--width", "4", "--blocks", "1", "--peers", "styleforge")
    assert run_bench(*arguments, "--precision", "int8") == 1
    assert "it multiplies no integers here" in capsys.readouterr().err


def test_a_picture_that_is_not_finite_is_no_decibels() -> None:
    plain = torch.rand(1, 3, 8, 8)
    assert checks.check_psnr("styleforge", plain + 0.01, plain, 38.0, "here") > 38
    for wrong in (plain * float("nan"), plain + float("inf"), plain + 1):
        with pytest.raises(BenchmarkError, match="dB from fp16"):
            checks.check_psnr("styleforge", wrong, plain, 38.0, "here")


def test_width_and_blocks_change_the_network_and_its_floor(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    peers = "eager,eager-channels-last,styleforge"
    arguments = ("--sizes", "32x36", "--width", "8", "--blocks", "2", "--peers", peers)
    assert run_bench(*arguments, "--output", str(output)) == 0
    written = json.loads(output.read_text())
    assert [row["peer"] for row in written] == peers.split(",")
    for row in written:
        assert (row["network"], row["network_width"], row["blocks"]) == ("transformer_net", 8, 2)
        assert (row["height"], row["width"]) == (32, 36)
        flop = transformer_net_flop(Size(1, 32, 36), width=8, blocks=2)
        assert row["floor_ms"] * row["ceiling_tflops"] * 1e9 == pytest.approx(flop, rel=1e-3)


def test_a_checkpoint_is_timed_with_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = TensorFlowTransformNet(width=4, blocks=1)
    path, output = tmp_path / "tf4.pt", tmp_path / "rows.json"
    torch.save(trained.state_dict(), path)
    timed: list[torch.Tensor] = []

    def build(model: torch.nn.Module) -> network.Call:
        timed.append(model.c1.conv.weight)
        return model

    monkeypatch.setitem(PEERS, "eager", dataclasses.replace(PEERS["eager"], build=build))
    arguments = ("--checkpoint", str(path), "--sizes", "16x20", "--peers", "eager", "--output", str(output))
    assert run_bench(*arguments) == 0
    assert torch.equal(timed[0], trained.c1.conv.weight)
    (row,) = json.loads(output.read_text())
    assert (row["network"], row["network_width"], row["blocks"]) == ("tf_transform_net", 4, 1)
    assert row["checkpoint"] == "tf4.pt" and str(tmp_path) not in output.read_text()
    assert "tf_transform_net (width 4, 1 blocks) of tf4.pt 1x16x20" in capsys.readouterr().out
    assert row["floor_ms"] * row["ceiling_tflops"] * 1e9 == pytest.approx(
        Subject(trained).flop(Size(1, 16, 20)), rel=1e-3
    )


def test_the_operations_of_a_transposed_convolution_are_counted() -> None:
    executed = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal executed
        # A convolution takes its weights to every output pixel, a transposed one to every input pixel.
        pixels = output if isinstance(module, torch.nn.Conv2d) else inputs[0]
        executed += 2 * module.weight.numel() * pixels[:, 0].numel()

    model = TensorFlowTransformNet(width=4, blocks=1).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.rand(2, 3, 17, 20))
    expected, executed = executed, 0
    assert Subject(model).flop(Size(2, 17, 20)) == expected > 0
