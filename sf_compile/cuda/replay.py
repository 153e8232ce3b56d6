"""Repeating a recording's launches: arguments are packed once, and only what moved is written anew."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

from sf_compile.cuda.argument_block import ArgumentBlock, argument_format, parameter_fields
from sf_compile.cuda.kernel_graph import KernelGraph, Node
from sf_compile.cuda.recording import BoundLaunch, Recording

_MAP_BYTES = 128


class Replay:
    """A recording made ready for one stream and for the calling thread, which alone may use it.

    The recording's device is the current one. The launches are one CUDA graph; of it only the kernels whose
    addresses changed are told so before it is launched again.

    Raises:
        KernelLaunchError: the thread cannot enter the kernels' context, or the driver rejects a kernel.
    """

    def __init__(self, recording: Recording, stream: int) -> None:
        self._bases: list[int | None] = [None] * recording.bases
        self._pointers: list[list[tuple[Any, int, int]]] = [[] for _ in self._bases]
        self._maps: list[list[tuple[int, Callable[[int], bytes], int]]] = [[] for _ in self._bases]
        self._readers: list[list[int]] = [[] for _ in self._bases]  # launches, by number
        self._blocks: list[ArgumentBlock] = []  # the driver reads them by address
        launches = recording.launches
        if launches:
            launches[0].kernel.enter_context()
        nodes = [self._node(number, launch) for number, launch in enumerate(launches)]
        self._graph = KernelGraph(nodes, stream) if nodes else None

    def _node(self, number: int, launch: BoundLaunch) -> Node:
        """One launch; notes where its addresses are to be written."""
        kernel = launch.kernel
        block = ArgumentBlock(kernel.signature)
        struct.pack_into(argument_format(kernel.signature), block.values, 0, *launch.arguments)
        fields = parameter_fields(kernel.signature)
        for argument, base, offset in launch.pointers:
            self._pointers[base].append((block.values, fields[argument][0] // 8, offset))
        for argument, part, base, offset, encode in launch.maps:
            at = ctypes.addressof(block.values) + fields[argument][0] + part * _MAP_BYTES
            self._maps[base].append((at, encode, offset))
        for base in {*(one.base for one in launch.pointers), *(one.base for one in launch.maps)}:
            self._readers[base].append(number)
        self._blocks.append(block)
        return Node(kernel, launch.grid, launch.block, launch.shared_bytes, block.address)

    def __call__(self, bases: Sequence[int]) -> None:
        """Launch everything with the recording's bases at these addresses.

        Raises:
            KernelLaunchError: the driver rejects a launch, or reports an error of an earlier kernel.
        """
        if self._graph is None:
            return
        if bases != self._bases:
            self._move(self._graph, bases)
        self._graph.launch()

    def _move(self, graph: KernelGraph, bases: Sequence[int]) -> None:
        moved = [i for i, before in enumerate(self._bases) if bases[i] != before]
        changed: dict[int, None] = {}
        for number in moved:
            self._bases[number] = None  # neither here nor there, should this be interrupted
            base = bases[number]
            for values, index, offset in self._pointers[number]:
                values[index] = base + offset
            for at, encode, offset in self._maps[number]:
                ctypes.memmove(at, encode(base + offset), _MAP_BYTES)
            changed.update(dict.fromkeys(self._readers[number]))
        for launch in changed:
            graph.update(launch)
        for number in moved:
            self._bases[number] = bases[number]
