"""How a number is taken.

All calls that are compared are timed in the same process and interleaved: every round gives each of
them one short burst, with a pause before it so that the GPU stays cool and at full clocks. A burst
starts with one call that is not timed (it wakes the clocks), then takes latencies (each call between
two events, the device idle before it), then a stretch of back-to-back calls. On a CPU a wall clock
takes the place of the events.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[Tensor], Any]
Consume = Callable[[int], object]
"""Returns when that many pictures are done."""

MEBIBYTE = 2**20
_MOST_HOST_CALLS = 50  # of a burst: the host's time varies little


@dataclass(frozen=True)
class Budget:
    """How long to measure one call.

    `seconds` are spent on latencies and 0.3 times as many on back-to-back calls, over `rounds` rounds;
    `pause` is slept, in seconds, before each burst, which begins with `warm` seconds of calls that are not
    timed, so that an idle GPU is back at its clocks. A burst takes at least `least` calls however
    slow they are.
    """

    seconds: float = 1.0
    rounds: int = 10
    pause: float = 0.1
    least: int = 3
    warm: float = 0.03

    @classmethod
    def quick(cls) -> Budget:
        """Return the smallest budget that still takes every kind of number."""
        return cls(seconds=0.02, rounds=2, pause=0.0, least=2, warm=0.0)


@dataclass
class Sample:
    """Measurements of one call: `latencies` in ms, and `streamed` back-to-back calls in `streaming` ms.

    `host` has, on a GPU, what calls took the host in µs.
    """

    latencies: list[float] = field(default_factory=list)
    streaming: float = 0.0
    streamed: int = 0
    host: list[float] = field(default_factory=list)

    def percentile(self, q: float) -> float:
        """Return the `q`-th percentile of the latencies in ms, linearly interpolated."""
        return float(np.percentile(self.latencies, q))

    @property
    def host_us(self) -> float | None:
        """The median time in µs until a call returns that finds nothing queued on the GPU; None on a CPU."""
        return float(np.median(self.host)) if self.host else None

    @property
    def back_to_back(self) -> float:
        """Mean time of a call in ms while calls follow each other without a wait."""
        return self.streaming / self.streamed


def synchronize(device: torch.device) -> None:
    """Wait until `device` has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_call_seconds(call: Call, value: Tensor) -> float:
    """Time one call by the wall clock, device work included, in seconds; its result is dropped."""
    synchronize(value.device)
    begin = time.perf_counter()
    call(value)
    synchronize(value.device)
    return time.perf_counter() - begin


def latency_ms(call: Call, value: Tensor) -> float:
    """Time one call from an idle device to an idle device, in ms."""
    if value.device.type != "cuda":
        begin = time.perf_counter()
        call(value)
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(value)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_us(call: Call, value: Tensor) -> float:
    """Time one call on a GPU by the wall clock until it returns, in µs; nothing is queued before it."""
    synchronize(value.device)
    begin = time.perf_counter()
    call(value)
    return (time.perf_counter() - begin) * 1e6


def streaming_ms(call: Call, values: Iterator[Tensor], calls: int, device: torch.device) -> float:
    """Time `calls` calls that follow each other without a wait, in ms for all of them."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            call(next(values))
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call(next(values))
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    calls: Mapping[str, Call], inputs: Mapping[str, Sequence[Tensor]], budget: Budget
) -> dict[str, Sample]:
    """Measure all `calls` cool, in rounds; each rotates over its own `inputs` (same keys)."""
    samples = {name: Sample() for name in calls}
    rotation = {name: itertools.cycle(inputs[name]) for name in calls}
    for _ in range(budget.rounds):
        for name, call in calls.items():
            device = inputs[name][0].device
            time.sleep(budget.pause)
            once = _warm(call, rotation[name], budget.warm)
            sample, share = samples[name], budget.seconds / budget.rounds
            for _ in range(_count(share, once, budget.least)):
                sample.latencies.append(latency_ms(call, next(rotation[name])))
            if device.type == "cuda":
                most = min(_MOST_HOST_CALLS, _count(0.3 * share, once, budget.least))
                sample.host += [host_us(call, next(rotation[name])) for _ in range(most)]
            streamed = _count(0.3 * share, once, budget.least)
            sample.streaming += streaming_ms(call, rotation[name], streamed, device)
            sample.streamed += streamed
    return samples


def interleaved_rounds(
    consumers: Mapping[str, Consume], batch: int, budget: Budget, device: torch.device
) -> dict[str, list[tuple[int, float]]]:
    """(pictures, seconds) of each round of each of `consumers`, which take a multiple of `batch` pictures."""
    rounds: dict[str, list[tuple[int, float]]] = {name: [] for name in consumers}
    counts = {}
    for name, consume in consumers.items():
        consume(4 * batch)
        begin = time.perf_counter()
        consume(4 * batch)
        each = (time.perf_counter() - begin) / 4
        counts[name] = batch * max(budget.least, min(4000, int(budget.seconds / budget.rounds / each)))
    for _ in range(budget.rounds):
        for name, consume in consumers.items():
            time.sleep(budget.pause)
            synchronize(device)
            consume(batch * max(1, counts[name] // batch // 10))
            begin = time.perf_counter()
            consume(counts[name])
            rounds[name].append((counts[name], time.perf_counter() - begin))
    return rounds


def _warm(call: Call, values: Iterator[Tensor], seconds: float) -> float:
    """Call for `seconds`, once at least; return how many seconds the last call took."""
    begin = time.perf_counter()
    once = first_call_seconds(call, next(values))
    while time.perf_counter() - begin < seconds:
        once = first_call_seconds(call, next(values))
    return once


def _count(seconds: float, once: float, least: int) -> int:
    """Return how many calls of `once` seconds fill `seconds`; at most 2000, so that a queue stays short."""
    return max(least, min(2000, int(seconds / max(once, 1e-7))))


def sustained(call: Call, values: Sequence[Tensor], seconds: float) -> Sample:
    """Measure `call` hot: back to back for `seconds`, of which the second half counts.

    `latencies` holds the time from the end of one call to the end of the next, as a stream sees it.
    """
    device = values[0].device
    rotation = itertools.cycle(values)
    once = first_call_seconds(call, next(rotation))
    chunk = max(2, min(500, int(0.1 / max(once, 1e-7))))
    sample = Sample()
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not sample.latencies:
        gaps = _gaps_ms(call, rotation, chunk, device)
        if elapsed >= seconds / 2:
            sample.latencies += gaps
    sample.streaming, sample.streamed = sum(sample.latencies), len(sample.latencies)
    return sample


def _gaps_ms(call: Call, values: Iterator[Tensor], calls: int, device: torch.device) -> list[float]:
    """Return the time in ms of each of `calls` calls in a stream of them."""
    if device.type != "cuda":
        return [latency_ms(call, next(values)) for _ in range(calls)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        call(next(values))
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


class CapturedCall:
    """A call captured in a CUDA graph.

    Each call copies its argument into the graph's own input and replays; that copy is part of the
    time, as it is in Inductor's CUDA graphs. The result is overwritten by the next call.
    """

    def __init__(self, call: Call, example: Tensor):
        self._input = torch.empty_like(example).copy_(example)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self._output = call(self._input)

    def __call__(self, value: Tensor) -> Tensor:
        """Run the graph on `value`, which has the shape, dtype and layout of the example."""
        self._input.copy_(value)
        self._graph.replay()
        return self._output


def peak_mebibytes(work: Callable[[], Any], device: torch.device) -> float | None:
    """Return what `work` allocates at its peak beyond what was allocated before it, in MiB.

    Weights, inputs and what other peers hold are thus not counted; the result and all intermediates
    are. Of a call that replays a CUDA graph `work` must be the recording: a replay allocates nothing,
    the graph's pool keeps what the recording took. None on a CPU.
    """
    if device.type != "cuda":
        work()
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE
