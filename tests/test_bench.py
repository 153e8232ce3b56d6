"""``styleforge bench``: the command, its rows, and that a wrong number is never published."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from bench_command import run_bench

from sf_compile.bench import instance_norm, network, rows, tables
from sf_compile.bench.peers import PEERS
from sf_compile.bench.rows import BenchmarkError
from sf_compile.bench.work import Shape
from sf_compile.cli import main

CPU = torch.device("cpu")


def test_network_rows_are_complete_and_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    arguments = ("--sizes", "32x36", "--peers", "eager,eager-channels-last", "--output", str(output))
    assert run_bench(*arguments, "--hot", "0.01") == 0
    written = json.loads(output.read_text())
    assert [(row["peer"], row["layout"], row["condition"]) for row in written] == [
        ("eager", "contiguous", "cool"),
        ("eager-channels-last", "channels_last", "cool"),
        ("eager", "contiguous", "hot"),
        ("eager-channels-last", "channels_last", "hot"),
    ]
    for row in written:
        assert set(row) == set(rows.NETWORK_KEYS)
        assert (row["network"], row["dtype"], row["graphs"]) == ("transformer_net", "float32", False)
        assert (row["batch"], row["height"], row["width"]) == (1, 32, 36)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["back_to_back_ms"] > 0 and row["floor_ms"] > 0 and row["copy_gbps"] > 0
        assert row["error_vs_float64"] < 1e-4
        assert row["peak_mb"] is row["compile_cold_s"] is row["compile_warm_s"] is None
        assert row["kernels_cold_s"] is row["kernels_warm_s"] is row["checkpoint"] is None
        assert row["kernels"] is row["mma_tflops"] is row["share_of_mma"] is row["tf32"] is None
        assert (row["network_width"], row["blocks"]) == (32, 5)
        assert row["run"] == written[0]["run"] and row["torch"] == torch.__version__
    assert "eager-channels-last" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]

    before = output.read_bytes()
    assert run_bench(*arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert run_bench(*arguments, "--force") == 0
    assert len(json.loads(output.read_text())) == 2


def wrong(model: torch.nn.Module) -> network.Call:
    return lambda value: model(value) * 1.01


def not_a_number(model: torch.nn.Module) -> network.Call:
    return lambda value: model(value) * math.nan


def one_row_short(model: torch.nn.Module) -> network.Call:
    return lambda value: model(value)[:, :, 1:]


@pytest.mark.parametrize("build", [wrong, not_a_number, one_row_short])
def test_a_wrong_result_stops_and_writes_nothing(
    build: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = dataclasses.replace(PEERS["eager-channels-last"], build=build)
    monkeypatch.setitem(PEERS, "eager-channels-last", peer)
    output = tmp_path / "rows.json"
    assert run_bench("--sizes", "32x32", "--peers", "eager,eager-channels-last", "--output", str(output)) == 1
    assert "wrong" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_before_a_wrong_result_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = PEERS["eager-channels-last"]

    def build(model: torch.nn.Module, *rest: object) -> object:
        built = right.build(model, *rest)
        return lambda x: built(x) * (1 if x.shape[3] < 36 else 1.5)

    monkeypatch.setitem(PEERS, "eager-channels-last", dataclasses.replace(right, build=build))
    output = tmp_path / "rows.json"
    peers = ("--peers", "eager,eager-channels-last", "--output", str(output))
    assert run_bench("--sizes", "32x32,32x36", *peers) == 1
    assert "wrong" in capsys.readouterr().err
    assert [row["width"] for row in json.loads(output.read_text())] == [32, 32]


def test_instance_norm_rows_are_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    assert (
        run_bench(
            "--suite",
            "instance_norm",
            "--sizes",
            "2x8x8",
            "--peers",
            "eager,styleforge",
            "--output",
            str(output),
        )
        == 0
    )
    written = json.loads(output.read_text())
    # 3 shapes, 2 layouts, 3 variants, 2 peers
    assert len(written) == 36
    assert {row["shape"] for row in written} == {"2x32x8x8", "2x64x4x4", "2x128x2x2"}
    for row in written:
        assert set(row) == set(rows.INSTANCE_NORM_KEYS)
        assert row["median_us"] > 0
        assert row["gbps"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3, rel=1e-3)
        assert row["share_of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"], rel=1e-3)
        assert row["error_vs_float64"] < 1e-5
    assert "relu+residual" in capsys.readouterr().out


def test_a_wrong_instance_norm_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgets_the_activation(case: instance_norm.Case) -> instance_norm.Operation:
        plain = dataclasses.replace(case, variant=instance_norm.VARIANTS[0])
        return instance_norm._eager(plain)

    monkeypatch.setitem(instance_norm.OPERATIONS, "styleforge", forgets_the_activation)
    output = tmp_path / "rows.json"
    arguments = (
        "--suite",
        "instance_norm",
        "--sizes",
        "8x8",
        "--peers",
        "styleforge",
        "--output",
        str(output),
    )
    assert run_bench(*arguments) == 1
    assert "instance_norm relu 1x32x8x8" in capsys.readouterr().err
    assert not output.exists()


def test_the_target_shapes_come_first_and_once() -> None:
    shapes = instance_norm.shapes_of(instance_norm.GPU_SIZES, target=True)
    assert shapes[:2] == [Shape(1, 32, 1080, 1920), Shape(8, 128, 128, 128)]
    assert len(shapes) == len(set(shapes)) == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "egaer"), "no peer is called 'egaer'; choose from eager"),
        (("--peers", "styleforge-graph"), "peer styleforge-graph cannot run on cpu: CUDA graphs need"),
        (("--sizes", "4x64", "--peers", "eager"), "4x64 is too small"),
        (
            ("--suite", "instance_norm", "--peers", "eager-graph"),
            "suite instance_norm has no peer 'eager-graph'",
        ),
        (("--suite", "instance_norm", "--hot", "1"), "--hot belongs to suite network and layers"),
        (("--suite", "instance_norm", "--blocks", "1"), "--blocks belongs to suite network"),
        (("--suite", "instance_norm", "--checkpoint", "a.pth"), "--checkpoint belongs to suite network"),
        (("--checkpoint", "absent.pth"), "absent.pth: No such file"),
        (("--checkpoint", "a.pth", "--width", "8"), "leave out --width and --blocks"),
        (("--output", "absent/rows.json"), "the folder of absent/rows.json does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_bench(*arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_an_unusable_device_is_refused(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", device, "--quick"]) == 2
    assert repr(device) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sizes", "huge", "'huge' is not a size"),
        ("--dtypes", "float32,fp16", "'fp16' is not a dtype; choose from float32, float16, bfloat16"),
        ("--seconds", "-1", "'-1' is not a positive number"),
        ("--hot", "nan", "'nan' is not a positive number"),
        ("--width", "0", "'0' is not a whole number from 1 to 999"),
        ("--blocks", "1.5", "'1.5' is not a whole number from 1 to 999"),
    ],
)
def test_a_bad_option_value_is_explained(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_bench(f"{option}={value}")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# peers and rows


def test_default_peers_leave_out_what_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    said: list[str] = []
    names = [peer.name for peer in network.select_peers(None, CPU, said.append)]
    assert "eager" in names and "inductor" not in names and "eager-graph" not in names
    assert any(line.startswith("without inductor: Inductor needs a C++ compiler") for line in said)


def test_graph_peers_say_so() -> None:
    graphs = {peer.name for peer in PEERS.values() if peer.graphs}
    assert graphs == {
        "eager-graph", "inductor-reduce-overhead", "inductor-max-autotune", "styleforge-graph",
        "styleforge-reduce-overhead",
    }  # fmt: skip
    assert PEERS["styleforge-graph"].row_name == PEERS["styleforge"].row_name == "styleforge"


def test_commit_is_overridden_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_COMMIT", "abc1234")
    assert rows.commit() == "abc1234"
    monkeypatch.delenv("STYLEFORGE_COMMIT")

    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert rows.commit() is None


def test_commit_marks_a_changed_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STYLEFORGE_COMMIT", raising=False)
    answers = {"ls-files": "__init__.py\n", "rev-parse": "0123abc\n", "status": " M sf_compile/__init__.py\n"}

    def git(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, answers[command[3]])

    monkeypatch.setattr(subprocess, "run", git)
    assert rows.commit() == "0123abc-dirty"
    answers["status"] = ""
    assert rows.commit() == "0123abc"
    answers["ls-files"] = ""
    assert rows.commit() is None


def test_a_row_that_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        rows.write_rows(tmp_path / "rows.json", [{"median_ms": math.nan}], force=False)
    assert list(tmp_path.iterdir()) == []


def test_table_compares_with_styleforge_in_a_graph_first() -> None:
    def row(peer: str, graphs: bool, median: float) -> rows.Row:
        return dict.fromkeys(rows.NETWORK_KEYS) | {
            **{"network": "transformer_net", "network_width": 32, "blocks": 5, "dtype": "float16"},
            **{"batch": 1, "height": 8, "width": 8},
            **{"condition": "cool", "layout": "contiguous", "peer": peer, "graphs": graphs},
            **{"median_ms": median, "floor_ms": 0.5, "ceiling_tflops": 600.0},
        }

    text = tables.network_table(
        [row("eager", False, 8.0), row("styleforge", False, 2.0), row("styleforge", True, 1.0)]
    )
    title, _, _, eager, plain, graph = text.splitlines()
    assert title == "transformer_net (width 32, 5 blocks) 1x8x8 float16, cool; floor 0.500 ms at 600 TFLOP/s"
    assert "8.00" in eager.split() and "6.2%" in eager.split()
    assert "2.00" in plain.split() and "25.0%" in plain.split()
    assert "1.00" in graph.split() and "50.0%" in graph.split()


@pytest.mark.gpu
def test_graphs_and_peak_memory_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ("--sizes", "64x64", "--peers", "eager,eager-graph", "--dtypes", "float16")
    assert run_bench(*arguments, "--output", str(output), device="cuda") == 0
    eager, graph = json.loads(output.read_text())
    assert (eager["graphs"], graph["graphs"]) == (False, True)
    assert eager["peak_mb"] > 0 and graph["peak_mb"] > 0
    assert graph["error_vs_float64"] == pytest.approx(eager["error_vs_float64"], rel=0.5)
    assert graph["gpu"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_instance_norm_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ("--suite", "instance_norm", "--sizes", "64x64", "--peers", "eager", "--dtypes", "float16")
    assert run_bench(*arguments, "--output", str(output), device="cuda") == 0
    written = json.loads(output.read_text())
    assert len(written) == 18
    assert all(0 < row["share_of_copy"] < 1.5 for row in written)


def test_variants_are_chosen_by_name_and_an_unknown_one_is_refused() -> None:
    assert instance_norm.select_variants(None) == instance_norm.VARIANTS
    assert [variant.name for variant in instance_norm.select_variants(["relu"])] == ["relu"]
    with pytest.raises(BenchmarkError, match="no variant is called 'tanh'"):
        instance_norm.select_variants(["tanh"])
