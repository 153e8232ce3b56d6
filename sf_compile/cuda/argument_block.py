"""How the arguments of a launch lie in memory, by a kernel's signature."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

_FORMATS = {"P": "P", "q": "q", "i": "i", "f": "f", "d": "d", "A": "16s", "T": "128s", "F": "512s"}


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
