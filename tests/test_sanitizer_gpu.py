"""compute-sanitizer over every family of kernels: no access beyond memory, no race in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sf_compile.cuda import hopper

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).with_name("sanitized.py")
TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
HOPPER = ("halo", "int8", "trunk")
FAMILIES = (*HOPPER, "mma", "network")


def sanitizer() -> str | None:
    """The tool, which comes with CUDA's toolkit; None where it is not installed."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    beside = os.pathsep.join(f"{place}/bin" for place in places if place)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All processes, side by side: each is slow, and most of that is a CPU's time."""
    tool = sanitizer()
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    families = FAMILIES if hopper.available(torch.cuda.current_device()) else FAMILIES[len(HOPPER) :]
    # A cached allocation would hide what is read or written behind a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    folder, started = tmp_path_factory.mktemp("sanitizer"), {}
    for family in ("faulty", *families):
        for check in TOOLS:
            command = [tool, "--tool", check, "--report-api-errors", "no", "--print-limit", "3"]
            with (folder / f"{family}.{check}").open("wb") as log:
                process = subprocess.Popen(
                    [*command, sys.executable, PROGRAM, family], stdout=log, stderr=log, env=environment
                )
            started[family, check] = process, folder / f"{family}.{check}"
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def faults(runs, family: str, check: str) -> tuple[int, str]:
    """How many the tool counted, and all that the process printed."""
    if (family, check) not in runs:
        pytest.skip("its kernels are for compute capability 9.0, where they are asked for")
    process, log = runs[family, check]
    process.wait(timeout=600)
    text = log.read_text(errors="replace")
    counted = re.findall(TOOLS[check], text)
    assert counted, f"no summary:\n{text[-3000:]}"
    return sum(map(int, counted)), text


@pytest.mark.parametrize("check", TOOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_found(runs, family, check):
    found, text = faults(runs, family, check)
    assert found == 0 and runs[family, check][0].returncode == 0, text[-3000:]
    assert len(re.findall("^ran ", text, re.MULTILINE)) >= 2, "it ran too little"


@pytest.mark.parametrize("check", TOOLS)
def test_a_fault_is_found(runs, check):
    found, text = faults(runs, "faulty", check)
    assert found > 0, text[-3000:]
