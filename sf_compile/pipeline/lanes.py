"""Buffers that a batch travels through, and the three CUDA streams that carry it; on a CPU there are none.

A slot has all that one batch needs from the copy of its first picture to the copy of its last result, so that
nothing of a batch is touched by another before its slot is free again. Buffers grow with the pictures.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sf_compile.pipeline.conversion import Convention
from sf_compile.pipeline.lending import Spares
from sf_compile.pipeline.timeline import Timeline


class Part(NamedTuple):
    """Pictures that went through the network together.

    From ``first`` of their batch on ``size`` of them; their bytes are at ``offset`` of the slot's results, in
    ``shape`` (N, H, W, 3), or ``error`` is what they ended in.
    """

    first: int
    size: int
    offset: int = 0
    shape: tuple[int, ...] = ()
    error: Exception | None = None

    def picture(self, results: np.ndarray, place: int) -> np.ndarray:
        """The bytes of one picture of it, a view of those of a slot's ``results``, flat."""
        end = self.offset + math.prod(self.shape)
        return results[self.offset : end].reshape(self.shape)[place]


class Slot:
    """Buffers of one batch: pixels on the host and on the device, results and flags on the host."""

    def __init__(self) -> None:
        self.pixels: Tensor | None = None  # bytes, flat, on the host; pinned for a GPU
        self.uploaded: Tensor | None = None  # the same on the GPU
        self.results: Tensor | None = None
        self.results_read: Any = None  # what may still read them: an event that a download waits for
        self.broken: Tensor | None = None
        self.alive: list[Tensor] = []  # on the GPU, until they have been downloaded
        self.events: tuple[Any, ...] = ()  # of its batch: uploaded, computed, downloaded
        self.marks: list[tuple[str, Any, Any]] = []

    def pixels_of(self, shape: tuple[int, ...]) -> Tensor:
        """The first bytes of ``pixels``, as pictures (N, H, W, 3)."""
        assert self.pixels is not None
        return _view(self.pixels, 0, shape)

    def lent(self, spares: Spares) -> np.ndarray | None:
        """All results, flat, in an array that may be handed out; None where too many are lent already."""
        if self.results is None:
            return None
        exchanged = spares.exchange(self.results)
        if exchanged is None:
            return None
        array, self.results, self.results_read = exchanged
        return array

    def bytes_of_results(self) -> np.ndarray:
        """All results, flat."""
        assert self.results is not None
        array: np.ndarray = self.results.numpy()
        return array


class Lanes:
    """Takes a batch from its host buffer through the network, back into its host buffer.

    Everything is enqueued and nothing waited for: uploads on one stream, the network and both conversions
    on a second, downloads on a third, each behind the event of the one before. Without a GPU everything has
    happened when a call returns.
    """

    def __init__(self, network: Callable[[Tensor], Any], convention: Convention) -> None:
        self._network = network
        self._convention = convention
        self.device = convention.device
        self._gpu = self.device.type == "cuda"
        if self._gpu:
            self._upload, self._compute, self._download = (torch.cuda.Stream(self.device) for _ in range(3))

    def enter_thread(self) -> None:
        """Make the device the calling thread's current one."""
        if self._gpu:
            torch.cuda.set_device(self.device)

    def begin(self) -> None:
        """The network may start when what the caller's stream has now is done: its weights, for one."""
        if self._gpu:
            self._compute.wait_stream(torch.cuda.current_stream(self.device))

    def reserve(self, slot: Slot, size: int) -> None:
        """Have room for ``size`` bytes of pixels on the host."""
        slot.pixels = self._host(slot.pixels, size)

    def run(self, slot: Slot, shape: tuple[int, ...], index: int, timeline: Timeline | None) -> list[Part]:
        """Enqueue all that the batch in ``slot`` needs; ``wait`` then waits for it.

        Pictures that fail together are tried one by one. ``index`` is the first one's.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self._gpu:
                stack.enter_context(torch.cuda.device(self.device))
            slot.marks = []
            if self._gpu and not slot.events:
                slot.events = (*(torch.cuda.Event() for _ in range(2)), torch.cuda.Event(blocking=True))
            pixels = self._uploaded(slot, shape, timeline)
            if self._gpu:
                stack.enter_context(torch.cuda.stream(self._compute))
            made: list[tuple[int, Tensor, Tensor]] = []
            errors: list[Part] = []
            try:
                made.append((0, *self._through(pixels, index, timeline, slot)))
            except Exception as error:  # noqa: BLE001 - the network's own, handed to the caller
                if len(pixels) == 1:
                    errors.append(Part(0, 1, error=_cleared(error)))
            if not made and not errors:  # without the error, which holds what the network had allocated
                self._one_by_one(pixels, made, errors)
        return self._downloaded(slot, shape[0], made, errors, timeline)

    def arrived(self, slot: Slot) -> bool:
        """Whether ``wait`` would not wait."""
        return not slot.events or bool(slot.events[2].query())

    def moment(self) -> Any:
        """An event of what the calling thread's stream has now; None without a GPU."""
        if not self._gpu or torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()
        with contextlib.suppress(RuntimeError):  # a GPU that failed says so elsewhere
            event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, slot: Slot, index: int, timeline: Timeline | None) -> None:
        """Until the results of ``run`` are in the host's buffers.

        Raises:
            RuntimeError: the GPU failed.
        """
        if slot.events:
            slot.events[2].synchronize()
        slot.alive = []
        if timeline is not None:
            for lane, begin, end in slot.marks:
                timeline.device(lane, index, begin, end)
        slot.marks = []

    def synchronize(self) -> None:
        """Until the device has done all that was enqueued."""
        if self._gpu:
            for stream in (self._upload, self._compute, self._download):
                stream.synchronize()

    def _host(self, buffer: Tensor | None, size: int) -> Tensor:
        if buffer is not None and buffer.numel() >= size:
            return buffer
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._gpu)

    def _uploaded(self, slot: Slot, shape: tuple[int, ...], timeline: Timeline | None) -> Tensor:
        source = slot.pixels_of(shape)
        if not self._gpu:
            return source
        with torch.cuda.stream(self._upload):
            # Of the upload stream's own memory: what other streams have freed they may still be using.
            if slot.uploaded is None or slot.uploaded.numel() < source.numel():
                slot.uploaded = None
                assert slot.pixels is not None
                slot.uploaded = torch.empty(slot.pixels.numel(), dtype=torch.uint8, device=self.device)
            target = _view(slot.uploaded, 0, shape)
            with _marked(slot, "upload", timeline):
                target.copy_(source, non_blocking=True)
            slot.events[0].record()
        self._compute.wait_event(slot.events[0])
        return target

    def _through(
        self, pixels: Tensor, index: int, timeline: Timeline | None, slot: Slot
    ) -> tuple[Tensor, Tensor]:
        with _marked(slot, "to numbers", timeline, index):
            x = self._convention.to_numbers(pixels)
        with _marked(slot, "network", timeline, index):
            y = self._network(x)
        with _marked(slot, "to bytes", timeline, index):
            return self._convention.to_bytes(y, pixels, x)

    def _one_by_one(
        self, pixels: Tensor, made: list[tuple[int, Tensor, Tensor]], errors: list[Part]
    ) -> None:
        for place in range(len(pixels)):
            one = pixels[place : place + 1]
            try:
                x = self._convention.to_numbers(one)
                made.append((place, *self._convention.to_bytes(self._network(x), one, x)))
            except Exception as own:  # noqa: BLE001 - as above
                errors.append(Part(place, 1, error=_cleared(own)))

    def _downloaded(
        self, slot: Slot, count: int, made: list[tuple[int, Tensor, Tensor]], parts: list[Part],
        timeline: Timeline | None,
    ) -> list[Part]:  # fmt: skip
        size = sum(out.numel() for _, out, _ in made)
        if size:
            slot.results = self._host(slot.results, size)
        if slot.broken is None or slot.broken.numel() < count:
            with torch.inference_mode(False):
                slot.broken = torch.empty(
                    count, dtype=torch.int32, device="cpu", pin_memory=self._gpu
                )
        with contextlib.ExitStack() as stack:
            if self._gpu:
                stack.enter_context(torch.cuda.device(self.device))
                slot.events[1].record(self._compute)
                self._download.wait_event(slot.events[1])
                if slot.results_read is not None:
                    self._download.wait_event(slot.results_read)
                    slot.results_read = None
                stack.enter_context(torch.cuda.stream(self._download))
            offset = 0
            with _marked(slot, "download", timeline):
                for first, out, broken in made:
                    assert slot.results is not None
                    part = Part(first, len(out), offset, tuple(out.shape))
                    _view(slot.results, offset, part.shape).copy_(out, non_blocking=True)
                    slot.broken[first : first + len(out)].copy_(broken, non_blocking=True)
                    parts.append(part)
                    offset += out.numel()
                    slot.alive += [out, broken]
            if self._gpu:
                slot.events[2].record()
        return sorted(parts, key=lambda part: part.first)


def _cleared(error: Exception) -> Exception:
    """The error with the network's part of its traceback, and without what its frames hold of memory."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    traceback.clear_frames(frames)
    return error.with_traceback(frames)


_UNMARKED = contextlib.nullcontext()


def _marked(
    slot: Slot, lane: str, timeline: Timeline | None, index: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Note when the lane's work begins and ends, if there is a timeline."""
    return _UNMARKED if timeline is None else _noted(slot, lane, timeline, index)


@contextlib.contextmanager
def _noted(slot: Slot, lane: str, timeline: Timeline, index: int) -> Iterator[None]:
    if slot.uploaded is None:  # on a CPU
        begin = timeline.now()
        yield
        if lane not in ("upload", "download"):
            timeline.host(lane, index, begin)
        return
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    events[0].record()
    yield
    events[1].record()
    slot.marks.append((lane, *events))


def _view(buffer: Tensor, offset: int, shape: tuple[int, ...]) -> Tensor:
    """Bytes of a flat buffer from ``offset`` on, in a shape."""
    return buffer[offset : offset + math.prod(shape)].view(shape)
