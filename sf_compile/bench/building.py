"""From a peer to something that can be called and timed, with what its compilation took.

`compile_cold_s` is the first call of a compiled peer, with every disk cache (styleforge's, Inductor's,
Triton's) in an empty folder. styleforge also keeps the kernels it loaded for as long as the process
lives, and they serve every size: its cold time is taken at the first size of a run only, and only where
one precision is timed.
`compile_warm_s` is the first call of a second compilation after ``torch._dynamo.reset()``, with the
folder as the cold one left it, in the same process. It is taken for styleforge only, because Inductor's
would double minutes.

`kernels_cold_s` is the part of the cold call in which styleforge's kernels were compiled and loaded;
`kernels_warm_s` is how long loading the same kernels again takes from the cubins that the cold call left. The
second compilation finds them loaded, so a process that starts with full caches takes `compile_warm_s` and
`kernels_warm_s` together.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

from sf_compile.bench.peers import Peer
from sf_compile.bench.timing import Call, CapturedCall, first_call_seconds, peak_mebibytes
from sf_compile.cuda import loader
from sf_compile.cuda.launcher import Kernel


@dataclass(frozen=True)
class Built:
    """A callable network with what its compilation took in seconds; None where it was not measured."""

    call: Call
    compile_cold_s: float | None = None
    compile_warm_s: float | None = None
    kernels_cold_s: float | None = None
    kernels_warm_s: float | None = None


def build(peer: Peer, model: nn.Module, example: Tensor, caches: Path, *, unloaded: bool) -> Built:
    """Build a peer's callable and make its first call, timed where that compiles.

    Args:
        peer: what to build.
        model: the network, in the peer's layout and in eval mode.
        example: an input in the same dtype and layout.
        caches: a folder under which the disk caches go.
        unloaded: false where this process may have loaded kernels that serve `peer`, for another size or
            precision.
    """
    if not peer.compiles:
        call = peer.build(model)
        call(example)
        return Built(call)
    with _cache_folder(Path(tempfile.mkdtemp(dir=caches))):
        before = set(loader.loaded())
        call = peer.build(model)
        cold = first_call_seconds(call, example)
        if peer.row_name != "styleforge":
            return Built(call, cold)
        kernels = [kernel for kernel in loader.loaded() if kernel not in before]
        torch._dynamo.reset()
        call = peer.build(model)
        warm = first_call_seconds(call, example)
        if not unloaded:
            return Built(call, None, warm)
        return Built(call, cold, warm, *_kernel_seconds(kernels))


def _kernel_seconds(kernels: Sequence[Kernel]) -> tuple[float | None, float | None]:
    """Return what loading `kernels` took, and takes from the disk cache; None for both without any."""
    if not kernels:
        return None, None
    cold = sum(kernel.load_seconds for kernel in kernels)
    return cold, sum(loader.reload(kernel).load_seconds for kernel in kernels)


@contextlib.contextmanager
def _cache_folder(folder: Path) -> Iterator[None]:
    """Point every disk cache into `folder`, and drop what Inductor keeps in memory."""
    if "torch._inductor.utils" in sys.modules:
        sys.modules["torch._inductor.utils"].clear_caches()
    names = ("STYLEFORGE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(folder / name.lower()) for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def ready(peer: Peer, call: Call, example: Tensor) -> tuple[Call, float | None]:
    """Capture where the peer is captured, warm up, and return the callable with its peak memory in MiB."""
    if peer.captured:
        captured: list[CapturedCall] = []
        peak = peak_mebibytes(lambda: captured.append(CapturedCall(call, example)), example.device)
        return captured[0], peak
    if peer.own_graphs:
        # Inductor warms up in its first call, records in its second and replays from its third.
        def record_and_replay() -> None:
            call(example)
            call(example)

        return call, peak_mebibytes(record_and_replay, example.device)
    return call, peak_mebibytes(lambda: call(example), example.device)
