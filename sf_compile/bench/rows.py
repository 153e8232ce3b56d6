"""Rows: what a number needs beside it, and how rows become a file."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT_KEYS = ("run", "date", "device", "gpu", "driver", "torch", "cuda", "commit", "cpu", "threads")
NETWORK_KEYS = (
    *ENVIRONMENT_KEYS,
    *("network", "network_width", "blocks", "checkpoint", "batch", "height", "width", "dtype"),
    *("peer", "precision", "tf32", "graphs", "layout", "condition"),
    *("median_ms", "p20_ms", "p80_ms", "back_to_back_ms", "host_us", "peak_mb"),
    *("compile_cold_s", "compile_warm_s", "kernels_cold_s", "kernels_warm_s"),
    *("floor_ms", "ceiling_tflops", "copy_gbps", "kernels", "mma_tflops", "share_of_mma"),
    *("error_vs_float64", "psnr_db"),
)
INSTANCE_NORM_KEYS = (
    *ENVIRONMENT_KEYS,
    *("op", "shape", "layout", "dtype", "variant", "peer", "condition"),
    *("median_us", "p20_us", "p80_us", "bytes", "gbps", "copy_gbps", "share_of_copy", "error_vs_float64"),
)
LAYER_KEYS = (
    *ENVIRONMENT_KEYS,
    *("layer", "size", "shape", "layout", "dtype", "peer", "condition"),
    *("median_us", "p20_us", "p80_us", "arithmetic", "flops", "tflops", "bytes"),
    *("ceiling_tflops", "share_of_ceiling", "copy_gbps", "kernel", "mma_tflops", "share_of_mma"),
    "error_vs_float64",
)
PIPELINE_KEYS = (
    *ENVIRONMENT_KEYS,
    *("network", "network_width", "blocks", "batch", "height", "width", "dtype", "peer", "backend"),
    *("pictures", "pictures_per_s", "slowest_per_s", "fastest_per_s", "share_of_compute"),
    "error_vs_float64",
)

_DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")

Row = dict[str, Any]
Log = Callable[[str], None]
Keep = Callable[[Sequence[Row]], None]


def forget(rows: Sequence[Row]) -> None:
    """A `Keep` that does nothing: the rows are only returned at the end."""


class BenchmarkError(Exception):
    """The benchmark cannot go on, or would publish a wrong number; the message says what to do."""


@dataclass(frozen=True)
class Environment:
    """Where and with what a run was made; the same for all rows of a process.

    `gpu`, `driver` and `cuda` are None on a CPU, `cpu` (its name and vectors) and `threads` on a GPU;
    `commit` is None where it cannot be found.
    """

    run: str
    date: str
    device: str
    gpu: str | None
    driver: str | None
    torch: str
    cuda: str | None
    commit: str | None
    cpu: str | None
    threads: int | None


def environment_of(device: torch.device) -> Environment:
    """Describe this process and `device`; starts ``git`` and, for a GPU, ``nvidia-smi``."""
    on_gpu = device.type == "cuda"
    return Environment(
        run=uuid.uuid4().hex[:12],
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=device.type,
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        driver=_first_line(*_DRIVER_QUERY) if on_gpu else None,
        torch=torch.__version__,
        cuda=torch.version.cuda if on_gpu else None,
        commit=commit(),
        cpu=None if on_gpu else _cpu_name(),
        threads=None if on_gpu else torch.get_num_threads(),
    )


def _cpu_name() -> str:
    """Return the CPU's name as Linux has it, and the widest vectors that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str | None:
    """Return the short commit of the checkout this package runs from, with ``-dirty`` where it was changed.

    ``STYLEFORGE_COMMIT`` overrides it, for a tree that travelled without its history. None where
    neither is known, for example for an installed wheel.
    """
    given = os.environ.get("STYLEFORGE_COMMIT")
    if given:
        return given
    package = Path(__file__).resolve().parents[1]
    git = ("git", "-C", str(package))
    # A wheel installed inside some other project's checkout must not report that project's commit.
    if _first_line(*git, "ls-files", "__init__.py") is None:
        return None
    head = _first_line(*git, "rev-parse", "--short", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _first_line(*git, "status", "--porcelain") is not None else "")


def _first_line(*command: str) -> str | None:
    """Return the first line that `command` prints, None where it fails, prints nothing or is absent."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def check_output(path: Path, *, force: bool) -> None:
    """Refuse, before any time is spent, an output file that could not or must not be written.

    Raises:
        BenchmarkError: the file exists and `force` is false, or its folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise BenchmarkError(f"the folder of {path} does not exist: create it first")
    if path.is_dir():
        raise BenchmarkError(f"{path} is a folder: name a file")
    if path.exists() and not force:
        raise BenchmarkError(f"{path} exists: choose another name, or pass --force to replace it")


def write_rows(path: Path, rows: Sequence[Row], *, force: bool) -> None:
    """Write `rows` to `path` as a JSON list of objects, all or nothing.

    Raises:
        BenchmarkError: see :func:`check_output`.
        ValueError: a row holds a NaN or an infinity, which JSON cannot.
    """
    check_output(path, force=force)
    text = "[\n" + ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which takes the place of `path` in one step if nothing is raised."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Return `value` to `digits` significant digits; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
