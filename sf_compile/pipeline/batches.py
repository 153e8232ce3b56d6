"""Batches of pictures on their way through a stream, and what its threads share.

At most ``depth`` batches are being filled, worked on or waiting to be handed out, however long the source is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from sf_compile.pipeline.copier import Copier
from sf_compile.pipeline.lanes import Lanes, Part, Slot
from sf_compile.pipeline.lending import Spares
from sf_compile.pipeline.pictures import PictureError
from sf_compile.pipeline.timeline import Timeline


class Batch:
    """Pictures of one size that go through the network together; or an error in place of one picture."""

    def __init__(self, first: int, slot: Slot | None, sides: tuple[int, int]) -> None:
        self.first = first
        self.slot = slot
        self.sides = sides
        self.tensors: list[bool] = []  # of each picture: it came as a tensor
        self.opened = 0.0  # when its first picture was there
        self.copying = True  # the reader is writing into it
        self.parts: list[Part] = []
        self.results: deque[Any] = deque()


class State:
    """What the threads share, under ``lock``; outlives the stream object only as long as they run.

    Each waits on a condition of its own: that there is ``space`` for the reader, ``news`` for the caller.
    """

    def __init__(
        self, lanes: Lanes, batch_size: int, max_latency: float | None, depth: int, copy: bool,
        copy_threads: int, check_finite: bool, timeline: Timeline | None,
    ) -> None:  # fmt: skip
        self.lanes = lanes
        self.batch_size = batch_size
        self.max_latency = max_latency
        self.depth = depth
        self.copy = copy
        self.check_finite = check_finite
        self.timeline = timeline
        self.copier = Copier(copy_threads)
        self.lock = threading.RLock()
        self.space = threading.Condition(self.lock)
        self.news = threading.Condition(self.lock)
        # Results that are views keep their slot until the next one is asked for: one slot more.
        self.free = deque(Slot() for _ in range(depth + (not copy)))
        self.spares = Spares(depth if copy else 0, lanes.moment)
        self.open: Batch | None = None  # being filled
        self.ready: deque[Batch] = deque()  # to be launched by the caller
        self.flying: deque[Batch] = deque()  # launched, in the order of the source
        self.exhausted = False
        self.failure: BaseException | None = None  # what ends the stream, once all before it was handed out
        self.closed = False

    def ship(self) -> None:
        """Give the open batch, if there is one, to the caller; under ``lock``."""
        if self.open is not None and self.open.tensors:
            self.ready.append(self.open)
            self.open = None
            self.news.notify()

    def due(self) -> float | None:
        """Seconds until the open batch must go as it is; None if it need not; under ``lock``."""
        batch = self.open
        if self.max_latency is None or batch is None or batch.copying:
            return None
        return batch.opened + self.max_latency - time.perf_counter()

    def fail(self, error: PictureError) -> None:
        """An error takes the place of a picture."""
        batch = Batch(error.index, None, (0, 0))
        batch.results.append(error)
        with self.lock:
            self.ship()
            self.ready.append(batch)
            self.news.notify()

    def arrived(self, batch: Batch) -> bool:
        """Whether the results of a batch that was launched need not be waited for."""
        return batch.slot is None or self.lanes.arrived(batch.slot)

    def release(self, batch: Batch) -> None:
        """The batch's slot may be used again; under ``lock``."""
        if batch.slot is not None:
            self.free.append(batch.slot)
            batch.slot = None
            self.space.notify()
