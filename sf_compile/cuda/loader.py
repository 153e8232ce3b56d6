"""Loading cubins: from a kernel's source and constants to what launches it, once in a process.

cuda-bindings is imported when the first kernel is loaded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from sf_compile.cuda.argument_block import ArgumentBlock, parameter_fields
from sf_compile.cuda.compiler import (
    KernelKey,
    KernelUnavailable,
    architecture,
    compile_kernel,
    forget,
)
from sf_compile.cuda.driver_calls import checked, primary_context
from sf_compile.cuda.launcher import Kernel

_loaded: dict[tuple[Any, ...], Kernel] = {}
_load_lock = threading.Lock()


def load(
    key_source: str,
    entry: str,
    constants: Mapping[str, int | str],
    device: torch.device | int,
    signature: str,
    mode: str = "ordinary",
) -> Kernel:
    """Return the kernel ``entry`` (declared ``extern "C"``) of ``csrc/<key_source>``, ready on ``device``.

    Compiled with ``constants`` for the device's architecture, and loaded, on the first call; after that a
    look-up. A device without an index is the current one. ``signature``: see ``ArgumentBlock``. ``mode``:
    "ordinary"; "cooperative", for a kernel launched only when all its blocks fit on the device at once, so
    that they may wait for each other; "overlapping", for one that may start while its predecessor on the
    stream still runs, and waits for it itself before it touches what that one writes. Raises what
    ``compile_kernel`` raises, KernelUnavailable where PyTorch sees no GPU, ValueError for a signature that is
    bad or not the kernel's, or a device that is not CUDA's, and KernelLaunchError where the driver rejects
    the cubin or misses the entry.
    """
    index = device if isinstance(device, int) else device.index
    if index is None:
        if torch.device(device).type != "cuda":
            raise ValueError(f"{entry} of {key_source} runs on a CUDA device, not on {device}")
        index = torch.cuda.current_device()
    # In the mapping's own order: sorting would cost every call, and a second order only adds a second entry.
    memo_key = (key_source, entry, index, signature, mode, *constants.items())
    kernel = _loaded.get(memo_key)
    if kernel is None:
        kernel = _load(key_source, entry, constants, index, signature, mode)
        _loaded[memo_key] = kernel
    return kernel


def loaded() -> tuple[Kernel, ...]:
    """The kernels that this process has loaded so far, each once."""
    return tuple(dict.fromkeys(_loaded.values()))


def reload(kernel: Kernel) -> Kernel:
    """Load once more what ``kernel`` is, its cubin taken from the disk cache as in a new process.

    For measuring: ``load`` goes on returning ``kernel``. Raises what ``load`` raises.
    """
    from cuda.bindings import driver

    key, index = kernel.key, kernel.device_index
    forget(key)
    begin = time.perf_counter()
    with torch.cuda.device(index):
        cubin = compile_kernel(key)
        again = _load_cubin(driver, key, kernel.entry, kernel.signature, index, cubin, kernel.mode)
    again.load_seconds = time.perf_counter() - begin
    return again


def _load(
    key_source: str, entry: str, constants: Mapping[str, int | str], index: int, signature: str, mode: str
) -> Kernel:  # fmt: skip
    ArgumentBlock(signature)  # rejects a bad signature before anything is compiled
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise KernelUnavailable("PyTorch sees no NVIDIA GPU: kernels can be compiled but not launched here")
    arch = architecture(torch.cuda.get_device_capability(index))
    key = KernelKey(key_source, tuple(constants.items()), arch)
    begin = time.perf_counter()
    cubin = compile_kernel(key)
    from cuda.bindings import driver

    canonical = (key, entry, index, signature, mode)
    with _load_lock, torch.cuda.device(index):
        kernel = _loaded.get(canonical)
        if kernel is None:
            kernel = _load_cubin(driver, key, entry, signature, index, cubin, mode)
            kernel.load_seconds = time.perf_counter() - begin
            _loaded[canonical] = kernel
    return kernel


def _load_cubin(
    driver: Any, key: KernelKey, entry: str, signature: str, index: int, cubin: bytes, mode: str
) -> Kernel:
    """Load ``cubin`` into the primary context, PyTorch's own, of the current device ``index``."""
    what = f"{entry} ({key}) on cuda:{index}"
    checked(driver, "cuInit", driver.cuInit(0))
    context = primary_context(driver, index)
    checked(driver, "cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    # Loading allocates, which a stream capture in progress forbids to this thread unless it is told that the
    # work does not belong to the capture.
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    exchange = driver.cuThreadExchangeStreamCaptureMode
    before = checked(driver, "cuThreadExchangeStreamCaptureMode", exchange(relaxed))
    try:
        module = checked(driver, f"loading {what}", driver.cuModuleLoadData(cubin))
        function = checked(driver, f"finding {what}", driver.cuModuleGetFunction(module, entry.encode()))
        _check_signature(driver, what, signature, function)
        return Kernel(key, entry, signature, index, driver, function, context, mode)
    finally:
        checked(driver, "cuThreadExchangeStreamCaptureMode", exchange(before))


def _check_signature(driver: Any, what: str, signature: str, function: Any) -> None:
    """Compare ``signature`` with the parameters that the cubin records, as (offset, size) in bytes.

    A signature that is too short would make the driver read beyond the argument block.
    """
    recorded: list[tuple[int, int]] = []
    while (answer := driver.cuFuncGetParamInfo(function, len(recorded)))[0] == 0:
        recorded.append((int(answer[1]), int(answer[2])))
    if recorded and signature.startswith("T"):
        # Parameters that begin with a tensor map do not begin at 0: what aligns it is recorded too.
        first = recorded[0][0]
        recorded = [(offset - first, size) for offset, size in recorded]
    expected = parameter_fields(signature)
    if recorded != expected:
        raise ValueError(
            f"signature {signature!r} of {what} means parameters at (offset, size) {expected}; the kernel "
            f"has {recorded}"
        )
