"""Whether float32 convolutions may round their operands to TF32, and PyTorch's convolutions told so.

PyTorch has two ways to say it. ``torch.backends.cudnn.conv.fp32_precision`` (2.9 and later) is ``"tf32"``,
``"ieee"`` or ``"none"``; read, it is what holds for convolutions, with what
``torch.backends.cudnn.fp32_precision`` and ``torch.backends.fp32_precision`` say where it says nothing
itself. The older ``torch.backends.cudnn.allow_tf32`` sets it and the one of RNNs to ``"tf32"`` or
``"none"``; once both ways were used, reading the older one may raise. So the newer one is read where there
is one: it is what PyTorch's own convolutions look at, however it was set.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_FORCED = {"tf32": True, "fp32": False}
_lock = threading.RLock()
_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)  # behind conv.fp32_precision


def allowed(precision: str) -> bool:
    """Whether a float32 convolution of this ``precision`` may use TF32; of ``"auto"``, now.

    TF32 is a matter of float32: of ``"fp16"`` and ``"bf16"`` it is false.
    """
    if precision == "auto":
        return _switch()
    return _FORCED.get(precision, False)


def _switch() -> bool:
    """What PyTorch's own float32 convolutions would do; asked for in every call of a network."""
    if _precision is not None:
        return bool(_precision("cuda", "conv") == "tf32")
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(conv.fp32_precision == "tf32")


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    precision: str, transposed: bool = False, output_padding: Sequence[int] = (0, 0),
) -> Tensor:  # fmt: skip
    """PyTorch's convolution, or transposed one, of this ``precision``; it changes no switch."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    convolve: Any = torch._convolution  # what torch.conv2d calls, with the switches
    result: Tensor = convolve(
        x, weight, bias, list(stride), list(padding), [1, 1], transposed, list(output_padding), 1,
        cudnn.benchmark, deterministic, cudnn.enabled, allowed(precision),
    )  # fmt: skip
    return result


def rounded(weight: Tensor) -> Tensor:
    """Float32 ``weight`` rounded to TF32, ties away from zero as by ``cvt.rna``; others as they are."""
    if weight.dtype != torch.float32:
        return weight
    bits = weight.contiguous().view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return torch.where(finite, (bits + 0x1000) & -0x2000, bits).view(torch.float32)


@contextlib.contextmanager
def switched(precision: str) -> Iterator[None]:
    """Inside, PyTorch's float32 convolutions do what ``precision`` says: gradients take no argument for it.

    The switch is the process's. It is turned only where it must be, back again afterwards, and by one
    thread at a time.
    """
    if precision not in _FORCED:
        yield
        return
    with _lock:
        if allowed(precision) == _switch():
            yield
            return
        restore = _turned(_FORCED[precision])
        try:
            yield
        finally:
            restore()


def _turned(allow: bool) -> Any:
    """Turn the switch; returns what turns it back."""
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        before = cudnn.allow_tf32
        cudnn.allow_tf32 = allow
        return lambda: setattr(cudnn, "allow_tf32", before)
    # What is the same for all of cuDNN was most likely said there: it goes on being inherited from there.
    own = cudnn.conv.fp32_precision
    own = "none" if own == cudnn.fp32_precision else own
    cudnn.conv.fp32_precision = "tf32" if allow else "ieee"
    return lambda: setattr(cudnn.conv, "fp32_precision", own)
