"""``styleforge bench --suite pipeline``: its rows, its plot, and that a wrong picture is never timed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from bench_command import run_bench

from sf_compile.bench import pipeline, rows
from sf_compile.bench.rows import BenchmarkError

PEERS = ("--peers", "compute,pipeline,loop")
CPU = torch.device("cpu")


def test_rows_are_complete_and_the_timeline_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ("--suite", "pipeline", "--sizes", "2x16x20", *PEERS)
    assert run_bench(*arguments, "--output", str(output), "--plot", str(plot)) == 0
    written = json.loads(output.read_text())
    assert [row["peer"] for row in written] == ["compute", "pipeline", "loop"]
    for row in written:
        assert set(row) == set(rows.PIPELINE_KEYS)
        assert (row["batch"], row["height"], row["width"], row["dtype"]) == (2, 16, 20, "float32")
        assert 0 < row["slowest_per_s"] <= row["pictures_per_s"] <= row["fastest_per_s"]
        assert row["share_of_compute"] > 0 and row["error_vs_float64"] < 1e-4
        assert row["pictures"] % 2 == 0 and row["backend"] == "styleforge"
    assert written[0]["share_of_compute"] == 1
    assert plot.read_bytes()[1:4] == b"PNG"
    out = capsys.readouterr().out
    assert re.search(r"2x16x20 +float32 +pipeline", out) and "of compute" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "rows.json"]


def test_a_wrong_picture_is_never_timed(tmp_path, monkeypatch, capsys):
    class Wrong(pipeline.StylizePipeline):
        def __call__(self, source):
            for picture in super().__call__(source):
                picture[0, 0, 0] ^= 1
                yield picture

    monkeypatch.setattr(pipeline, "StylizePipeline", Wrong)
    output = tmp_path / "rows.json"
    arguments = ("--suite", "pipeline", "--sizes", "16x16", *PEERS, "--output", str(output))
    assert run_bench(*arguments) == 1
    assert "picture 0 of the pipeline differs from the loop's" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--peers", "eager"), "choose from compute, pipeline, loop, loop-inductor-max-autotune"),
        (("--peers", "loop-inductor-max-autotune"), "cannot run on cpu: CUDA graphs need a CUDA device"),
        (("--plot", "plot.svg"), "end it in .png"),
        (("--hot", "1"), "--hot belongs to suite"),
        (("--sizes", "4x4"), "too small"),
    ],
)
def test_bad_use_is_explained(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_bench("--suite", "pipeline", *arguments) == 1
    assert part in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"sf_compile\[demo\]"):
        pipeline.run_pipeline(
            pipeline.CPU_SIZES, [torch.float32], ["compute"], CPU, budget=None, draw=tmp_path / "plot.png",
            log=print,
        )  # fmt: skip


def test_by_default_everything_that_runs_here_is_measured():
    said = []
    assert pipeline.select_peers(None, CPU, said.append) == ["compute", "pipeline", "loop"]
    assert said == ["without loop-inductor-max-autotune: CUDA graphs need a CUDA device"]


def test_the_example_in_readme_runs(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"<!-- pipeline-example -->\n```python\n(.*?)```", text, re.DOTALL)
    if "styleforge" not in torch.compiler.list_backends():
        example = example.replace('"styleforge"', "backend_of_this_tree")
    from sf_compile.backend import styleforge

    exec(compile(example, "README.md", "exec"), {"backend_of_this_tree": styleforge})
    assert capsys.readouterr().out == "(72, 128, 3) uint8\n" * 5
