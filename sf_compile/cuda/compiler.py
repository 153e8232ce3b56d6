"""From ``csrc/*.cu`` and compile-time constants to a cubin, by NVRTC.

The kernel sources are self-contained: they include no CUDA header, and what they share lies in
``csrc/*.cuh``, handed to NVRTC as text. Nothing is searched for on disk, so a cubin depends on exactly what
its cache digest covers. cuda-bindings and NVRTC are imported on the first call, and a machine that lacks them
gets ``KernelUnavailable`` with the command that installs them.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_compile.cuda.cache import DiskCache, entry_digest

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
"""The GPU architectures that every kernel is written and compiled for in CI."""

_KNOWN = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (12, 0): "sm_120"}
_INSTALL = 'pip install "sf_compile[nvrtc]"'
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_log = logging.getLogger(__name__)


class KernelUnavailable(RuntimeError):
    """This machine cannot compile kernels; the message says what is missing and how to install it."""


class KernelCompileError(RuntimeError):
    """NVRTC rejected a kernel. ``key`` (KernelKey) and ``log`` (str, NVRTC's) are in the message too."""

    def __init__(self, key: KernelKey, log: str) -> None:
        super().__init__(f"NVRTC could not compile {key}:\n{log}")
        self.key = key
        self.log = log

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.key, self.log))


@dataclass(frozen=True)
class KernelKey:
    """What a cubin is made from.

    ``source`` is a file name in ``csrc``; ``constants`` are (NAME, value) pairs, each given to the compiler
    as ``-DNAME=value`` and kept sorted by name; ``arch`` is an NVRTC architecture such as "sm_90a". A bool
    becomes 0 or 1. ValueError for a name that is no C identifier or that occurs twice.
    """

    source: str
    constants: tuple[tuple[str, int | str], ...]
    arch: str

    def __post_init__(self) -> None:
        pairs = sorted((name, int(v) if isinstance(v, bool) else v) for name, v in self.constants)
        names = [name for name, _ in pairs]
        for name in names:
            if not _IDENTIFIER.fullmatch(name):
                raise ValueError(f"{name!r} is not a C identifier: a kernel constant becomes -DNAME=VALUE")
            if names.count(name) > 1:
                raise ValueError(f"the kernel constant {name} of {self.source} is given more than once")
        object.__setattr__(self, "constants", tuple(pairs))

    def __str__(self) -> str:
        constants = ",".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.source}[{constants}]@{self.arch}"


def architecture(capability: tuple[int, int]) -> str:
    """Return the NVRTC architecture to compile for on a GPU of compute ``capability`` (major, minor).

    A cubin also runs on a later minor version of the same major version (CUDA C++ Programming Guide, "Binary
    Compatibility"), so an unlisted GPU gets the nearest listed architecture below it. sm_90a is the
    exception: it runs on 9.0 alone. Anything else is named after the GPU itself, for kernels that need only
    the baseline features. KernelUnavailable where the installed NVRTC cannot compile for it.
    """
    if capability in _KNOWN:
        return _KNOWN[capability]
    major, minor = capability
    below = [known for known in _KNOWN if known[0] == major and known[1] <= minor and known != (9, 0)]
    if below:
        return _KNOWN[max(below)]
    if 10 * major + minor not in _supported_architectures():
        version = ".".join(map(str, nvrtc_version()))
        raise KernelUnavailable(
            f"NVRTC {version} cannot compile for compute capability {major}.{minor}: use a PyTorch build "
            "whose CUDA version supports this GPU, or stay on PyTorch's own kernels"
        )
    return f"sm_{major}{minor}"


def source_directory() -> Path:
    """Return the folder of the kernel sources.

    ``sf_compile/csrc`` in an installed wheel, ``csrc`` beside the package in a checkout. FileNotFoundError
    where neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "csrc", package.parent / "csrc")
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"the kernel sources are in neither {places[0]} nor {places[1]}: this installation of sf_compile is "
        "incomplete, install it again"
    )


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's version as (major, minor); KernelUnavailable without NVRTC or cuda-bindings."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelUnavailable(
            f"cuda-bindings is missing ({error}), so CUDA kernels cannot be compiled. Fix: {_INSTALL}"
        ) from error
    try:
        result, major, minor = nvrtc.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        # cuda-bindings looks for libnvrtc in its first call, and answers with one of these when it fails.
        first_line = str(error).partition("\n")[0]
        raise KernelUnavailable(
            f"NVRTC's library is missing ({first_line}), so CUDA kernels cannot be compiled. Fix: {_INSTALL}"
        ) from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelUnavailable(f"nvrtcVersion failed with {result.name}. Reinstall NVRTC: {_INSTALL}")
    return major, minor


@functools.cache
def available() -> str | None:
    """Return None when kernels can be compiled here, else the reason why not, with the fix."""
    try:
        nvrtc_version()
    except KernelUnavailable as error:
        return str(error)
    return None


@functools.cache
def usable_or_warn() -> bool:
    """Return whether kernels can be compiled here; where not, log the reason once as a warning.

    For an op that has a plain PyTorch path to fall back on.
    """
    reason = available()
    if reason is not None:
        _log.warning("sf_compile runs without its CUDA kernels, on PyTorch's own: %s", reason)
    return reason is None


_memo: dict[KernelKey, bytes] = {}
_locks: dict[KernelKey, threading.Lock] = {}


def compile_kernel(key: KernelKey) -> bytes:
    """Return the cubin of ``key``: from this process, else from the disk cache, else from NVRTC.

    Thread safe: of several threads asking for one key, one compiles; different keys compile side by side.
    Raises KernelUnavailable (no NVRTC or cuda-bindings), KernelCompileError (with NVRTC's log) or
    FileNotFoundError (no such source).
    """
    cubin = _memo.get(key)
    if cubin is not None:
        return cubin
    with _locks.setdefault(key, threading.Lock()):
        cubin = _memo.get(key)
        if cubin is None:
            source, headers = _read_sources(key)
            options = _options(key)
            digest = _digest(source, headers, options)
            cache = DiskCache()
            cubin = cache.get(digest)
            if cubin is None:
                cubin, _ = _run_nvrtc(key, source, headers, options)
                cache.put(digest, cubin)
            _memo[key] = cubin
    return cubin


def forget(key: KernelKey) -> None:
    """Let the next ``compile_kernel`` of ``key`` look into the disk cache, as in a new process."""
    _memo.pop(key, None)


def compile_log(key: KernelKey) -> str:
    """Compile ``key`` without any cache and return NVRTC's log with ptxas' report in it.

    The report has, per kernel, the registers used and the bytes of stack frame and of spill stores and loads.
    Raises as ``compile_kernel`` does.
    """
    source, headers = _read_sources(key)
    options = [*_options(key), "--ptxas-options=-v"]
    if nvrtc_version() >= (13, 0):
        # Where a driver is installed NVRTC has a cache of its own, and a hit there has an empty log.
        options.append("--no-cache")
    _, log = _run_nvrtc(key, source, headers, options)
    return log


def _read_sources(key: KernelKey) -> tuple[bytes, dict[str, bytes]]:
    directory = source_directory()
    path = directory / key.source
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.glob("*.cu"))) or "none"
        raise FileNotFoundError(f"no kernel source {key.source} in {directory} (there: {there})")
    # All headers, used or not: finding out which ones a source includes would need a preprocessor.
    headers = {header.name: header.read_bytes() for header in sorted(directory.glob("*.cuh"))}
    return path.read_bytes(), headers


def _options(key: KernelKey) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in key.constants]
    return [f"--gpu-architecture={key.arch}", "--std=c++17", *defines]


def _digest(source: bytes, headers: dict[str, bytes], options: list[str]) -> str:
    """Digest all that a cubin depends on; the architecture is one of the options."""
    version = "nvrtc {}.{}".format(*nvrtc_version())
    counts = f"{len(headers)} headers, {len(options)} options"
    texts = [part for name, text in headers.items() for part in (name.encode(), text)]
    return entry_digest([version.encode(), counts.encode(), source, *texts, *map(str.encode, options)])


@functools.cache
def _supported_architectures() -> frozenset[int]:
    nvrtc_version()
    from cuda.bindings import nvrtc

    result, supported = nvrtc.nvrtcGetSupportedArchs()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelUnavailable(f"nvrtcGetSupportedArchs failed with {result.name}")
    return frozenset(supported)


def _run_nvrtc(
    key: KernelKey, source: bytes, headers: dict[str, bytes], options: list[str]
) -> tuple[bytes, str]:
    """Compile and return (cubin, log); the log is empty when NVRTC has nothing to say."""
    nvrtc_version()  # reports what is missing, before the import below can fail
    from cuda.bindings import nvrtc

    codes = nvrtc.nvrtcResult

    def check(step: str, answer: tuple[Any, ...]) -> Any:
        if answer[0] != codes.NVRTC_SUCCESS:
            raise KernelCompileError(key, f"{step} failed with {answer[0].name}")
        return answer[1] if len(answer) > 1 else None

    names = [name.encode() for name in headers]
    program = check(
        "nvrtcCreateProgram",
        nvrtc.nvrtcCreateProgram(source, key.source.encode(), len(names), list(headers.values()), names),
    )
    try:
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        # A bytearray, for NVRTC writes into it: Python shares short bytes objects.
        buffer = bytearray(check("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program)))
        check("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.rstrip(b"\0").decode(errors="replace").strip()
        if result == codes.NVRTC_ERROR_BUILTIN_OPERATION_FAILURE:
            # libnvrtc was found but libnvrtc-builtins, which lies beside it, was not.
            raise KernelUnavailable(f"NVRTC is incomplete ({log}). Fix: {_INSTALL}")
        if result != codes.NVRTC_SUCCESS:
            raise KernelCompileError(key, log or f"nvrtcCompileProgram failed with {result.name}")
        cubin = bytearray(check("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program)))
        check("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)
