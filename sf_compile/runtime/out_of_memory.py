"""What a call says that finds too little memory on the GPU."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sf_compile.runtime.memory import Memory
from sf_compile.runtime.memory_prediction import predict

_GIBIBYTE = 2**30


class OutOfMemory(torch.OutOfMemoryError):
    """A call needs more memory than the GPU has left; a ``torch.OutOfMemoryError`` as any other.

    Attributes:
        needed: What the call needs; None where that could not be told.
        free: Bytes of the GPU's memory that nobody holds; None where the GPU does not say.
    """

    def __init__(self, message: str, needed: Memory | None, free: int | None) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class Explained:
    """Calls ``gm.forward``; where memory runs out, the error says how much is needed and what to do.

    The tensors that the failed call had made are dropped, even while its error is kept.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.__self__ = gm  # as the bound method has it that this stands for
        self._forward = gm.forward

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns.

        Raises:
            OutOfMemory: there is not enough memory left.
        """
        try:
            return self._forward(*inputs)
        except torch.OutOfMemoryError as error:
            if isinstance(error, OutOfMemory) or _capturing(inputs):
                raise
            traceback.clear_frames(error.__traceback__)
            raise _explained(self.__self__, inputs, error) from error


def _capturing(inputs: Sequence[Any]) -> bool:
    """Whether this call is being captured in a CUDA graph, by whoever handles what it raises."""
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _explained(gm: fx.GraphModule, inputs: Sequence[Any], error: torch.OutOfMemoryError) -> OutOfMemory:
    needed: Memory | None
    try:
        needed = predict(gm, inputs)
    except (RuntimeError, TypeError, ValueError):  # this error is about memory, whatever the estimate meets
        needed = None
    pictures = [x for x in inputs if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)]
    picture = max(pictures, key=Tensor.numel, default=None)
    what = "a call" if picture is None else f"a call with {_described(picture)}"
    text = f"styleforge: {what} does not fit into the GPU's memory."
    if needed is not None:
        text += f" It needs {needed}."
    free = None
    if picture is not None and picture.is_cuda:
        free, total = torch.cuda.mem_get_info(picture.device)
        held = torch.cuda.memory_reserved(picture.device)
        unused = held - torch.cuda.memory_allocated(picture.device)
        text += (
            f" {picture.device} has {free / _GIBIBYTE:.2f} GiB free of {total / _GIBIBYTE:.2f}; PyTorch "
            f"holds {held / _GIBIBYTE:.2f}, of which {unused / _GIBIBYTE:.2f} in unused pieces."
        )
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        text += " Gradients keep every activation: call it under torch.no_grad() where none are wanted."
    text += (
        " Take a smaller picture or batch, float16 or bfloat16, or delete tensors and CUDA graphs that hold "
        "the rest; the model can be called again."
    )
    reason = str(error).strip().partition("\n")[0]
    return OutOfMemory(f"{text} ({reason})" if reason else text, needed, free)


def _described(x: Tensor) -> str:
    shape = " x ".join(map(str, x.shape))
    return f"an input of {shape} in {str(x.dtype).removeprefix('torch.')}"
