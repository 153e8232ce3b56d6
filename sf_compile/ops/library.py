"""The ``styleforge`` op namespace: one library object, and one way to register an op on it.

``Library.define`` + ``impl`` is used rather than ``torch.library.custom_op`` because its dispatch costs
less, and a style network makes sixteen calls a picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("styleforge", "DEF")

# Not for Inductor's own CUDA graphs: the kernels keep packed weights and workspaces, which its graph trees
# would take for leaks, since they account for every allocation of a graph's memory pool.
_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "needs_fixed_stride_order", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
)


CPU: dict[str, Callable[..., Any]] = {}
CUDA: dict[str, Callable[..., Any]] = {}
"""The CPU and CUDA kernel of each op by its name, for callers with nothing to gain from the dispatcher."""


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Define ``styleforge::<schema>`` with its CPU and CUDA kernels, fake kernel and gradient.

    Every op here is functional (no output aliases an input), keeps its inputs' strides under
    Inductor (a silent relayout would cost more than the op saves) and is safe to trace.
    """
    name = schema.split("(", 1)[0]
    cpu, cuda, backward = map(_without_autocast, (cpu, cuda, backward))
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    CPU[name], CUDA[name] = cpu, cuda
    torch.library.register_fake(f"styleforge::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"styleforge::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose operations of PyTorch compute in the dtypes that they are given."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments)
        with torch._C._DisableAutocast():
            return function(*arguments)

    return run


def empty_image(shape: Any, like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (N, C, H, W) tensor on the device of ``like``, and in its dtype, dense in a layout."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def absent(input: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for an output that was not asked for: an empty tensor."""
    return input.new_empty((0,), dtype=dtype)
