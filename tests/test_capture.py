"""The calls that a capture and its replays make of PyTorch, with a CUDA of Python in its place."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch

from sf_compile.cuda import capture, packing
from sf_compile.cuda.capture import CudaDevice
from sf_compile.runtime.cuda_graphs import Graphed
from sf_compile.runtime.graph_device import NotCapturable


class StandInCuda:
    """Notes what is asked of it, in order; a graph repeats the functions that were called in its capture."""

    def __init__(self):
        self.log: list[tuple] = []
        self.current = self.stream(1)
        self.capturing = None
        self.end_error = None
        self.reserved = 1000

    def stream(self, number):
        return SimpleNamespace(
            cuda_stream=number, device_index=0,
            wait_stream=lambda other: self.log.append(("wait", number, other.cuda_stream)),
            wait_event=lambda event: self.log.append(("wait event", number)),
        )  # fmt: skip

    def install(self, monkeypatch):
        cuda = self

        class Graph:
            def __init__(self):
                self.calls = []

            def capture_begin(self, pool=None, capture_error_mode="global"):
                assert cuda.capturing is None and capture_error_mode == "thread_local"
                assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
                assert not gc.isenabled() and not torch.is_autocast_cache_enabled()
                cuda.log.append(("begin", cuda.current.cuda_stream))
                cuda.capturing = self

            def capture_end(self):
                assert cuda.capturing is self
                cuda.capturing = None
                if cuda.end_error:
                    error, cuda.end_error = cuda.end_error, None
                    raise error
                cuda.reserved += 500
                cuda.log.append(("end",))

            def replay(self):
                cuda.log.append(("replay", cuda.current.cuda_stream))
                for call in self.calls:
                    call()

            def reset(self):
                cuda.log.append(("reset",))

        class Event:
            def record(self, stream):
                cuda.log.append(("record", stream.cuda_stream))

        @contextlib.contextmanager
        def on(stream):
            before, cuda.current = cuda.current, stream
            yield
            cuda.current = before

        torch_cuda = {
            "CUDAGraph": Graph, "Event": Event, "stream": on, "Stream": lambda index: self.stream(9),
            "current_stream": lambda *_: cuda.current, "graph_pool_handle": lambda: (0, 7),
            "memory_reserved": lambda index: cuda.reserved,
            "is_current_stream_capturing": lambda: cuda.capturing is not None,
        }  # fmt: skip
        for name, value in torch_cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        private = {
            "_cuda_getCurrentRawStream": lambda index: cuda.current.cuda_stream,
            "_cuda_clearCublasWorkspaces": lambda: cuda.log.append(("clear",)),
            "_cuda_endAllocateToPool": lambda index, pool: cuda.log.append(("end pool", pool)),
            "_cuda_releasePool": lambda index, pool: cuda.log.append(("release pool", pool)),
        }
        for name, value in private.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        monkeypatch.setattr(capture, "_streams", {})
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None: None)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: cuda.log.append(
            ("keep for", s.cuda_stream)))  # fmt: skip
        return self


@pytest.fixture
def cuda(monkeypatch):
    return StandInCuda().install(monkeypatch)


class OnTheCpu(CudaDevice):
    """Takes tensors on the CPU for some on a GPU."""

    def refusal(self, tensors):
        return None

    def current(self, tensor):
        return contextlib.nullcontext()

    def memory(self, tensor):
        return 10**9


def double(cuda, function=lambda x, out: torch.mul(x, 2, out=out)):
    """A function that a capture notes."""

    def run(x):
        out = torch.empty_like(x)
        if cuda.capturing is None:
            function(x, out)
        else:
            cuda.capturing.calls.append(lambda: function(x, out))
        return (out,)

    return run


def test_a_capture_and_its_replays(cuda):
    call = Graphed(double(cuda), (), 8, 0.5, OnTheCpu())
    with torch.no_grad():
        for _ in range(2):
            x = torch.rand(2, 3)
            assert torch.equal(call(x)[0], 2 * x)
        assert cuda.log == [
            ("wait", 9, 1), ("clear",), ("begin", 9), ("end",), ("clear",), ("wait", 1, 9), ("record", 1),
        ]  # fmt: skip
        assert gc.isenabled() and torch.is_autocast_cache_enabled()
        assert call.bytes == 500 + 24
        cuda.log.clear()
        kept = [(x, call(x)[0]) for x in (torch.rand(2, 3) for _ in range(3))]
        assert all(torch.equal(out, 2 * x) for x, out in kept)
        assert cuda.log == [("replay", 1), ("record", 1)] * 3


def test_replays_on_another_stream_follow_those_before(cuda):
    call = Graphed(double(cuda), (), 8, 0.5, OnTheCpu())
    with torch.no_grad():
        for _ in range(3):
            call(torch.rand(2, 3))
        cuda.log.clear()
        for number in (2, 2, 1, 2):
            with torch.cuda.stream(cuda.stream(number)):
                x = torch.rand(2, 3)
                assert torch.equal(call(x)[0], 2 * x)
    assert cuda.log == [
        ("wait event", 2), ("keep for", 2), ("replay", 2), ("record", 2),
        ("replay", 2), ("record", 2),
        ("wait event", 1), ("replay", 1), ("record", 1),
        ("wait event", 2), ("replay", 2), ("record", 2),
    ]  # fmt: skip


def test_expanded_strided_and_several_inputs(cuda):
    def run(x, y):
        out = torch.empty(2, 3, 4)
        function = lambda: torch.add(x, y, out=out)  # noqa: E731
        function() if cuda.capturing is None else cuda.capturing.calls.append(function)
        return [out, None, out]

    call = Graphed(run, (), 8, 0.5, OnTheCpu())
    with torch.no_grad():
        for _ in range(4):
            x, y = torch.rand(2, 1, 4).expand(2, 3, 4), torch.rand(2, 3, 8)[..., ::2]
            first, none, second = call(x, y)
            assert torch.equal(first, x + y) and none is None and first is second
    assert cuda.log.count(("replay", 1)) == 2


def test_an_error_in_a_capture_ends_it(cuda):
    def run(x):
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return (x * 2,)

    device = OnTheCpu()
    reason = r"^operation not permitted when stream is capturing$"
    with torch.no_grad(), pytest.raises(NotCapturable, match=reason):
        device.capture(run, [torch.rand(2)], [])
    assert cuda.capturing is None and ("reset",) in cuda.log and ("end pool", (0, 7)) not in cuda.log
    cuda.log.clear()
    cuda.end_error = RuntimeError("capture was invalidated")
    with torch.no_grad(), pytest.raises(NotCapturable, match="operation not permitted"):
        device.capture(run, [torch.rand(2)], [])
    assert cuda.log[-4:] == [("end pool", (0, 7)), ("release pool", (0, 7)), ("begin", 9), ("end",)]
    assert gc.isenabled() and torch.is_autocast_cache_enabled()
    assert capture._capturing.acquire(blocking=False)
    capture._capturing.release()


def test_a_capture_that_cannot_be_ended_is_told_to_the_allocator(cuda):
    cuda.end_error = RuntimeError("capture was invalidated")
    with torch.no_grad(), pytest.raises(NotCapturable, match="capture was invalidated"):
        OnTheCpu().capture(lambda x: (x * 2,), [torch.rand(2)], [])
    assert ("end pool", (0, 7)) in cuda.log


def test_memory_that_runs_out_in_a_capture_is_told(cuda):
    def run(x):
        raise torch.OutOfMemoryError("none left")

    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        OnTheCpu().capture(run, [torch.rand(2)], [])
    assert ("reset",) in cuda.log


def test_one_thread_captures_at_a_time_and_no_weight_is_packed_meanwhile(cuda):
    held = []

    def run(x):
        held.append(packing._lock._is_owned())
        return (x * 2,)

    with torch.no_grad():
        OnTheCpu().capture(run, [torch.rand(2)], [])
        assert held == [True]
        with capture._capturing, pytest.raises(NotCapturable, match="another thread") as caught:
            OnTheCpu().capture(run, [torch.rand(2)], [])
    assert caught.value.again


def test_what_a_gpu_refuses():
    device = CudaDevice()
    assert device.refusal([torch.rand(2)]) == "an input is on the CPU"
    assert device.refusal([]) == "there is no tensor among its inputs"
    assert len(device.settings()) == 2


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(2, 3),
        torch.rand(2, 6)[:, ::2],
        torch.rand(3).expand(2, 3),
        torch.rand(()),
        torch.rand(4).as_strided((2, 3), (1, 1)),
        torch.rand(0, 3),
    ],
)
def test_what_a_graph_reads_lies_as_the_input_does(x):
    with torch.inference_mode():
        own, other = CudaDevice().own([x, x])
    assert torch.equal(own, x) and own.stride() == x.stride() and not own.is_inference()
    assert other is not own and (other.data_ptr() != own.data_ptr() or not x.numel())
