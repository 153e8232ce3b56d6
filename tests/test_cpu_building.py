"""The CPU kernels' library: built once, kept, found again, and done without where that cannot be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import built

from sf_compile import ops
from sf_compile.cpu import building
from sf_compile.ops import reference

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the kernels yet, and an empty cache folder."""
    monkeypatch.setattr(building, "_known", [])
    monkeypatch.setenv("STYLEFORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(building.VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.mark.parametrize("why", ["switch", "compiler", "ninja", "broken compiler"])
def test_without_a_compiler_the_reference_runs_and_says_so_once(fresh, monkeypatch, caplog, tmp_path, why):
    if why == "switch":
        monkeypatch.setenv(building.VARIABLE, "0")
    elif why == "compiler":
        monkeypatch.setattr(building, "compiler", lambda: None)
    elif why == "ninja":
        monkeypatch.setattr(building, "_ninja_folder", lambda: None)
    else:
        if building.missing() is not None:
            pytest.skip(str(building.missing()))
        broken = tmp_path / "broken-c++"
        broken.write_text(
            '#!/bin/sh\ncase "$*" in *-dumpfullversion*|*--version*|*-v*) exec c++ "$@";; esac\n'
            "echo 'error: no room' >&2; exit 1\n"
        )
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
    x = torch.randn(1, 4, 6, 6)
    with caplog.at_level(logging.INFO, logger="sf_compile"):
        for _ in range(3):
            got = ops.instance_norm(x, None, None, 1e-5)
    assert torch.equal(got, reference.normalize(x, *reference.statistics(x), None, None, 1e-5, "none", None))
    (record,) = [r for r in caplog.records if "PyTorch's own" in r.getMessage()]
    assert "Fix: " in record.getMessage()
    assert record.levelno == (logging.INFO if why == "switch" else logging.WARNING)
    assert not list(fresh.glob("cpu/*.so")) and not list(fresh.glob("cpu/.build-*"))


PROCESS = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from sf_compile.cpu import building
library = building.library()
assert library is not None
from sf_compile import ops
x = torch.randn(1, 8, 9, 9)
torch.testing.assert_close(ops.instance_norm(x, None, None, 1e-5), torch.nn.functional.instance_norm(x))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "STYLEFORGE_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, "-c", PROCESS], env=settings, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    return error


@built
def test_two_processes_build_one_library_and_a_damaged_one_is_built_again(tmp_path):
    """Kept in one test: every build takes seconds."""
    both = [finished(process) for process in [start(tmp_path), start(tmp_path)]]
    assert sum("Built the CPU kernels in" in error for error in both) == 1
    (library,) = tmp_path.glob("cpu/*.so")
    assert not list(tmp_path.glob("cpu/.build-*"))
    data = library.read_bytes()
    library.write_bytes(data[: len(data) // 2])
    error = finished(start(tmp_path))
    assert "damaged" in error and "Built the CPU kernels in" in error
    assert "Built" not in finished(start(tmp_path))
    assert building._load(library) is not None


def test_an_altered_library_is_not_loaded(fresh, caplog):
    path = building.place()
    assert path is not None and path.parent.parent == fresh
    assert building._load(path) is None  # not there
    path.parent.mkdir(parents=True)
    for content in (b"", b"\x7fELF" + bytes(100), building._MAGIC + bytes(32)):
        path.write_bytes(content)
        assert building._load(path) is None
    assert sum("damaged" in record.getMessage() for record in caplog.records) == 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
@built
def test_an_unwritable_folder_is_done_without(fresh, caplog):
    fresh.mkdir(mode=0o500)
    assert building.load_or_build() is not None
    assert "STYLEFORGE_CACHE_DIR" in caplog.text


def test_the_digest_follows_flags_version_and_sources(monkeypatch, tmp_path):
    first = building.digest()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    second = building.digest()
    monkeypatch.setattr(building, "flags", lambda: ["-O1"])
    third = building.digest()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.h").write_text("// another")
    monkeypatch.setattr(building, "source_directory", lambda: tmp_path)
    assert len({first, second, third, building.digest()}) == 4
