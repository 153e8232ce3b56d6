"""csrc/cpu as a shared library: built with ninja at first use, kept on disk, loaded with ctypes.

The library has a plain C interface, so that its sources include at::vec and at::parallel_for alone and
compile in seconds; what binds C++ to PyTorch's dispatcher would treble that. Who builds it holds a lock that
ends with its process; others wait and then load it. It is built in a folder of its own, checked by loading
it, and then moved to its place in one step with a checksum behind it (a loader ignores what follows the ELF),
which is verified before the file is loaded: a damaged one is built again.

``library`` raises nothing for what is wrong with a compiler or a folder: it is said once, with the fix, and
the ops run on PyTorch's own kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from sf_compile.cuda.cache import CACHE_VARIABLE, default_directory, entry_digest
from sf_compile.cuda.compiler import source_directory

VARIABLE = "STYLEFORGE_CPU_KERNELS"
"""Set to 0 (or off, false, no) to do without the C++ kernels."""

KERNELS = ("statistics", "groups", "finish", "layout", "assemble", "winograd")

_MAGIC = b"\nsf_compile cpu kernels 1\n"
_HASH_BYTES = hashlib.sha256().digest_size
_BUILD_LIMIT_SECONDS = 600

# What at::vec wants of a compiler for what PyTorch found this CPU to have (as Inductor compiles).
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512",
    ],
}  # fmt: skip

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class Unavailable(RuntimeError):
    """There are no CPU kernels here; the message says why, and ends with the fix."""


class Damaged(RuntimeError):
    """The file is not the library that was written."""


def switched_off() -> bool:
    """Whether the user wants to do without."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("0", "off", "false", "no")


def compiler() -> str | None:
    """The C++ compiler that torch.utils.cpp_extension would call; None where there is none."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))),
        None,
    )


def _ninja_folder() -> str | None:
    """The folder of ninja: of the PATH's, else of the package's, which an environment not activated hides."""
    found = shutil.which("ninja")
    if found is not None:
        return os.path.dirname(found)
    beside = os.path.dirname(sys.executable)
    if shutil.which("ninja", path=beside):
        return beside
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return getattr(ninja, "BIN_DIR", None)
    return None


def missing() -> str | None:
    """Why the kernels cannot be built here, with the fix; None where nothing seems to be missing."""
    if switched_off():
        return f"{VARIABLE} is {os.environ[VARIABLE]}. Fix: unset it"
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, this is {sys.platform}. Fix: none; the results are the same"
    if compiler() is None:
        return "there is no C++ compiler. Fix: install g++ (apt-get install g++), or set CXX to a compiler"
    if _ninja_folder() is None:
        return "there is no ninja. Fix: pip install ninja"
    if importlib.util.find_spec("setuptools") is None:
        return "torch.utils.cpp_extension needs setuptools. Fix: pip install setuptools"
    return None


def sources() -> list[Path]:
    """The files that are compiled; the headers beside them are included by these."""
    return sorted((source_directory() / "cpu").glob("*.cpp"))


def flags() -> list[str]:
    """Of the compiler, beside those that torch.utils.cpp_extension gives it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        "-O3", "-fopenmp", "-fno-math-errno", "-Wno-unknown-pragmas",
        *_INSTRUCTIONS.get(capability, []), f"-DCPU_CAPABILITY={capability.replace(' ', '_')}",
    ]  # fmt: skip


def digest() -> str:
    """Of everything that the library is made of."""
    headers = sorted((source_directory() / "cpu").glob("*.h"))
    parts = [part for path in [*sources(), *headers] for part in (path.name.encode(), path.read_bytes())]
    made_by = [torch.__version__, str(torch.version.git_version), compiler() or "", *flags()]
    return entry_digest([_MAGIC, *map(str.encode, made_by), *parts])


def place(directory: Path | None = None) -> Path | None:
    """Where the library is kept, whether it is there or not; None where there is no folder for it."""
    folder = default_directory() if directory is None else directory
    return None if folder is None else folder / "cpu" / f"{digest()}.so"


_known: list[ctypes.CDLL | None] = []


def library() -> ctypes.CDLL | None:
    """The library, built if need be; None, after one warning, where there can be none."""
    if not _known:
        with _lock:
            if not _known:
                _known.append(_library())
    return _known[0]


def _library() -> ctypes.CDLL | None:
    found = None
    reason = missing()
    if reason is None:
        try:
            found = load_or_build()
        except Unavailable as error:
            reason = str(error)
    if found is None:
        level = logging.INFO if switched_off() else logging.WARNING
        _log.log(level, "Without C++ kernels the fused ops run on PyTorch's own on this CPU: %s.", reason)
    return found


def load_or_build(directory: Path | None = None) -> ctypes.CDLL:
    """The library from its place in ``directory`` (by default the cache folder), or built and put there.

    Raises:
        Unavailable: it cannot be built, or what was built cannot be loaded.
    """
    try:
        path = place(directory)
        if path is None:
            raise OSError("no home folder was found for this user")
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _load(path)
        if found is not None:
            return found
        with _held(path.with_suffix(".lock")):
            found = _load(path)  # which another process has built meanwhile
            return _build(path) if found is None else found
    except OSError as error:
        _log.warning(
            "The folder for CPU kernels cannot be used (%s), so every process builds them again. Set %s to a "
            "folder that you can write to.", error, CACHE_VARIABLE,
        )  # fmt: skip
        try:
            return _build(None)
        except OSError as problem:
            raise Unavailable(f"{problem}. Fix: set TMPDIR to a folder that you can write to") from problem


def _load(path: Path) -> ctypes.CDLL | None:
    """The library at ``path``; None where there is none, or one that must be built again."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    payload, end = data[: -len(_MAGIC) - _HASH_BYTES], data[-len(_MAGIC) - _HASH_BYTES :]
    if end != _MAGIC + hashlib.sha256(payload).digest():
        _log.warning(
            "The CPU kernels in %s are damaged (%d bytes, wrong checksum): rebuilding them.", path, len(data)
        )
        return None
    try:
        return _opened(path)
    except OSError as error:
        _log.warning("The CPU kernels in %s cannot be loaded (%s): rebuilding them.", path, error)
        return None


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in KERNELS:
        if not hasattr(library, f"styleforge_{name}"):
            raise OSError(f"styleforge_{name} is not in it")
    return library


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock between processes, free again when its holder dies; none on a file system without locks."""
    import fcntl

    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _build(path: Path | None) -> ctypes.CDLL:
    """Compile, load and keep at ``path``, unless that is None."""
    begin = time.perf_counter()
    _log.info("Building the CPU kernels (once for this version of PyTorch; some 20 s).")
    folder = Path(tempfile.mkdtemp(prefix=".build-", dir=None if path is None else path.parent))
    try:
        built = _compiled(folder)
        data = built.read_bytes()
        whole = built.with_name("checked.so")
        with open(whole, "xb") as file:
            file.write(data + _MAGIC + hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        try:
            loaded = _opened(whole)
        except OSError as error:
            raise Unavailable(
                f"what was built cannot be loaded ({error}). Fix: set {VARIABLE}=0, and report it"
            ) from error
        if path is not None:
            os.replace(whole, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _log.info("Built the CPU kernels in %.1f s%s.", time.perf_counter() - begin, f": {path}" if path else "")
    return loaded


_COMPILE = """
import json, sys
from torch.utils.cpp_extension import load
load(is_python_module=False, with_cuda=False, **json.loads(sys.argv[1]))
"""


def _compiled(folder: Path) -> Path:
    """What torch.utils.cpp_extension makes of the sources with ninja.

    In a process of its own: it writes to the environment and to standard output, loads what it has built, and
    should it hang or crash, this process goes on.
    """
    import json

    name = "styleforge_cpu"
    arguments = {
        "name": name, "sources": [str(path) for path in sources()], "extra_cflags": flags(),
        "extra_ldflags": ["-fopenmp"], "build_directory": str(folder),
    }  # fmt: skip
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join(filter(None, (environment.get("PATH"), _ninja_folder())))
    try:
        done = subprocess.run(
            [sys.executable or "python3", "-c", _COMPILE, json.dumps(arguments)], cwd=folder, env=environment,
            capture_output=True, text=True, timeout=_BUILD_LIMIT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"building them failed ({error}). Fix: run `styleforge doctor`") from error
    library = folder / f"{name}.so"
    if done.returncode or not library.is_file():
        output = (done.stdout + done.stderr).strip()
        _log.debug("building the CPU kernels failed:\n%s", output)
        lines = (
            [line for line in output.splitlines() if "error" in line.lower()]
            or output.splitlines()[-1:]
            or ["?"]
        )
        raise Unavailable(
            f"building them with {compiler()} failed ({lines[0].strip()[:300]}). Fix: try another compiler "
            f"with CXX, or set {VARIABLE}=0; TORCH_LOGS=+sf_compile shows all of it"
        )
    return library
