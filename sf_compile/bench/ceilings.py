"""The rates that a floor is counted against, measured on the device in the same run."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import torch

from sf_compile import tf32
from sf_compile.bench.rows import dtype_name
from sf_compile.bench.timing import latency_ms
from sf_compile.cuda import hopper, mma_ceiling


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device.

    Attributes:
        tflops: dense matrix product by dtype name, in TFLOP/s, on random data. "float32" is in TF32 where
            PyTorch's convolutions are allowed TF32, because that is what they then use.
        copy_gbps: a large device-to-device copy, in 1e9 bytes a second, read plus written.
        mma_tflops: products by ``mma.sync`` alone (csrc/mma_ceiling.cu) by dtype name, in TFLOP/s, where the
            device runs the general convolutions, which are made of them; else empty.
    """

    tflops: dict[str, float]
    copy_gbps: float
    mma_tflops: dict[str, float]


def measure_ceilings(
    device: torch.device, dtypes: tuple[torch.dtype, ...], *, quick: bool = False
) -> Ceilings:
    """Measure the ceilings of `device` for `dtypes`; `quick` takes small operands and few repeats."""
    on_gpu = device.type == "cuda"
    edge = (2048 if quick else 8192) if on_gpu else (256 if quick else 1024)
    copied = (2**26 if quick else 2**30) if on_gpu else (2**22 if quick else 2**26)
    repeats = 3 if quick else 10
    return Ceilings(
        {dtype_name(dtype): _matmul_tflops(device, dtype, edge, repeats) for dtype in dtypes},
        _copy_gbps(device, copied, repeats),
        {dtype_name(dtype): _mma_tflops(device, dtype, 512 if quick else 8192, repeats) for dtype in dtypes
         if kernels_of(device) == "general" and (dtype != torch.float32 or tf32.allowed("auto"))},
    )  # fmt: skip


def kernels_of(device: torch.device) -> str | None:
    """Which fused convolutions `device` runs, see :func:`sf_compile.cuda.hopper.kernels`; None for a CPU."""
    if device.type != "cuda":
        return None
    return hopper.kernels(torch.cuda.current_device() if device.index is None else device.index)


def _matmul_tflops(device: torch.device, dtype: torch.dtype, edge: int, repeats: int) -> float:
    """Return the median rate of an `edge`-cubed product in TFLOP/s."""
    left = torch.randn(edge, edge, device=device).to(dtype)
    right = torch.randn(edge, edge, device=device).to(dtype)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        times = [latency_ms(functools.partial(torch.matmul, left), right) for _ in range(3 + repeats)][3:]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * edge**3 / statistics.median(times) / 1e9


def _mma_tflops(device: torch.device, dtype: torch.dtype, rounds: int, repeats: int) -> float:
    """Return the median rate of `mma.sync` products of random numbers, each repeated `rounds` times."""
    shape = (24, 32) if dtype == torch.float32 else (24, 32, 2)
    launch, flop = mma_ceiling.products(torch.randn(shape, device=device).to(dtype), rounds)
    nothing = torch.empty(0, device=device)
    times = [latency_ms(lambda _: launch(), nothing) for _ in range(3 + repeats)][3:]
    return flop / statistics.median(times) / 1e9


def _copy_gbps(device: torch.device, size: int, repeats: int) -> float:
    """Return the median rate of a copy of `size` bytes, in GB/s read plus written."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [latency_ms(target.copy_, source) for _ in range(3 + repeats)][3:]
    return 2 * size / statistics.median(times) / 1e6
