"""The peers: ways to run one and the same network that a row compares.

Every peer keeps PyTorch's defaults (TF32 convolutions in float32, no cuDNN autotuning; beside this
backend in true float32 alone no TF32), compiles for static shapes (``dynamic=False``) and as one graph
(``fullgraph=True``, so that none falls back to eager unseen). Each gets the memory layout that is its
best: Inductor channels_last in the 16-bit dtypes, the others NCHW, and ``eager-channels-last`` exists
to show that layout of eager.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sf_compile.precision import storage

Network = Callable[[Tensor], Tensor]
Build = Callable[[nn.Module], Network]

ALL_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
SIXTEEN_BIT = ALL_DTYPES - {torch.float32}
_PLAIN = {"int8": "fp16"}


def eager(model: nn.Module) -> Network:
    """Return the module itself."""
    return model


def inductor(model: nn.Module) -> Network:
    """Compile with Inductor's default mode."""
    return torch.compile(model, backend="inductor", dynamic=False, fullgraph=True)


def inductor_reduce_overhead(model: nn.Module) -> Network:
    """Compile with Inductor and let it capture CUDA graphs."""
    return torch.compile(model, backend="inductor", mode="reduce-overhead", dynamic=False, fullgraph=True)


def inductor_max_autotune(model: nn.Module) -> Network:
    """Compile with Inductor, measured kernel choices and CUDA graphs; takes minutes."""
    return torch.compile(model, backend="inductor", mode="max-autotune", dynamic=False, fullgraph=True)


def styleforge(model: nn.Module, precision: str = "auto") -> Network:
    """Compile with this package's backend, with its default options but for `precision`."""
    # The function rather than its name: a tree that was only copied has no entry point yet.
    from sf_compile.backend import styleforge as backend

    options: dict[str, Any] = {"precision": precision}
    return torch.compile(model, backend=backend, dynamic=False, fullgraph=True, options=options)


def styleforge_reduce_overhead(model: nn.Module) -> Network:
    """Compile with this package's backend and let it capture CUDA graphs."""
    from sf_compile.backend import styleforge as backend

    return torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class Peer:
    """One way to run a network.

    Attributes:
        name: what ``--peers`` calls it.
        row_name: ``peer`` in its rows; two peers share it where only `graphs` differs.
        build: makes the callable from the module. Peers with the same `build` and layout share it.
        compiles: the first call of what `build` returns compiles.
        captured: the benchmark itself captures the callable in a CUDA graph.
        own_graphs: the callable replays CUDA graphs of its own.
        channels_last: dtypes in which model and input are channels_last; NCHW in the others.
        precision: ``precision`` in its rows: what this backend was asked to compute in.
    """

    name: str
    row_name: str
    build: Build
    compiles: bool = False
    captured: bool = False
    own_graphs: bool = False
    channels_last: frozenset[torch.dtype] = frozenset()
    precision: str = "auto"

    @property
    def graphs(self) -> bool:
        """True where a call replays a CUDA graph."""
        return self.captured or self.own_graphs

    def layout(self, dtype: torch.dtype) -> str:
        """Return ``"channels_last"`` or ``"contiguous"``."""
        return "channels_last" if dtype in self.channels_last else "contiguous"

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return what a model of `dtype` is computed in; of int8 what is not."""
        return storage(_PLAIN.get(self.precision, self.precision), dtype)

    def missing(self, device: torch.device) -> str | None:
        """Return why this peer cannot run on `device` here, None where it can."""
        if self.graphs and device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if self.row_name.startswith("inductor"):
            if device.type == "cuda" and importlib.util.find_spec("triton") is None:
                return "Inductor needs Triton for a GPU: pip install triton"
            if device.type == "cpu" and not _has_cpp_compiler():
                return "Inductor needs a C++ compiler for a CPU: install g++ or clang++, or set CXX"
        if self.row_name.startswith("styleforge") and importlib.util.find_spec("sf_compile.backend") is None:
            return "sf_compile.backend is not installed: reinstall sf_compile"
        return None


def _has_cpp_compiler() -> bool:
    """Say whether there is a compiler that Inductor would find."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def of_precisions(peers: Sequence[Peer], precisions: Sequence[str]) -> list[Peer]:
    """Return `peers`, in the place of each of this backend's one for every one of `precisions`."""
    builds: dict[str, Build] = {name: functools.partial(styleforge, precision=name) for name in precisions}
    made: list[Peer] = []
    for peer in peers:
        if peer.row_name != "styleforge":
            made.append(peer)
            continue
        for precision in precisions:
            name = peer.name if precision == "auto" else f"{peer.name} in {precision}"
            made.append(replace(peer, name=name, build=builds[precision], precision=precision))
    return made


def switches(peers: Sequence[Peer]) -> AbstractContextManager[None]:
    """PyTorch's switches as they are; where this backend computes in fp32 alone, without TF32 for all."""
    if {peer.precision for peer in peers if peer.row_name == "styleforge"} == {"fp32"}:
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return nullcontext()


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("eager", "eager", eager),
        Peer("eager-channels-last", "eager-channels-last", eager, channels_last=ALL_DTYPES),
        Peer("eager-graph", "eager-graph", eager, captured=True),
        Peer("inductor", "inductor", inductor, compiles=True, channels_last=SIXTEEN_BIT),
        Peer("inductor-reduce-overhead", "inductor-reduce-overhead", inductor_reduce_overhead,
             compiles=True, own_graphs=True, channels_last=SIXTEEN_BIT),
        Peer("inductor-max-autotune", "inductor-max-autotune", inductor_max_autotune,
             compiles=True, own_graphs=True, channels_last=SIXTEEN_BIT),
        Peer("styleforge", "styleforge", styleforge, compiles=True),
        Peer("styleforge-graph", "styleforge", styleforge, compiles=True, captured=True),
        Peer("styleforge-reduce-overhead", "styleforge-reduce-overhead", styleforge_reduce_overhead,
             compiles=True, own_graphs=True),
    )
}  # fmt: skip
