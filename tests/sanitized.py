"""What tests/test_sanitizer_gpu.py runs under compute-sanitizer: ``python tests/sanitized.py FAMILY``.

Launches every kind of kernel of one family once, on small pictures, and prints what it ran.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import halo_layers
import mma_layers
import quantized_layers
import torch
from test_residual_trunk_gpu import made as made_trunk

from sf_compile.cuda import cache, compiler, halo_conv, loader, mma_conv, quantized_conv
from sf_compile.models import TransformerNet

FAULTY = """
extern "C" __global__ void faulty(float* p, int beyond) {
  __shared__ float shared[256];
  shared[threadIdx.x] = p[threadIdx.x];
  p[beyond + threadIdx.x] = shared[(threadIdx.x + 37) % 256];
}
"""


def faulty() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A kernel that races in shared memory and writes where nothing is: both tools must see it."""
    sources = Path(tempfile.mkdtemp(prefix="styleforge-sanitizer-"))
    (sources / "faulty.cu").write_text(FAULTY)
    compiler.source_directory = lambda: sources
    os.environ[cache.CACHE_VARIABLE] = str(sources / "cache")
    kernel = loader.load("faulty.cu", "faulty", {}, torch.cuda.current_device(), "Pi")
    memory = torch.zeros(256, device="cuda")
    yield "faulty", lambda: kernel.launch((1, 1, 1), 256, 0, (memory.data_ptr(), 1 << 20))


def halo() -> Iterator[tuple[str, Callable[[], Any]]]:
    """csrc/halo_conv.cu."""
    for layer, size, why in halo_layers.CASES[::4]:
        a = halo_layers.made(layer, size)
        if halo_conv.refusal(a) is None:  # else a pass comes before it
            yield why, lambda a=a: halo_conv.conv2d(a)


def mma() -> Iterator[tuple[str, Callable[[], Any]]]:
    """csrc/mma_conv.cu."""
    cases = [(layer, size, torch.float16, why) for layer, size, why in mma_layers.CASES[::2]]
    cases += [(layer, (1, 19, 27), torch.float32, "in TF32") for layer in mma_layers.FLOAT32[::4]]
    for layer, size, dtype, why in cases:
        a = mma_layers.made(layer, size, dtype)._replace(precision="auto" if dtype.itemsize == 2 else "tf32")
        yield why, lambda a=a: mma_conv.conv2d(a)


def int8() -> Iterator[tuple[str, Callable[[], Any]]]:
    """csrc/halo_conv.cu on 8-bit integers, and the pass that rounds to them."""
    for layer in (quantized_layers.PLAIN, quantized_layers.SKIP, quantized_layers.UP):
        a = quantized_layers.made(layer, (2, 19, 33), device="cuda")
        yield str(layer), lambda a=a: quantized_conv.conv2d(a)


def trunk() -> Iterator[tuple[str, Callable[[], Any]]]:
    """csrc/residual_trunk.cu."""
    for dtype in (torch.float16, torch.float32):
        for height, width, blocks in ((19, 37, 1), (40, 40, 2)):
            yield f"{height}x{width} {dtype}", made_trunk(height, width, blocks=blocks, dtype=dtype)
    found = {dict(k.key.constants)["DTYPE"] for k in loader.loaded() if k.entry == "residual_trunk"}
    assert found == {0, 1}, f"the trunk ran with the DTYPEs {found}"


def network() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A small network, op by op and replayed: csrc/first_conv.cu, csrc/last_conv.cu and the passes too."""
    compiled = torch.compile(TransformerNet(32, 1).cuda().half().eval(), backend="styleforge")
    x = torch.rand(1, 3, 68, 76, device="cuda").half() * 255
    for number in range(3):
        yield f"call {number}", lambda: compiled(x)


FAMILIES = {f.__name__: f for f in (faulty, halo, mma, int8, trunk, network)}

if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        for name, launch in FAMILIES[sys.argv[1]]():
            launch()
            torch.cuda.synchronize()
            print("ran", name, flush=True)
