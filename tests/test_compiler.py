"""Kernel compilation and its disk cache, on a machine that needs no GPU."""

import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from sf_compile.cuda import cache, compiler
from sf_compile.cuda.cache import DiskCache, default_directory, entry_digest
from sf_compile.cuda.compiler import ARCHITECTURES, KernelCompileError, KernelKey, KernelUnavailable

REPOSITORY = Path(__file__).parents[1]
HEADER = "#pragma once\n#define FACTOR 2.0f\n"
SOURCE = """
#include "scale.cuh"
extern "C" __global__ void scale(float* x, float a, long long n) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) x[i] = x[i] * a * FACTOR + (float)OFFSET;
}
"""
needs_nvrtc = pytest.mark.skipif(compiler.available() is not None, reason=str(compiler.available()))


def key(offset: int | str = 1, arch: str = "sm_90a", source: str = "scale.cu") -> KernelKey:
    return KernelKey(source, (("OFFSET", offset),), arch)


def forget() -> None:
    compiler._memo.clear()
    compiler._locks.clear()
    cache._unusable.clear()
    cache._damaged.clear()
    for memoised in (compiler.nvrtc_version, compiler.available, compiler.usable_or_warn,
                     compiler._supported_architectures):
        memoised.cache_clear()


@pytest.fixture(autouse=True)
def fresh_process():
    """Forget what the process remembers, before and after, as a new process would."""
    forget()
    yield
    forget()


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A folder of kernel sources in the place of the real one, and an empty cache folder."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "scale.cuh").write_text(HEADER)
    (folder / "scale.cu").write_text(SOURCE)
    monkeypatch.setattr(compiler, "source_directory", lambda: folder)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return folder


@pytest.fixture
def nvrtc_runs(monkeypatch):
    """The keys that reached NVRTC, in order."""
    runs = []
    run_nvrtc = compiler._run_nvrtc

    def counted(kernel_key, *rest):
        runs.append(kernel_key)
        return run_nvrtc(kernel_key, *rest)

    monkeypatch.setattr(compiler, "_run_nvrtc", counted)
    return runs


def cached_files(csrc: Path) -> list[Path]:
    return sorted((csrc.parent / "cache").iterdir())


def test_key_is_readable_sorted_and_checked():
    unsorted = KernelKey("normalize.cu", (("DTYPE", "half"), ("ACT", True)), "sm_90a")
    assert str(unsorted) == "normalize.cu[ACT=1,DTYPE=half]@sm_90a"
    assert unsorted == KernelKey("normalize.cu", (("ACT", 1), ("DTYPE", "half")), "sm_90a")
    with pytest.raises(ValueError, match="not a C identifier"):
        KernelKey("normalize.cu", (("A B", 1),), "sm_90a")
    with pytest.raises(ValueError, match="more than once"):
        KernelKey("normalize.cu", (("A", 1), ("A", 2)), "sm_90a")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120"),
     ((8, 7), "sm_86"), ((12, 1), "sm_120")],
)
def test_architecture_of_a_known_family(capability, expected):
    assert compiler.architecture(capability) == expected


def test_architecture_of_another_family_is_the_one_of_the_gpu(monkeypatch):
    monkeypatch.setattr(compiler, "_supported_architectures", lambda: frozenset({75, 91, 100}))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    assert compiler.architecture((10, 0)) == "sm_100"
    assert compiler.architecture((7, 5)) == "sm_75"
    assert compiler.architecture((9, 1)) == "sm_91", "an sm_90a cubin runs on 9.0 alone"
    with pytest.raises(KernelUnavailable, match=r"NVRTC 13\.0 cannot compile for compute capability 7\.0"):
        compiler.architecture((7, 0))


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(csrc, arch):
    cubin = compiler.compile_kernel(key(arch=arch))
    assert cubin.startswith(b"\x7fELF")
    assert b"scale" in cubin
    assert compiler.compile_kernel(key(arch=arch)) is cubin, "the second call is a look-up in this process"


@needs_nvrtc
def test_every_named_architecture_is_one_nvrtc_supports():
    supported = compiler._supported_architectures()
    assert {int(arch.removeprefix("sm_").rstrip("a")) for arch in ARCHITECTURES} <= supported


@needs_nvrtc
def test_second_process_reads_the_cache(csrc, nvrtc_runs):
    first = compiler.compile_kernel(key())
    forget()
    assert compiler.compile_kernel(key()) == first
    assert nvrtc_runs == [key()]
    assert len(cached_files(csrc)) == 1


@needs_nvrtc
def test_forgotten_kernel_is_read_from_the_cache(csrc, nvrtc_runs, monkeypatch):
    first = compiler.compile_kernel(key())
    other = compiler.compile_kernel(key(2))
    reads = []
    get = cache.DiskCache.get
    monkeypatch.setattr(cache.DiskCache, "get", lambda *of: reads.append(of) or get(*of))
    compiler.forget(key())
    assert compiler.compile_kernel(key()) == first
    assert compiler.compile_kernel(key(2)) == other
    assert len(reads) == 1 and nvrtc_runs == [key(), key(2)]


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:20], lambda data: data[:-1],
     lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]],
    ids=["emptied", "truncated header", "truncated", "one bit flipped"],
)
def test_damaged_entry_is_reported_once_and_rebuilt(csrc, nvrtc_runs, caplog, damage):
    cubin = compiler.compile_kernel(key())
    (entry,) = cached_files(csrc)
    intact = entry.read_bytes()
    for _ in range(2):
        entry.write_bytes(damage(intact))
        compiler._memo.clear()
        assert compiler.compile_kernel(key()) == cubin
        assert entry.read_bytes() == intact
    assert len(nvrtc_runs) == 3
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 1
    assert str(entry) in messages[0] and "damaged" in messages[0]


@needs_nvrtc
def test_unwritable_folder_is_reported_once_and_done_without(csrc, nvrtc_runs, monkeypatch, caplog):
    file = csrc.parent / "a file"
    file.write_text("not a folder")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(file / "cache"))
    for offset in (1, 2):
        assert compiler.compile_kernel(key(offset)).startswith(b"\x7fELF")
    assert nvrtc_runs == [key(1), key(2)]
    (message,) = [r.getMessage() for r in caplog.records]
    assert str(file / "cache") in message and "Not a directory" in message
    assert cache.CACHE_VARIABLE in message


def test_failed_write_leaves_no_file_and_keeps_the_old_entry(tmp_path, monkeypatch, caplog):
    store = DiskCache(tmp_path)
    store.put("d" * 64, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.put("d" * 64, b"another")
    assert [path.name for path in tmp_path.iterdir()] == ["d" * 64 + ".cubin"]
    assert store.get("d" * 64) == b"old"
    assert "No space left on device" in caplog.text


def test_user_without_a_home_folder(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for variable in (cache.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    store = DiskCache()
    store.put("d" * 64, b"payload")
    assert store.get("d" * 64) is None
    assert store.get("e" * 64) is None
    assert len(caplog.records) == 1
    assert cache.CACHE_VARIABLE in caplog.text


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [("linux", {cache.CACHE_VARIABLE: "/chosen", "XDG_CACHE_HOME": "/xdg"}, "/chosen"),
     ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/sf_compile"),
     ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/sf_compile"),
     ("linux", {}, "/home/me/.cache/sf_compile"),
     ("darwin", {}, "/home/me/Library/Caches/sf_compile"),
     ("win32", {"LOCALAPPDATA": "/local"}, "/local/sf_compile")],
)
def test_default_directory(monkeypatch, platform, variables, expected):
    for variable in (cache.CACHE_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert default_directory() == Path(expected)


@needs_nvrtc
def test_what_changes_the_digest(csrc, nvrtc_runs, monkeypatch):
    def recompiles(**changed) -> bool:
        before = len(nvrtc_runs)
        compiler._memo.clear()
        compiler.compile_kernel(key(**changed))
        return len(nvrtc_runs) > before

    assert recompiles()
    assert not recompiles()
    assert recompiles(offset=2), "a constant"
    assert recompiles(arch="sm_80"), "the architecture"
    (csrc / "scale.cuh").write_text(HEADER.replace("2.0f", "3.0f"))
    assert recompiles(), "a header"
    (csrc / "scale.cu").write_text(SOURCE + "\n")
    assert recompiles(), "the source"
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    assert recompiles(), "NVRTC's version"
    assert not recompiles()


def test_digest_keeps_its_parts_apart():
    digests = {entry_digest(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"abc", b""])}
    assert len(digests) == 4


@needs_nvrtc
def test_threads_compile_one_key_once_and_different_keys_each(csrc, nvrtc_runs):
    keys = [key(1), key(1), key(2), key(1), key(2)]
    start = threading.Barrier(len(keys))
    cubins = {}

    def compile_it(index):
        start.wait()
        cubins[index] = compiler.compile_kernel(keys[index])

    threads = [threading.Thread(target=compile_it, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, nvrtc_runs)) == [str(key(1)), str(key(2))]
    assert cubins[0] == cubins[1] == cubins[3] and cubins[2] == cubins[4] != cubins[0]
    assert len(cached_files(csrc)) == 2


@needs_nvrtc
def test_processes_compiling_at_once_leave_one_valid_entry(csrc):
    program = (
        "import pathlib, sys\n"
        "from sf_compile.cuda import compiler\n"
        "compiler.source_directory = lambda: pathlib.Path(sys.argv[1])\n"
        "key = compiler.KernelKey('scale.cu', (('OFFSET', 1),), 'sm_90a')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(len(compiler.compile_kernel(key)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(csrc)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    sizes = [int(child.communicate(timeout=60)[0]) for child in children]
    (entry,) = cached_files(csrc)
    assert sizes == [len(DiskCache().get(entry.stem))] * 2


@needs_nvrtc
def test_compile_error_shows_log_and_key(csrc):
    (csrc / "broken.cu").write_text('extern "C" __global__ void broken(float* x) { x[0] = missing; }\n')
    broken = key(source="broken.cu")
    with pytest.raises(KernelCompileError) as raised:
        compiler.compile_kernel(broken)
    text = str(raised.value)
    assert "broken.cu[OFFSET=1]@sm_90a" in text
    assert 'identifier "missing" is undefined' in text and "broken.cu(1)" in text
    assert raised.value.key == broken
    assert str(pickle.loads(pickle.dumps(raised.value))) == text
    assert not (csrc.parent / "cache").exists()


@needs_nvrtc
def test_unknown_architecture_shows_log_and_key(csrc):
    with pytest.raises(KernelCompileError, match=r"(?s)@sm_999:.*gpu-architecture"):
        compiler.compile_kernel(key(arch="sm_999"))


def test_missing_source_names_what_is_there(csrc):
    with pytest.raises(FileNotFoundError, match=r"no kernel source absent\.cu .*there: scale\.cu"):
        compiler.compile_kernel(key(source="absent.cu"))


@needs_nvrtc
def test_compile_log_has_registers_and_spills(csrc, nvrtc_runs):
    for _ in range(2):
        log = compiler.compile_log(key())
        assert "Used " in log and " registers" in log
        assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert len(nvrtc_runs) == 2
    assert not (csrc.parent / "cache").exists()


def assert_unavailable(csrc, caplog, what: str) -> None:
    with pytest.raises(KernelUnavailable, match=what) as raised:
        compiler.compile_kernel(key())
    assert 'pip install "sf_compile[nvrtc]"' in str(raised.value)
    assert compiler.available() == str(raised.value)
    assert not compiler.usable_or_warn() and not compiler.usable_or_warn()
    (message,) = [r.getMessage() for r in caplog.records]
    assert str(raised.value) in message


def test_without_cuda_bindings(csrc, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert_unavailable(csrc, caplog, "cuda-bindings is missing")


def test_without_the_nvrtc_library(csrc, monkeypatch, caplog):
    def version():
        raise RuntimeError("Failed to dlopen libnvrtc.so.13\nand a long search report")

    fake = SimpleNamespace(nvrtcVersion=version)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(nvrtc=fake)))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=fake))
    assert_unavailable(csrc, caplog, r"NVRTC's library is missing \(Failed to dlopen libnvrtc\.so\.13\)")


@needs_nvrtc
def test_usable_is_silent(caplog):
    assert compiler.available() is None
    assert compiler.usable_or_warn()
    assert not caplog.records


def test_source_directory_of_a_checkout_of_a_wheel_and_of_neither(tmp_path, monkeypatch):
    package = tmp_path / "sf_compile"
    (package / "cuda").mkdir(parents=True)
    monkeypatch.setattr(compiler, "__file__", str(package / "cuda" / "compiler.py"))
    with pytest.raises(FileNotFoundError, match="incomplete, install it again"):
        compiler.source_directory()
    (tmp_path / "csrc").mkdir()
    assert compiler.source_directory() == tmp_path / "csrc"
    (package / "csrc").mkdir()
    assert compiler.source_directory() == package / "csrc"


def test_importing_touches_no_cuda():
    # PyTorch may import parts of cuda-bindings by itself: only what comes on top of that counts.
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import sf_compile.cuda.compiler, sf_compile.cuda.loader\n"
        "print([n for n in set(sys.modules) - before if n.startswith('cuda')], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.stdout.strip() == "[] False"
