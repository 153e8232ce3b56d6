"""From what a recorder saw of one call to launches that can be repeated at other addresses.

Every address among the arguments is traced to what it points into: a tensor that the call was given or
returns, memory that lived within the call (which gets a place in an arena), or memory that stays where it is
(parameters, packed weights, workspaces). An address that points nowhere known is not guessed at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.cuda.arena import Arena, Lifetime, plan
from sf_compile.cuda.argument_block import Addresses
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.recorder import Allocation, Recorder, extent
from sf_compile.cuda.tensor_maps import TensorMap
from sf_compile.runtime.unchanged import version_of


class NotReplayable(Exception):
    """A call does something that repeating its launches would not; the message says what."""


class Pointer(NamedTuple):
    """Argument number ``argument`` is the address ``offset`` bytes into base number ``base``."""

    argument: int
    base: int
    offset: int


class MapPointer(NamedTuple):
    """Tensor map number ``part`` of an argument is of such an address; ``encode`` makes it anew."""

    argument: int
    part: int
    base: int
    offset: int
    encode: Callable[[int], bytes]


class BoundLaunch(NamedTuple):
    """A launch, and which of its arguments depend on where the bases are."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: tuple[Any, ...]
    pointers: tuple[Pointer, ...]
    maps: tuple[MapPointer, ...]


class Output(NamedTuple):
    """A tensor that the call returns."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Recording:
    """A call as launches; holds no memory of pictures.

    The bases are the arena's address (0), the moving inputs' (from 1), and the outputs' (after those).

    Attributes:
        bases: How many there are.
        launches: In order.
        arena: Places of the tensors that live within the call.
        outputs: The tensors to allocate.
        returned: What the call returns: numbers of outputs.
        constants: Memory that the launches use where it is, kept alive.
        versions: How often each of those had been written.
        copied: Which of the fixed inputs some of those are copies of; the others are read where they lie.
    """

    bases: int
    launches: tuple[BoundLaunch, ...]
    arena: Arena
    outputs: tuple[Output, ...]
    returned: tuple[int, ...]
    constants: tuple[Tensor, ...]
    versions: tuple[int, ...]
    copied: tuple[int, ...]

    def holds(self) -> bool:
        """Whether nothing was written to the constants since: packed weights are renewed where they are."""
        tensors, versions = self._counted
        return list(map(version_of, tensors)) == versions

    @functools.cached_property
    def _counted(self) -> tuple[list[Tensor], list[int]]:
        """The constants whose versions count, each once, and these versions; asked for in every call."""
        pairs = {
            (id(x), number): x for x, number in zip(self.constants, self.versions, strict=True)
            if not x.is_inference()
        }  # fmt: skip
        return list(pairs.values()), [number for _, number in pairs]


class _Range(NamedTuple):
    start: int
    end: int

    @classmethod
    def of(cls, x: Tensor) -> _Range:
        return cls(x.data_ptr(), x.data_ptr() + extent(x))

    def meets(self, other: _Range) -> bool:
        return self.start < other.end and other.start < self.end


class _Found(NamedTuple):
    """What an address points into: "allocation", "moving" or "constant", which of those, and how far in."""

    kind: str
    number: int
    offset: int


class _Use(NamedTuple):
    """One address in one launch: argument, part of it for tensor maps, and what it points into."""

    argument: int
    part: int
    found: _Found
    encode: Callable[[int], bytes] | None


def resolve(
    recorder: Recorder, moving: Sequence[Tensor], fixed: Sequence[Tensor], results: Sequence[Any]
) -> Recording:
    """The recording of a call.

    Args:
        recorder: What was seen of it.
        moving: Its tensor inputs that may lie elsewhere the next time.
        fixed: Its tensor inputs that will lie where they do.
        results: What it returned.

    Raises:
        NotReplayable: The launches alone would not do what the call did.
    """
    if recorder.foreign is not None:
        raise NotReplayable(f"{recorder.foreign} runs in it")
    addresses = _Addresses(recorder.allocations, moving, [*fixed, *recorder.constants])
    uses = [addresses.uses(launch) for launch in recorder.launches]
    outputs, returned = _outputs(recorder.allocations, results)
    lifetimes: dict[int, Lifetime] = {}
    for number, launch_uses in enumerate(uses):
        for index in [use.found.number for use in launch_uses if use.found.kind == "allocation"]:
            first = lifetimes[index].first if index in lifetimes else number
            lifetimes[index] = Lifetime(recorder.allocations[index].bytes, first, number)
    for index in outputs:
        if recorder.allocations[index].bytes and index not in lifetimes:
            raise NotReplayable("no kernel of ours writes what it returns")
    inner = [index for index in lifetimes if index not in outputs]
    arena = plan([lifetimes[index] for index in inner])
    places = {index: (0, offset) for index, offset in zip(inner, arena.offsets, strict=True)}
    places.update((index, (1 + len(moving) + i, 0)) for i, index in enumerate(outputs))
    launches = []
    for launch, launch_uses in zip(recorder.launches, uses, strict=True):
        pointers, maps = [], []
        for argument, part, (kind, index, offset), encode in launch_uses:
            base, start = places[index] if kind == "allocation" else (1 + index, 0)
            if encode is None:
                pointers.append(Pointer(argument, base, start + offset))
            else:
                maps.append(MapPointer(argument, part, base, start + offset, encode))
        launches.append(BoundLaunch(*launch[:5], tuple(pointers), tuple(maps)))
    made = [Output(*recorder.allocations[index][2:]) for index in outputs]
    bases = 1 + len(moving) + len(outputs)
    constants, versions = tuple(recorder.constants), tuple(recorder.versions)
    sources = set(map(id, recorder.copied))
    copied = tuple(i for i, x in enumerate(fixed) if id(x) in sources)
    return Recording(bases, tuple(launches), arena, tuple(made), returned, constants, versions, copied)


class _Addresses:
    """Finds what an address points into."""

    def __init__(
        self, allocations: Sequence[Allocation], moving: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> None:
        self.allocations = allocations
        self.moving = [_Range.of(x) for x in moving]
        self.constants = [_Range.of(x) for x in constants]
        for i, one in enumerate(self.moving):
            if any(one.meets(other) for other in [*self.moving[:i], *self.constants]):
                raise NotReplayable("two of its inputs share memory")
        # What was there before the call cannot: another thread made it meanwhile, where a tensor had been.
        made = [_Range(a.address, a.address + a.bytes) for a in allocations]
        if any(one.meets(other) for one in [*self.moving, *self.constants] for other in made):
            raise NotReplayable("memory that outlives it was a tensor of its own before")

    def uses(self, launch: Any) -> list[_Use]:
        """The addresses in one launch that are not constant."""
        found: list[_Use] = []
        for i, (letter, value) in enumerate(zip(launch.kernel.signature, launch.arguments, strict=True)):
            if isinstance(value, Addresses):
                if any(self.find(launch, at).kind != "constant" for at in value.addresses):
                    raise NotReplayable(f"{launch.kernel} takes a table of addresses that may change")
            elif letter in "TF":
                if not isinstance(value, TensorMap):
                    raise NotReplayable(f"{launch.kernel} takes a tensor map of an unknown address")
                parts = enumerate(value.parts)
                found += [_Use(i, k, self.find(launch, at), encode) for k, (at, encode) in parts]
            elif letter == "P" and value != 0:
                found.append(_Use(i, 0, self.find(launch, value), None))
        return [use for use in found if use.found.kind != "constant"]

    def find(self, launch: Any, address: int) -> _Found:
        """What a launch's argument points into; of memory that was used twice, the latest use."""
        for index in reversed(range(launch.allocated)):
            allocation = self.allocations[index]
            if allocation.address <= address < allocation.address + allocation.bytes:
                return _Found("allocation", index, address - allocation.address)
        for kind, ranges in (("moving", self.moving), ("constant", self.constants)):
            for index, one in enumerate(ranges):
                if one.start <= address < one.end:
                    return _Found(kind, index, address - one.start)
        raise NotReplayable(f"an argument of {launch.kernel} points into unknown memory")


def _outputs(allocations: Sequence[Allocation], results: Sequence[Any]) -> tuple[list[int], tuple[int, ...]]:
    """The allocations that are returned, each once; and for each result which of those it is."""
    outputs: list[int] = []
    returned: list[int] = []
    for result in results:
        if not isinstance(result, Tensor):
            raise NotReplayable(f"it returns a {type(result).__name__}")
        made = Allocation.of(result)
        # The result is alive, so what was allocated last at its address is its own; empty ones have none.
        at = [i for i, a in enumerate(allocations) if a == made or (made.bytes and a.address == made.address)]
        if not at or allocations[at[-1]] != made:
            raise NotReplayable("it returns a tensor that is no allocation of its own")
        if at[-1] not in outputs:
            outputs.append(at[-1])
        elif not any(result is other for other in results[: len(returned)]):
            raise NotReplayable("it returns two tensors of the same memory")
        returned.append(outputs.index(at[-1]))
    return outputs, tuple(returned)
