"""Kernels on the CPU: compiled by g++ with stand-ins for their instructions, run thread by thread.

``emulation/`` has the stand-ins; everything else is the kernel's own source.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sf_compile.cuda.compiler import source_directory

EMULATION = Path(__file__).parent / "emulation"
_SOURCES = (
    "mma_conv.cu", "mma_tile.cuh", "mma_statistics.cuh", "norm.cuh", "source.cuh", "channel_sums.cuh",
    "last_conv.cu", "last_rows.cuh", "operand_chunk.cuh", "activation.cuh", "mma_ceiling.cu",
)  # fmt: skip
_LAST_BLOCK = """
DEVICE bool completes(u32* count, u32 share, u32 whole, int thread, int threads, int barrier) {
  static bool last;
  __syncthreads();
  if (thread == 0) {
    last = atomicAdd(count, share) + share == whole;
    if (last) *count = 0;
  }
  __syncthreads();
  return last;
}
"""
_MAIN = """
extern "C" const char* launch(u32 grid, u32 threads, u32 bytes, const u64* values, u32 seed) {
  return emulator::launch(KERNEL_NAME, grid, threads, bytes, values, seed);
}
"""


@functools.cache
def folder() -> Path:
    """A folder with the sources, where instructions are replaced by stand-ins."""
    made = Path(tempfile.mkdtemp(prefix="styleforge-emulation-"))
    for name in _SOURCES:
        text = (source_directory() / name).read_text()
        if name == "channel_sums.cuh":
            text = re.sub(r"DEVICE bool completes\(.*?\n}\n", _LAST_BLOCK, text, flags=re.DOTALL)
            text = re.sub(r"DEVICE void gpu_fence.*\n", "", text)
        if name == "last_conv.cu":
            text = re.sub(r"DEVICE float load_float\(.*?\n}\n", "", text, flags=re.DOTALL)
        if name == "activation.cuh":
            for name_in_asm, plain in (("min", "y > upper ? upper : y"), ("rcp", "1 / y")):
                pattern = rf'  float out;\n  asm\("{name_in_asm}.*?return out;'
                text = re.sub(pattern, f"  return {plain};", text, flags=re.DOTALL)
        if name.endswith(".cu"):
            text = re.sub(r"^ *extern __shared__.*\n", "", text, flags=re.MULTILINE) + _MAIN
        assert "asm" not in text
        (made / name).write_text(text)
    for path in EMULATION.iterdir():
        shutil.copy(path, made)
    return made


@functools.cache
def library(source: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The kernel of ``source`` for these constants."""
    defines = [f"-D{name}={value}" for name, value in constants]
    defines.append(f"-DKERNEL_NAME={source.removesuffix('.cu')}")
    name = hashlib.sha256(repr((source, constants)).encode()).hexdigest()[:16] + ".so"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        "-x",
        "c++",
        *defines,
        source,
        "-o",
        name,
    ]
    subprocess.run(command, cwd=folder(), check=True)
    loaded = ctypes.CDLL(str(folder() / name))
    loaded.launch.restype = ctypes.c_char_p
    return loaded


class EmulatedKernel:
    """Launches as ``sf_compile.cuda.launcher.Kernel`` does; ``seed`` is of the order in which warps run."""

    def __init__(
        self, constants: dict[str, int], signature: str, seed: int = 1, source: str = "mma_conv.cu"
    ) -> None:
        self._library = library(source, tuple(constants.items()))
        self._signature = signature
        self.seed = seed

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: Sequence[int | float | bytes],
    ) -> None:
        """Run all blocks, one after the other.

        Raises:
            AssertionError: the kernel did what it may not do, such as an access beside its memory.
        """
        assert len(arguments) == len(self._signature) and grid[1:] == (1, 1)
        formats = {"P": "Q", "q": "q", "i": "i4x", "f": "f4x", "d": "d", "A": "16s"}
        packed = b"".join(
            struct.pack("<" + formats[letter], value)
            for letter, value in zip(self._signature, arguments, strict=True)
        )
        values = ctypes.create_string_buffer(packed)
        failure = self._library.launch(grid[0], block, shared_bytes, values, self.seed)
        assert failure is None, f"the emulated kernel: {failure.decode()}"


def guarded(x: Tensor) -> Tensor:
    """A copy of ``x`` that ends where memory that may not be touched begins."""
    size = x.untyped_storage().nbytes()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, pages + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(begin + pages), mmap.PAGESIZE, 0) == 0
    aligned = -(-size // 16) * 16  # as the allocator of a GPU aligns them
    flat = torch.frombuffer(region, dtype=x.dtype, count=size // x.element_size(), offset=pages - aligned)
    copy = flat.as_strided(x.shape, x.stride())
    copy.copy_(x)
    return copy
