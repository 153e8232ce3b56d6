"""Watching what a call asks of the GPU: kernels of ours, memory, and anything else.

A ``Recorder`` sees the launches because ``launcher`` reports them to the thread's recorder, and everything
that PyTorch runs because it is a dispatch mode. So work that a replay would miss cannot go unnoticed: any
operation but an allocation makes what was recorded unfit for replaying, with the operation as the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from sf_compile.cuda.launcher import Kernel

_aten = torch.ops.aten
_ALLOCATIONS: frozenset[Callable[..., Any]] = frozenset({
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
})  # fmt: skip


class Allocation(NamedTuple):
    """Memory that a call allocated: its address and size in bytes, and the tensor that it was made for."""

    address: int
    bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Allocation:
        """The memory of a tensor, from its first element to its last."""
        return cls(x.data_ptr(), extent(x), tuple(x.shape), x.stride(), x.dtype)


class Launch(NamedTuple):
    """A launch as ``Kernel.launch`` takes it; ``allocated`` allocations had been made before it."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: tuple[Any, ...]
    allocated: int


class Recorder(TorchDispatchMode):
    """Inside ``with``, notes what the calling thread does.

    Attributes:
        launches: The kernels launched, in order.
        allocations: The memory allocated, in order. It is not kept alive: of two that share an address, the
            later one is meant by what comes after it.
        constants: Tensors of other calls that the kernels read or meet in (packed weights, workspaces).
        versions: How often each of those had been written; 0 for one that has no version.
        copied: Tensors that constants are copies of.
        foreign: The first operation that is neither; None where there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.allocations: list[Allocation] = []
        self.constants: list[Tensor] = []
        self.versions: list[int] = []
        self.copied: list[Tensor] = []
        self.foreign: str | None = None

    def __enter__(self) -> Recorder:
        super().__enter__()
        observing.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        observing.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of PyTorch, and note it."""
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocations.append(Allocation.of(out))
        elif self.foreign is None:
            self.foreign = str(func)
        return out

    def launched(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:  # fmt: skip
        """Note a launch."""
        launch = Launch(kernel, grid, block, shared_bytes, tuple(arguments), len(self.allocations))
        self.launches.append(launch)

    def uses(self, constant: Tensor, of: Tensor | None = None) -> None:
        """Note memory that outlives the call, and stays where it is while the tensor is alive.

        Where it holds a copy, packed or cast, of a tensor as that is now, it is a copy ``of`` this one.
        """
        self.constants.append(constant)
        self.versions.append(version(constant))
        if of is not None:
            self.copied.append(of)


class _Observing(threading.local):
    recorder: Recorder | None = None


observing = _Observing()
"""``observing.recorder`` is the calling thread's recorder, or None."""


def version(x: Tensor) -> int:
    """How often PyTorch has written ``x``; 0 for an inference tensor, where it does not count."""
    return 0 if x.is_inference() else x._version


def extent(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to the end of its last; strides are not negative."""
    if x.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size()
