"""Repeating a recording's launches: arguments are packed once, and only addresses that changed are written.

The driver is called through ctypes with structures that are kept, which takes a fraction of the host time
of cuda-bindings' checked and converted calls.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

from sf_compile.cuda.launcher import ArgumentBlock, Kernel, argument_format, parameter_fields
from sf_compile.cuda.recording import BoundLaunch, Recording

_MAP_BYTES = 128
_ATTRIBUTES: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "ordinary": (), "cooperative": ((2, (1,)),), "overlapping": ((6, (1,)),),
}  # fmt: skip
"""For each of ``launcher.load``'s modes the launch attributes, (CUlaunchAttributeID, 32-bit values): 2 is
COOPERATIVE, 6 PROGRAMMATIC_STREAM_SERIALIZATION."""


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute`` of cuda.h: an identifier, and a union of 64 bytes."""

    _fields_ = (
        ("identifier", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16),
    )  # fmt: skip


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def submit() -> Callable[..., int]:
    """The driver's ``cuLaunchKernelEx(config, function, arguments, extra)``, which returns its error code."""
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    launch.restype = ctypes.c_int
    return launch


def launch_attributes(kernel: Kernel) -> ctypes.Array[LaunchAttribute]:
    """The attributes that ``kernel`` is launched with, for ``LaunchConfig``."""
    wanted = _ATTRIBUTES[kernel.mode]
    attributes = (LaunchAttribute * len(wanted))()
    for attribute, (identifier, values) in zip(attributes, wanted, strict=True):
        attribute.identifier = identifier
        attribute.value[: len(values)] = values
    return attributes


class Replay:
    """A recording made ready for one stream and for the calling thread, which alone may use it.

    The recording's device is the current one. Raises KernelLaunchError where the thread cannot enter its
    context.
    """

    def __init__(self, recording: Recording, stream: int) -> None:
        count = recording.bases
        self._launches = recording.launches
        self._bases: list[int | None] = [None] * count
        self._pointers: list[list[tuple[Any, int, int]]] = [[] for _ in range(count)]
        self._maps: list[list[tuple[int, Callable[[int], bytes], int]]] = [[] for _ in range(count)]
        self._kept: list[Any] = []
        self._calls = [self._prepare(launch, stream) for launch in self._launches]
        if self._launches:
            self._launches[0].kernel.enter_context()

    def _prepare(self, launch: BoundLaunch, stream: int) -> Callable[[], int]:
        """The driver call of one launch; notes where its addresses are to be written."""
        kernel = launch.kernel
        block = ArgumentBlock(kernel.signature)
        struct.pack_into(argument_format(kernel.signature), block.values, 0, *launch.arguments)
        fields = parameter_fields(kernel.signature)
        for argument, base, offset in launch.pointers:
            self._pointers[base].append((block.values, fields[argument][0] // 8, offset))
        for argument, part, base, offset, encode in launch.maps:
            at = ctypes.addressof(block.values) + fields[argument][0] + part * _MAP_BYTES
            self._maps[base].append((at, encode, offset))
        attributes = launch_attributes(kernel)
        config = LaunchConfig(
            launch.grid, (launch.block, 1, 1), launch.shared_bytes, stream, attributes, len(attributes)
        )
        self._kept += (block, attributes)  # the driver reads them by address
        return functools.partial(
            submit(), ctypes.byref(config), ctypes.c_void_p(int(kernel.function)),
            ctypes.c_void_p(block.address), None,
        )  # fmt: skip

    def __call__(self, bases: Sequence[int]) -> None:
        """Launch everything with the recording's bases at these addresses.

        Raises:
            KernelLaunchError: the driver rejects a launch, or reports an error of an earlier kernel.
        """
        if bases != self._bases:
            self._write(bases)
        for number, call in enumerate(self._calls):
            code = call()
            if code:
                kernel, grid, block, shared_bytes, *_ = self._launches[number]
                raise kernel.failure(grid, block, shared_bytes, code)

    def _write(self, bases: Sequence[int]) -> None:
        for number, (base, before) in enumerate(zip(bases, self._bases, strict=True)):
            if base != before:
                self._bases[number] = None  # neither, should this be interrupted
                for values, index, offset in self._pointers[number]:
                    values[index] = base + offset
                for at, encode, offset in self._maps[number]:
                    ctypes.memmove(at, encode(base + offset), _MAP_BYTES)
                self._bases[number] = base
