"""``styleforge bench``: the counts, the rows, and that a wrong number is never published."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sf_compile.bench import instance_norm, network, rows, tables
from sf_compile.bench.checks import check_error, check_output, relative_error
from sf_compile.bench.peers import PEERS
from sf_compile.bench.rows import BenchmarkError
from sf_compile.bench.timing import Budget, Sample, interleaved, sustained
from sf_compile.bench.work import (
    PLANE_ON_CHIP_BYTES,
    Shape,
    Size,
    instance_norm_bytes,
    parse_sizes,
    transformer_net_flop,
    transformer_net_norm_shapes,
)
from sf_compile.cli import bench, main
from sf_compile.models import TransformerNet

CPU = torch.device("cpu")


def run_bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args([*arguments, "--device", "cpu", "--quick"]))


def ignore(line: str) -> None:
    """Take a progress line."""


# work


@pytest.mark.parametrize(
    ("size", "written", "subpixel"),
    [
        (Size(1, 512, 512), 80.6, 69.9),
        (Size(1, 1080, 1920), 638, 553),
        (Size(1, 2160, 3840), 2551, 2212),
        (Size(8, 512, 512), 645, 559),
    ],
)
def test_flop_are_those_counted_by_hand(size: Size, written: float, subpixel: float) -> None:
    assert transformer_net_flop(size, subpixel=False) / 1e9 == pytest.approx(written, rel=1e-3)
    assert transformer_net_flop(size) / 1e9 == pytest.approx(subpixel, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "width", "blocks"),
    [
        (Size(1, 64, 64), 32, 5),
        (
            Size(2, 37, 50),
            8,
            1,
        ),  # odd: the strided convolutions round up, the output is larger than the input
    ],
)
def test_flop_are_those_the_network_executes(size: Size, width: int, blocks: int) -> None:
    executed = 0

    def count(module: torch.nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal executed
        executed += 2 * output.numel() * module.weight[0].numel()

    shapes = set()

    def see(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        shapes.add(Shape(*output.shape))

    model = TransformerNet(width=width, blocks=blocks).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
        elif isinstance(module, torch.nn.InstanceNorm2d):
            module.register_forward_hook(see)
    with torch.no_grad():
        model(torch.rand(size.batch, 3, size.height, size.width))
    assert transformer_net_flop(size, width=width, blocks=blocks, subpixel=False) == executed
    assert set(transformer_net_norm_shapes(size, width=width)) == shapes


def test_sizes_are_read_in_both_forms() -> None:
    assert parse_sizes("512x512, 8x1080x1920,512x512") == (Size(1, 512, 512), Size(8, 1080, 1920))
    assert str(Size(1, 1080, 1920)) == "1080x1920"
    assert str(Size(8, 512, 512)) == "8x512x512"


@pytest.mark.parametrize("text", ["", "512", "512x", "axb", "1x2x3x4", "512x512,", "-1x5", "512X512"])
def test_a_bad_size_is_named_and_explained(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH"):
        parse_sizes(text)


def test_a_zero_in_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0x512' is not a size: .* at least 1"):
        parse_sizes("0x512")


L2 = 60 * 2**20


@pytest.mark.parametrize(
    ("shape", "channels_last", "residual", "tensors"),
    [
        (Shape(1, 32, 512, 512), False, False, 2),  # 16.8 MB: the tensor stays in L2
        (Shape(1, 32, 512, 512), True, True, 3),
        (Shape(1, 32, 1080, 1920), False, False, 3),  # 133 MB, planes of 4.1 MB: read twice
        (Shape(1, 32, 1080, 1920), True, True, 4),
        (Shape(64, 128, 128, 128), False, False, 2),  # 268 MB, but a plane of 32 KB stays in shared memory
        (Shape(64, 128, 128, 128), True, False, 3),  # a channels_last plane is spread over the whole image
    ],
)
def test_instance_norm_counts_the_bytes_it_must_move(
    shape: Shape, channels_last: bool, residual: bool, tensors: int
) -> None:
    counted = instance_norm_bytes(
        shape, element_size=2, channels_last=channels_last, residual=residual, l2_bytes=L2
    )
    assert counted == tensors * 2 * math.prod(shape)


def test_a_plane_stays_on_chip_up_to_the_limit() -> None:
    def count(elements: int) -> int:
        shape = Shape(1, 1000, 1, elements)
        return instance_norm_bytes(shape, element_size=2, channels_last=False, residual=False, l2_bytes=0)

    limit = PLANE_ON_CHIP_BYTES // 2
    assert count(limit) == 2 * 2 * 1000 * limit
    assert count(limit + 1) == 3 * 2 * 1000 * (limit + 1)


# timing


def test_every_call_gets_latencies_and_rotating_inputs() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    calls = {name: (lambda value, name=name: seen[name].append(int(value))) for name in seen}
    inputs = {name: [torch.tensor(0), torch.tensor(1), torch.tensor(2)] for name in seen}
    # Without a warm-up, which calls for a time, the number of calls is known: one, then two of three.
    samples = interleaved(calls, inputs, Budget(seconds=0.0, rounds=2, pause=0.0, least=3, warm=0.0))
    for name, sample in samples.items():
        assert len(sample.latencies) == 6 and sample.streamed == 6
        assert min(sample.latencies) > 0 and sample.back_to_back > 0
        assert seen[name] == [number % 3 for number in range(2 * (1 + 3 + 3))]


def test_a_burst_warms_up_for_its_time_before_it_counts() -> None:
    calls: list[Tensor] = []
    budget = Budget(seconds=0.0, rounds=1, pause=0.0, least=2, warm=0.02)
    begin = time.perf_counter()
    sample = interleaved({"a": calls.append}, {"a": [torch.zeros(1)]}, budget)["a"]
    assert time.perf_counter() - begin >= 0.02
    assert len(sample.latencies) == sample.streamed == 2 and len(calls) > 5


def test_sustained_counts_the_second_half() -> None:
    calls = []
    sample = sustained(calls.append, [torch.zeros(1)], 0.02)
    assert 0 < len(sample.latencies) < len(calls)
    assert sample.back_to_back == pytest.approx(sum(sample.latencies) / len(sample.latencies))


def test_percentiles_of_a_sample() -> None:
    sample = Sample([5.0, 1.0, 2.0, 3.0, 4.0])
    assert [sample.percentile(q) for q in (20, 50, 80)] == pytest.approx([1.8, 3.0, 4.2])


# checks


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), reference))
    with pytest.raises(BenchmarkError, match="here: inductor returns a wrong shape"):
        check_output("inductor", torch.zeros(1, 2), reference, 1e-3, "here")


@pytest.mark.parametrize(
    ("peer", "error", "eager_error", "passes"),
    [
        ("styleforge", 1.24e-3, 1e-3, True),
        ("styleforge", 1.26e-3, 1e-3, False),
        ("styleforge", math.nan, 1e-3, False),
        ("inductor", 2e-3, 1e-3, True),  # another rounding, not another function
        ("inductor", 2e-2, 1e-3, False),
        ("eager", math.nan, math.nan, False),
        ("styleforge", 0.0, math.inf, False),
    ],
)
def test_only_a_right_result_passes(peer: str, error: float, eager_error: float, passes: bool) -> None:
    if passes:
        check_error(peer, error, eager_error, "here")
        return
    with pytest.raises(BenchmarkError, match="here: "):
        check_error(peer, error, eager_error, "here")


# the command


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
        assert row["run"] == written[0]["run"] and row["torch"] == torch.__version__
    assert "eager-channels-last" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]

    before = output.read_bytes()
    assert run_bench(*arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert run_bench(*arguments, "--force") == 0
    assert len(json.loads(output.read_text())) == 2


def test_the_backend_is_timed_with_its_compile_times(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert run_bench("--sizes", "32x32,32x36", "--peers", "eager,styleforge", "--output", str(output)) == 0
    eager, styleforge, _, second = json.loads(output.read_text())
    assert (eager["peer"], styleforge["peer"]) == ("eager", "styleforge")
    assert styleforge["compile_cold_s"] > 0 and styleforge["compile_warm_s"] > 0
    assert styleforge["graphs"] is False
    # The kernels of the first size are still loaded: no cold start can be shown for the second.
    assert second["compile_cold_s"] is None and second["compile_warm_s"] > 0


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
        (("--suite", "instance_norm", "--hot", "1"), "--hot belongs to suite network"),
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
    assert graphs == {"eager-graph", "inductor-reduce-overhead", "inductor-max-autotune", "styleforge-graph"}
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
            **{"network": "transformer_net", "batch": 1, "height": 8, "width": 8, "dtype": "float16"},
            **{"condition": "cool", "layout": "contiguous", "peer": peer, "graphs": graphs},
            **{"median_ms": median, "floor_ms": 0.5, "ceiling_tflops": 600.0},
        }

    text = tables.network_table(
        [row("eager", False, 8.0), row("styleforge", False, 2.0), row("styleforge", True, 1.0)]
    )
    title, _, _, eager, plain, graph = text.splitlines()
    assert title == "transformer_net 1x8x8 float16, cool; floor 0.500 ms at 600 TFLOP/s"
    assert "8.00" in eager.split() and "6.2%" in eager.split()
    assert "2.00" in plain.split() and "25.0%" in plain.split()
    assert "1.00" in graph.split() and "50.0%" in graph.split()


@pytest.mark.gpu
def test_graphs_and_peak_memory_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = ["--sizes", "64x64", "--peers", "eager,eager-graph", "--quick", "--device", "cuda"]
    assert bench.run(parser.parse_args([*arguments, "--dtypes", "float16", "--output", str(output)])) == 0
    eager, graph = json.loads(output.read_text())
    assert (eager["graphs"], graph["graphs"]) == (False, True)
    assert eager["peak_mb"] > 0 and graph["peak_mb"] > 0
    assert graph["error_vs_float64"] == pytest.approx(eager["error_vs_float64"], rel=0.5)
    assert graph["gpu"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_instance_norm_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = [
        "--suite",
        "instance_norm",
        "--sizes",
        "64x64",
        "--peers",
        "eager",
        "--quick",
        "--device",
        "cuda",
    ]
    assert bench.run(parser.parse_args([*arguments, "--dtypes", "float16", "--output", str(output)])) == 0
    written = json.loads(output.read_text())
    assert len(written) == 18
    assert all(0 < row["share_of_copy"] < 1.5 for row in written)


def test_variants_are_chosen_by_name_and_an_unknown_one_is_refused() -> None:
    assert instance_norm.select_variants(None) == instance_norm.VARIANTS
    assert [variant.name for variant in instance_norm.select_variants(["relu"])] == ["relu"]
    with pytest.raises(BenchmarkError, match="no variant is called 'tanh'"):
        instance_norm.select_variants(["tanh"])
