"""Capturing a call in a CUDA graph, and replaying it.

A graph has memory of its own: PyTorch gives a capture a private pool, in which everything lies that the call
allocates, workspaces included (``sf_compile.cuda.workspace``). So a replay meets neither plain calls nor
other graphs. Two replays of one graph would meet: a lock orders those of several threads on the host, and an
event those of several streams on the GPU.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sf_compile.cuda import packing
from sf_compile.cuda.recorder import extent
from sf_compile.cuda.repeated import watched
from sf_compile.runtime.graph_device import NotCapturable

_streams: dict[int, torch.cuda.Stream] = {}
_capturing = threading.Lock()
"""Held by the one thread of the process that captures."""


class CudaDevice:
    """A ``sf_compile.runtime.graph_device.Device``: PyTorch's CUDA."""

    def __init__(self) -> None:
        precision = getattr(torch._C, "_get_fp32_precision_getter", None)
        self._precision: Callable[[str, str], Any] = precision or (lambda backend, operation: None)

    def refusal(self, tensors: Sequence[Tensor]) -> str | None:
        """Why no call with these inputs can be captured; None where one may."""
        if not tensors:
            return "there is no tensor among its inputs"
        device = tensors[0].device
        for x in tensors:
            if not x.is_cuda:
                return "an input is on the CPU"
            if x.device != device:
                return f"its inputs are on several devices, {device} and {x.device}"
        return None

    def busy(self) -> bool:
        """Whether the current stream is being captured, or a mode or tracer wants to see each operation."""
        return torch.cuda.is_current_stream_capturing() or watched()

    def settings(self) -> tuple[Any, ...]:
        """The precision of float32 convolutions and products."""
        return self._precision("cuda", "conv"), self._precision("cuda", "matmul")

    def current(self, tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Makes the device of ``tensor`` the current one."""
        if not tensor.is_cuda or torch._C._cuda_getDevice() == tensor.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(tensor.device)

    def memory(self, tensor: Tensor) -> int:
        """Bytes of memory that its device has."""
        return int(torch.cuda.get_device_properties(tensor.device).total_memory)

    def release(self) -> None:
        """Give back memory that PyTorch's allocator keeps: during a capture it cannot."""
        with _capturing:
            torch.cuda.empty_cache()

    def own(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same sizes, strides and contents."""
        with torch.inference_mode(False), torch.no_grad():  # they are written in whatever mode
            made = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
            _copy([_distinct(x) for x in made], [_distinct(x) for x in inputs])
        return made

    def capture(self, run: Callable[..., Any], inputs: Sequence[Any], own: Sequence[Tensor]) -> CapturedCall:
        """The graph of ``run(*inputs)``, of whose tensors ``own`` change from replay to replay.

        The current device is theirs.

        Raises:
            NotCapturable: there is none.
            torch.OutOfMemoryError: there is no room for it.
        """
        if not _capturing.acquire(blocking=False):
            raise NotCapturable("another thread is capturing", again=True)
        try:
            return _captured(run, inputs, own)
        finally:
            _capturing.release()


class CapturedCall:
    """A ``sf_compile.runtime.graph_device.Graph``.

    Attributes:
        bytes: What it holds of the GPU's memory.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, own: Sequence[Tensor], results: Any, size: int, stream: Any
    ) -> None:
        self.bytes = size
        self._graph = graph
        self._own = tuple(own)
        self._targets = [_distinct(x) for x in own]
        self._spread = any(target is not x for target, x in zip(self._targets, own, strict=True))
        self._results = results
        self._single = isinstance(results, Tensor)
        self._lock = threading.Lock()
        self._streams = {stream.cuda_stream}
        self._stream = stream
        self._done = torch.cuda.Event()
        self._done.record(stream)

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the call returns for other ``inputs``, on the current stream, in tensors of their own."""
        sources = [_distinct(x) for x in inputs] if self._spread else inputs
        with self._lock:
            if torch._C._cuda_getCurrentRawStream(self._stream.device_index) != self._stream.cuda_stream:
                self._move(torch.cuda.current_stream())
            try:
                _copy(self._targets, sources)
                self._graph.replay()
                if self._single:
                    return _copied(self._results)
                copies: dict[int, Tensor] = {}  # a tensor that is returned twice is one again
                for x in self._results:
                    if isinstance(x, Tensor) and id(x) not in copies:
                        copies[id(x)] = _copied(x)
                return type(self._results)(copies.get(id(x), x) for x in self._results)
            finally:
                self._done.record(self._stream)

    def _move(self, stream: torch.cuda.Stream) -> None:
        """Replay on another stream from now on, after what was replayed before."""
        stream.wait_event(self._done)
        if stream.cuda_stream not in self._streams:
            self._streams.add(stream.cuda_stream)
            for x in self._own:  # not to be used again before this stream has passed its replays
                x.record_stream(stream)
        self._stream = stream


def _captured(run: Callable[..., Any], inputs: Sequence[Any], own: Sequence[Tensor]) -> CapturedCall:
    here = torch.cuda.current_stream()
    index = here.device_index
    stream = _streams.get(index) or _streams.setdefault(index, torch.cuda.Stream(index))
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with packing.paused(), _undisturbed():
        before = torch.cuda.memory_reserved(index)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            # A graph gets cuBLAS workspaces of its own, in its own memory.
            torch._C._cuda_clearCublasWorkspaces()
            # Other threads may go on; what they must not do meanwhile is to wait for the whole device.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                results = run(*inputs)
            except BaseException as error:
                _abandon(graph, index, pool)
                if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
                    raise
                raise NotCapturable(_first_line(error)) from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                _recover(index, pool)
                raise NotCapturable(_first_line(error)) from error
            torch._C._cuda_clearCublasWorkspaces()
        here.wait_stream(stream)
        size = max(0, torch.cuda.memory_reserved(index) - before) + sum(map(extent, own))
    return CapturedCall(graph, own, results, size, here)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Plain tensors, no autograd, no weights that autocast would drop later, no garbage collector."""
    cached, collecting = torch.is_autocast_cache_enabled(), gc.isenabled()
    with torch.inference_mode(False), torch.no_grad():
        gc.disable()  # it might free another graph, which CUDA does not take well during a capture
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            if collecting:
                gc.enable()


def _abandon(graph: torch.cuda.CUDAGraph, index: int, pool: Any) -> None:
    """End a capture in which something was raised."""
    try:
        graph.capture_end()
    except RuntimeError:
        _recover(index, pool)
    else:
        graph.reset()


def _recover(index: int, pool: Any) -> None:
    """Tell PyTorch that a capture is over which CUDA has given up, for ``capture_end`` then says nothing.

    Its allocator would go on looking for the capture, and its random generator would raise in every call.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    with contextlib.suppress(RuntimeError):  # the generator is told at the end of any capture
        empty = torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=f"cuda:{index}")
        empty.capture_end()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _distinct(x: Tensor) -> Tensor:
    """The elements of ``x`` once each, where it was expanded."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """By one kernel, where there are several of a kind."""
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    elif targets:
        torch._foreach_copy_(list(targets), list(sources))


def _copied(x: Tensor) -> Tensor:
    """A tensor of its own with the size, strides and contents of ``x``."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
