"""``styleforge bench --suite layers`` and ``--plot``: what is timed, counted, checked and drawn."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_command import run_bench
from graphs import fuse
from matplotlib.figure import Figure
from torch import Tensor, fx

from sf_compile import tf32
from sf_compile.bench import layers, replays, roofline
from sf_compile.bench.layer_operands import Case, operands
from sf_compile.bench.rows import LAYER_KEYS, Row
from sf_compile.bench.work import Layer, Shape, Size, transformer_net_layers
from sf_compile.cuda import convolution, first_conv, halo_conv, hopper, mma_conv
from sf_compile.models import TransformerNet

CPU = torch.device("cpu")
RESIDUAL = ("residual+keep", "residual", "residual+add+keep")
KINDS = ("first", "down1", "down2", *RESIDUAL, "up1+add", "up2", "last")


def run_layers(output: Path, *arguments: str, device: str = "cpu") -> int:
    return run_bench("--suite", "layers", "--output", str(output), *arguments, device=device)


def test_layer_rows_are_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    assert run_layers(output, "--sizes", "2x16x20", "--hot", "0.001") == 0
    written = json.loads(output.read_text())
    assert [(row["layer"], row["condition"], row["peer"]) for row in written] == [
        (kind, condition, peer)
        for kind in KINDS
        for condition in ("cool", "hot")
        for peer in ("styleforge", "cudnn")
    ]
    for row in written:
        assert set(row) == set(LAYER_KEYS)
        assert (row["size"], row["dtype"], row["arithmetic"]) == ("2x16x20", "float32", "direct")
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["median_us"] / 1e6, rel=1e-3)
        assert row["share_of_ceiling"] == pytest.approx(row["tflops"] / row["ceiling_tflops"], rel=1e-3)
        assert row["copy_gbps"] > 0 and row["error_vs_float64"] < 1e-5
        assert row["kernel"] is row["mma_tflops"] is row["share_of_mma"] is None
    by_kind = {(row["layer"], row["peer"]): row for row in written}
    ours, bare = by_kind["residual+add+keep", "styleforge"], by_kind["residual+add+keep", "cudnn"]
    assert ours["shape"] == "2x128x4x5"
    assert ours["flops"] == bare["flops"] == 2 * 9 * 128 * 128 * 2 * 4 * 5
    weights = 9 * 128 * 128
    assert ours["bytes"] == 4 * (4 * 2 * 128 * 4 * 5 + weights)  # input, residual, kept copy, output
    assert bare["bytes"] == 4 * (2 * 128 * 6 * 7 + 2 * 128 * 4 * 5 + weights)
    assert "x cudnn" in capsys.readouterr().out


def test_the_layers_are_called_as_in_the_rewritten_network() -> None:
    def described(value: Any) -> Any:
        if isinstance(value, fx.Node | Tensor):
            return "tensor"
        return list(value) if isinstance(value, list | tuple) else value

    size = Size(1, 17, 22)
    model = TransformerNet().eval()
    compiled, made = fuse(model)
    with torch.no_grad():
        compiled(torch.rand(size.batch, 3, *size[1:]))
    op = torch.ops.styleforge.conv2d.default
    calls = [node for node in made[0].module.graph.nodes if node.target is op]
    described_layers = transformer_net_layers(size)
    assert len(calls) == len(described_layers) == 16
    for call, layer in zip(calls, described_layers, strict=True):
        (one,) = operands(Case(layer, size, torch.float32, channels_last=True), CPU, 1)
        assert list(map(described, call.args)) == list(map(described, one.fused)), layer.name
        assert call.args[1].meta["example_value"].shape == one.fused.weight.shape
        assert one.fused.input.shape == layer.input and isinstance(one.fused.weight, torch.nn.Parameter)
        ours = torch.conv2d(one.prepared, one.weight, stride=one.fused.stride)
        assert ours.shape == layer.output and one.prepared.shape == layer.padded


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "layer first of 16x16 float32: styleforge computes"),
        (1, "layer first of 16x16 float32: styleforge's mean computes"),
        (2, "layer first of 16x16 float32: styleforge's variance computes"),
        (3, "layer residual+keep of 16x16 float32, kept input: styleforge computes"),
    ],
)
def test_a_wrong_result_of_a_layer_stops(
    place: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    right = layers.fused_conv2d

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        results = list(right(*arguments))
        results[place] = results[place] * 1.01
        return tuple(results)

    monkeypatch.setattr(layers, "fused_conv2d", wrong)
    assert run_layers(tmp_path / "rows.json", "--sizes", "16x16", "--peers", "styleforge") == 1
    assert message in capsys.readouterr().err


def test_a_wrong_convolution_of_the_peer_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layers, "_bare", lambda one: torch.conv2d(one.prepared, -one.weight, one.fused.bias))
    assert run_layers(tmp_path / "rows.json", "--sizes", "16x16", "--peers", "cudnn") == 1
    assert "layer first of 16x16 float32: cudnn computes a wrong result" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "eager"), "suite layers has no peer 'eager'; choose from styleforge, cudnn"),
        (("--sizes", "4x64"), "4x64 is too small"),
        (("--width", "8"), "--width belongs to suite network"),
        (("--variants", "relu"), "--variants belongs to suite instance_norm"),
    ],
)
def test_what_the_suite_cannot_do_is_said(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_layers(tmp_path / "rows.json", *arguments) == 1
    assert message in capsys.readouterr().err


def test_an_upsampling_layer_counts_its_smaller_form() -> None:
    layer = Layer("up2", Shape(1, 64, 10, 12), 32, 3, upsample=2)
    assert layer.padded == Shape(1, 64, 22, 26) and layer.output == Shape(1, 32, 20, 24)
    assert layer.flop(subpixel=False) == 2 * 9 * 64 * 32 * 20 * 24
    assert layer.flop(subpixel=True) * 9 == layer.flop(subpixel=False) * 4
    assert layer.fused_bytes(2) == 2 * (64 * 10 * 12 + 32 * 20 * 24 + 9 * 64 * 32)
    assert layer.bare_bytes(2) == 2 * (64 * 22 * 26 + 32 * 20 * 24 + 9 * 64 * 32)


def test_input_sets_outgrow_the_cache_and_are_used_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert replays.rotating_sets(1000, CPU) == replays.calls_in_replay(1, 1000, CPU) == 1
    monkeypatch.setattr(replays, "l2_bytes", lambda device: 50_000_000)
    assert replays.rotating_sets(60_000_000, gpu) == 4
    assert replays.rotating_sets(10**9, gpu) == 1 and replays.rotating_sets(1, gpu) == 64
    assert replays.calls_in_replay(24, 10_000_000, gpu) == 240  # ten rotations
    assert replays.calls_in_replay(3, 10**9, gpu) == 3 and replays.calls_in_replay(5, 10**10, gpu) == 5
    seen: list[int] = []
    replays.repeated(seen.append, 3, 6, None)(torch.empty(0))
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.mark.gpu
def test_layers_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert run_layers(output, "--sizes", "64x72", "--dtypes", "float16,float32", device="cuda") == 0
    written = json.loads(output.read_text())
    assert len(written) == 2 * 2 * len(KINDS)
    assert all(0 < row["share_of_ceiling"] < 1.2 for row in written)
    index = torch.cuda.current_device()
    # Of float32 only where it is multiplied in TF32.
    counted = {"float16"} | ({"float32"} if tf32.allowed("auto") else set())
    for row in written:
        assert (row["kernel"] is not None) == (row["peer"] == "styleforge")
        measured = hopper.kernels(index) == "general" and row["dtype"] in counted
        assert (row["mma_tflops"] is not None) == (row["share_of_mma"] is not None) == measured
        if measured:
            assert row["share_of_mma"] == pytest.approx(row["tflops"] / row["mma_tflops"], rel=1e-3)
    for row in written:
        ours = any(name in (row["kernel"] or "") for name in ("halo_conv.cu", "mma_conv.cu"))
        enlarging = row["layer"] in ("up1+add", "up2")
        assert (row["arithmetic"] == "subpixel") == (enlarging and ours)
        if hopper.available(index) and enlarging and row["peer"] == "styleforge":
            assert ours or row["dtype"] not in counted


@pytest.mark.parametrize(
    ("kernel", "out", "channels_last", "counted"),
    [
        (halo_conv, 3, True, True), (mma_conv, 32, True, True), (mma_conv, 12, True, False),
        (mma_conv, 32, False, False), (first_conv, 32, True, False), (None, 32, True, False),
    ],
)  # fmt: skip
def test_what_runs_as_four_small_convolutions_is_counted_so(kernel, out, channels_last, counted, monkeypatch):
    monkeypatch.setattr(convolution, "choice", lambda a: SimpleNamespace(kernel=kernel))
    a = SimpleNamespace(
        input=SimpleNamespace(is_cuda=True), weight=torch.empty(out, 16, 3, 3), upsample=2, is_subpixel=True,
        channels_last=channels_last,
    )  # fmt: skip
    assert layers._runs_subpixel(a) is counted


# the plot


def made_rows() -> list[Row]:
    common = {"run": "r", "condition": "cool", "dtype": "float16", "bytes": 100, "copy_gbps": 4000.0}
    return [
        {**common, "layer": layer, "size": size, "peer": peer, "flops": 10_000, "tflops": tflops,
         "ceiling_tflops": 700.0}
        for layer, size, peer, tflops in (
            ("first", "8x8", "styleforge", 300.0), ("first", "8x8", "cudnn", 200.0),
            ("last", "16x16", "styleforge", 250.0),
        )
    ]  # fmt: skip


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_a_plot_has_every_layer_and_both_roofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    rows = made_rows()
    hot = {**rows[0], "condition": "hot", "tflops": 1.0}
    first, second = write(tmp_path / "a.json", rows[:1]), write(tmp_path / "b.json", [*rows[1:], hot])
    picture = tmp_path / "plot.png"
    assert run_bench("--plot", str(picture), str(first), str(second)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [first, second, picture]
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == ["first", "first", "last"]
    *groups, roof = axes.lines
    assert [line.get_label() for line in groups] == [
        "styleforge 8x8 float16", "cudnn 8x8 float16", "styleforge 16x16 float16",
    ]  # fmt: skip
    assert [(*line.get_xdata(), *line.get_ydata()) for line in groups] == [(100, 300), (100, 200), (100, 250)]
    xs, ys = roof.get_xdata(), roof.get_ydata()
    assert (xs[1], ys[1], ys[2]) == (700 / 4, 700, 700) and xs[0] < 100 and xs[2] > 175
    assert math.isclose(ys[0], xs[0] * 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "is not a JSON file"),
        ('{"layer": "first"}', "is not a list of rows"),
        ("[]", "no row with condition cool"),
        ('[{"op": "instance_norm", "bytes": 5}]', "row 1 of {} has no usable run, layer"),
        (json.dumps([made_rows()[0], {**made_rows()[1], "tflops": 0}]), "row 2 of {} has no usable tflops: "),
        (json.dumps([{**made_rows()[0], "copy_gbps": math.nan}]), "has no usable copy_gbps: "),
    ],
)
def test_rows_that_cannot_be_plotted_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(content)
    assert run_bench("--plot", str(tmp_path / "plot.png"), str(rows)) == 1
    assert message.format(rows) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [rows]


def test_bad_use_of_the_plot_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, picture = write(tmp_path / "rows.json", made_rows()), tmp_path / "plot.png"
    for arguments, message in (
        ((str(rows),), "a plot takes both"),
        (("--plot", str(picture)), "a plot takes both"),
        (("--plot", str(tmp_path / "plot.svg"), str(rows)), "end it in .png"),
        (("--plot", str(picture), str(tmp_path / "absent.json")), "absent.json cannot be read: No such file"),
        (("--plot", str(tmp_path / "absent" / "plot.png"), str(rows)), "does not exist: create it first"),
    ):
        assert run_bench(*arguments) == 1
        assert message in capsys.readouterr().err
    picture.write_bytes(b"mine")
    assert run_bench("--plot", str(picture), str(rows)) == 1
    assert "--force" in capsys.readouterr().err and picture.read_bytes() == b"mine"
    assert run_bench("--plot", str(picture), str(rows), "--force") == 0
    assert picture.read_bytes() != b"mine"


def test_a_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.json", made_rows())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_bench("--plot", str(tmp_path / "plot.png"), str(rows)) == 1
    assert 'pip install "sf_compile[demo]"' in capsys.readouterr().err


def test_a_plot_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(figure: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", half)
    picture = tmp_path / "plot.png"
    picture.write_bytes(b"whole")
    with pytest.raises(OSError, match="the disk is full"):
        roofline.plot(picture, made_rows())
    assert picture.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [picture]
