"""Launching a kernel on PyTorch's current stream.

A launch packs its arguments into storage that each thread keeps, and makes one driver call: it neither
allocates nor synchronises, so it can be captured into a CUDA graph.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch

from sf_compile.cuda.argument_block import ArgumentBlock, argument_format
from sf_compile.cuda.compiler import KernelKey
from sf_compile.cuda.driver_calls import KernelLaunchError, checked, driver_error
from sf_compile.cuda.recorder import observing

_DEFAULT_SHARED_BYTES = 48 * 1024
"""Shared memory a block may use without opting in for more (CUDA C++ Programming Guide, compute
capabilities 5.0 and later)."""


class Kernel:
    """One kernel loaded on one device; made by ``loader.load``.

    ``key`` is what it was compiled from, ``entry`` its name in the source, ``signature`` its parameters,
    ``function`` the driver's handle, ``mode`` how it is launched (see there), ``load_seconds`` the time
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
        return driver_error(self._driver, step, self._driver.CUresult(code))

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


def _overlapping_launch(driver: Any) -> Any:
    """A launch configuration under which a kernel may start before its predecessor has finished."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.blockDimY = config.blockDimZ = 1
    config.attrs, config.numAttrs = [attribute], 1
    return config
