"""Loading cubins and launching their kernels on PyTorch's current stream.

A launch packs its arguments into storage that each thread keeps, and makes one driver call: it neither
allocates nor synchronises, so it can be captured into a CUDA graph. cuda-bindings is imported when the first
kernel is loaded.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sf_compile.cuda.compiler import (
    KernelKey,
    KernelUnavailable,
    architecture,
    compile_kernel,
    forget,
)
from sf_compile.cuda.recorder import observing

_FORMATS = {"P": "P", "q": "q", "i": "i", "f": "f", "d": "d", "A": "16s", "T": "128s", "F": "512s"}
_DEFAULT_SHARED_BYTES = 48 * 1024
"""Shared memory a block may use without opting in for more (CUDA C++ Programming Guide, compute
capabilities 5.0 and later)."""

# Errors of a kernel that ran earlier on the device: the driver reports them from whichever call comes next.
_ASYNCHRONOUS = ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_MISALIGNED_ADDRESS",
                 "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_ASSERT", "CUDA_ERROR_LAUNCH_TIMEOUT")


class KernelLaunchError(RuntimeError):
    """A CUDA driver call failed; the message has the error, the kernel and the launch configuration."""


def argument_format(signature: str) -> str:
    """The ``struct`` format of a kernel's parameters; its native mode aligns every field as C does."""
    return "@" + "".join(_FORMATS[letter] for letter in signature)


def parameter_fields(signature: str) -> list[tuple[int, int]]:
    """(offset, size) in bytes of every parameter: a field ends where the format up to it ends."""
    sizes = [struct.calcsize(argument_format(letter)) for letter in signature]
    ends = [struct.calcsize(argument_format(signature[: i + 1])) for i in range(len(signature))]
    return [(end - size, size) for end, size in zip(ends, sizes, strict=True)]


class Addresses(bytes):
    """The 512 bytes of a struct of 64 pointers, an F of a signature.

    ``addresses`` has those that are not null.
    """

    addresses: tuple[int, ...]

    @classmethod
    def of(cls, addresses: Sequence[int]) -> Addresses:
        """The struct that begins with these; at most 64."""
        made = cls(struct.pack("64Q", *addresses, *(0,) * (64 - len(addresses))))
        made.addresses = tuple(address for address in addresses if address)
        return made


class ArgumentBlock:
    """Storage for one kernel's arguments, and the array of pointers to them that the driver reads.

    ``signature`` has a letter per C parameter: P pointer (an int address, or 0), q int64, i int32, f float,
    d double, A an ``Activation`` (its 16 bytes), T a tensor map (its 128 bytes), F an array of four, or
    ``Addresses``; these two come first, for tensor maps are aligned to 64 bytes. ``address`` is where the
    pointer array lies. Not to be shared between threads.
    """

    def __init__(self, signature: str) -> None:
        unknown = sorted(set(signature) - set(_FORMATS))
        if unknown:
            letters = "".join(_FORMATS)
            raise ValueError(f"signature {signature!r} has the letter {unknown[0]!r}; known are {letters}")
        if set("TF") & set(signature.lstrip("TF")):
            raise ValueError(f"signature {signature!r}: tensor maps (T, F) come before everything else")
        layout = struct.Struct(argument_format(signature))
        offsets = [offset for offset, _ in parameter_fields(signature)]
        self.values = (ctypes.c_uint64 * max(1, -(-layout.size // 8)))()
        base = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * max(1, len(offsets)))(*(base + offset for offset in offsets))
        self.address = ctypes.addressof(self._pointers)


class Kernel:
    """One kernel loaded on one device; made by ``load``.

    ``key`` is what it was compiled from, ``entry`` its name in the source, ``signature`` its parameters,
    ``function`` the driver's handle, ``mode`` how it is launched (see ``load``), ``load_seconds`` the time
    that finding or compiling its cubin and loading it took.
    """

    def __init__(
        self, key: KernelKey, entry: str, signature: str, device_index: int, driver: Any, function: Any,
        context: Any, mode: str = "ordinary",
    ) -> None:
        self.key = key
        self.entry = entry
        self.signature = signature
        self.device_index = device_index
        self.load_seconds = 0.0
        self._driver = driver
        self.function = function
        self._context = context
        self._layout = struct.Struct(argument_format(signature))
        self._threads = threading.local()
        attributes = driver.CUfunction_attribute
        self._static_shared = checked(
            driver, f"cuFuncGetAttribute of {self}",
            driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function),
        )
        self._shared_limit = _DEFAULT_SHARED_BYTES - self._static_shared
        self.mode = mode
        self._submit = driver.cuLaunchCooperativeKernel if mode == "cooperative" else driver.cuLaunchKernel
        self._tail = () if mode == "cooperative" else (0,)  # only cuLaunchKernel has a last one, `extra`
        # The public torch.cuda.current_stream builds a Stream object in every call.
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._current_device = torch._C._cuda_getDevice

    def __repr__(self) -> str:
        return f"{self.entry} ({self.key}) on cuda:{self.device_index}"

    def launch(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int,
        arguments: Sequence[int | float | bytes],
    ) -> None:  # fmt: skip
        """Launch on the current stream of the kernel's device, which need not be the current device.

        ``grid`` is in blocks (x, y, z), ``block`` in threads (x alone), ``shared_bytes`` the dynamic shared
        memory of a block. ``arguments`` has a value for each letter of the signature; the tensors behind the
        pointers must stay alive until the stream has passed the launch, as the caching allocator sees to for
        tensors of that stream. Raises TypeError for arguments that do not fit the signature, ValueError for
        more shared memory than the device has, KernelLaunchError for what the driver rejects.
        """
        try:
            stored: ArgumentBlock = self._threads.arguments
        except AttributeError:
            stored = self._prepare_thread()
        try:
            self._layout.pack_into(stored.values, 0, *arguments)
        except (struct.error, OverflowError) as error:
            raise TypeError(
                f"{self} takes the arguments {self.signature!r} (P address, q int64, i int32, f float, "
                f"d double, T and F tensor maps), got {tuple(arguments)!r}: {error}"
            ) from error
        if self._current_device() == self.device_index:
            self._launch_here(grid, block, shared_bytes, stored.address)
        else:
            with torch.cuda.device(self.device_index):
                self._launch_here(grid, block, shared_bytes, stored.address)
        if observing.recorder is not None:
            observing.recorder.launched(self, grid, block, shared_bytes, arguments)

    def _launch_here(self, grid: tuple[int, int, int], block: int, shared_bytes: int, address: int) -> None:
        """Launch with the kernel's device being the current one."""
        if shared_bytes > self._shared_limit:
            self._raise_shared_limit(shared_bytes)
        x, y, z = grid
        stream = self._current_stream(self.device_index)
        try:
            if self.mode == "overlapping":
                config = self._threads.config
                config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX = x, y, z, block
                config.sharedMemBytes, config.hStream = shared_bytes, stream
                (result,) = self._driver.cuLaunchKernelEx(config, self.function, address, 0)
            else:
                (result,) = self._submit(
                    self.function, x, y, z, block, 1, 1, shared_bytes, stream, address, *self._tail
                )
        except OverflowError as error:  # a negative number, or one beyond 32 bits
            raise ValueError(f"{self._describe(grid, block, shared_bytes)}: {error}") from error
        if result != 0:
            raise self.failure(grid, block, shared_bytes, result)

    def failure(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, code: Any
    ) -> KernelLaunchError:
        """The error for a launch that the driver answered with ``code``, a CUresult or its number, not 0."""
        return self.driver_error(self._describe(grid, block, shared_bytes), code)

    def driver_error(self, step: str, code: Any) -> KernelLaunchError:
        """The error for a ``step`` that the driver answered with ``code``, as above."""
        return _driver_error(self._driver, step, self._driver.CUresult(code))

    def enter_context(self) -> None:
        """Make PyTorch's context the calling thread's; the kernel's device is the current one."""
        # PyTorch names a device even to a thread that has made no CUDA call yet, which has no context.
        checked(self._driver, f"cuCtxSetCurrent for {self}", self._driver.cuCtxSetCurrent(self._context))

    def _describe(self, grid: tuple[int, int, int], block: int, shared_bytes: int) -> str:
        blocks = "x".join(map(str, grid))
        return f"launch of {self} with grid {blocks}, block {block}, {shared_bytes} bytes of shared memory"

    def _prepare_thread(self) -> ArgumentBlock:
        """Make the calling thread able to launch; return its argument storage."""
        if self._current_device() == self.device_index:
            self.enter_context()
        if self.mode == "overlapping":
            self._threads.config = _overlapping_launch(self._driver)
        stored = self._threads.arguments = ArgumentBlock(self.signature)
        return stored

    def _raise_shared_limit(self, shared_bytes: int) -> None:
        """Opt in, once, for all the shared memory that the device lets a block have."""
        driver = self._driver
        device = checked(driver, "cuDeviceGet", driver.cuDeviceGet(self.device_index))
        name = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        optin = checked(driver, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute(name, device))
        limit = optin - self._static_shared
        if shared_bytes > limit:
            raise ValueError(
                f"{self} was asked to use {shared_bytes} bytes of dynamic shared memory in a block; this "
                f"device allows {limit} ({optin} less {self._static_shared} static): choose a smaller tile"
            )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver, f"cuFuncSetAttribute of {self}",
                 driver.cuFuncSetAttribute(self.function, attribute, limit))
        self._shared_limit = limit


def enter_context(driver: Any) -> None:
    """Make PyTorch's context of the current device the calling thread's, which may not have one yet."""
    if int(checked(driver, "cuCtxGetCurrent", driver.cuCtxGetCurrent())) == 0:
        context = _context(driver, torch.cuda.current_device())
        checked(driver, "cuCtxSetCurrent", driver.cuCtxSetCurrent(context))


def _context(driver: Any, index: int) -> Any:
    """The primary context, PyTorch's own, of device ``index``."""
    device = checked(driver, "cuDeviceGet", driver.cuDeviceGet(index))
    return checked(driver, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))


def _overlapping_launch(driver: Any) -> Any:
    """A launch configuration under which a kernel may start before its predecessor has finished."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.blockDimY = config.blockDimZ = 1
    config.attrs, config.numAttrs = [attribute], 1
    return config


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
    context = _context(driver, index)
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


def checked(driver: Any, step: str, answer: tuple[Any, ...]) -> Any:
    """Return the value in a driver call's answer, (code,) or (code, value); raise for a code but success."""
    if answer[0] != 0:
        raise _driver_error(driver, step, answer[0])
    return answer[1] if len(answer) > 1 else None


def _driver_error(driver: Any, step: str, result: Any) -> KernelLaunchError:
    _, text = driver.cuGetErrorString(result)
    description = text.decode() if text else "no description"
    name = driver.CUresult(result).name
    hint = ""
    if name in _ASYNCHRONOUS:
        hint = " (possibly of an earlier kernel: set CUDA_LAUNCH_BLOCKING=1 to see which)"
    return KernelLaunchError(f"{step} failed: {name}: {description}{hint}")
