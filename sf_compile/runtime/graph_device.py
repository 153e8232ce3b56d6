"""What calls by CUDA graphs ask of a device: to capture a call, and to replay it.

``sf_compile.cuda.capture`` answers with PyTorch's CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class NotCapturable(Exception):
    """A call was not captured; the message says why. ``again`` says that the next one may be."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class Graph(Protocol):
    """A captured call. Several threads may replay it at once, on any streams."""

    bytes: int
    """What it holds of the GPU's memory."""

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the call returns for other ``inputs``, in tensors of their own."""


class Device(Protocol):
    """Where calls run, and how they are captured."""

    def refusal(self, tensors: Sequence[Tensor]) -> str | None:
        """Why no call with these inputs can be captured; None where one may."""

    def busy(self) -> bool:
        """Whether this call is captured, traced or watched by others: then it just runs."""

    def settings(self) -> tuple[Any, ...]:
        """Settings of the process that what is captured depends on, and Dynamo's guards do not see."""

    def current(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """Makes the device of ``tensor`` the current one."""

    def memory(self, tensor: Tensor) -> int:
        """Bytes of memory that its device has."""

    def release(self) -> None:
        """Give back memory that nobody uses: during a capture that cannot be done."""

    def own(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same sizes, strides and contents, for a graph to read."""

    def capture(self, run: Callable[..., Any], inputs: Sequence[Any], own: Sequence[Tensor]) -> Graph:
        """The graph of ``run(*inputs)``, of whose tensors ``own`` change from replay to replay.

        Raises:
            NotCapturable: there is none.
            torch.OutOfMemoryError: there is no room for it.
        """
