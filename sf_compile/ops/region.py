"""Running a region of the graph, several ops in a row, with little work on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx


def runner(inner: fx.GraphModule) -> Callable[..., Any]:
    """What computes ``inner``, a graph of ``styleforge`` ops with a tuple of tensors as its result.

    On a GPU its kernels are launched anew for a call like an earlier one, where that is all there is to do
    (``sf_compile.cuda.repeated``); elsewhere its ops are called one by one (``sf_compile.cpu.region``).
    """
    on_cpu: Callable[..., Any] | None = None
    on_cuda: Callable[..., Any] | None = None

    def run(*inputs: Any) -> Any:
        nonlocal on_cpu, on_cuda
        first = next((x for x in inputs if isinstance(x, Tensor)), None)
        if first is None or not first.is_cuda:
            if on_cpu is None:
                from sf_compile.cpu.region import Direct

                on_cpu = Direct(inner)
            return on_cpu(*inputs)
        if on_cuda is None:
            from sf_compile.cuda.repeated import Repeated

            on_cuda = Repeated(inner)
        return on_cuda(*inputs)

    return run
