"""An iterator over the pictures of a stream: launches its batches, and gives their results in order.

Two threads share one ``State`` (``batches``):

    reader     asks the source, checks its pictures, copies them into the slot of the open batch (``reader``)
    caller     in ``next``: launches batches that are ready, waits for the oldest, hands out its results

The network runs in the caller's thread, with the caller's autocast, Dynamo caches and CUDA graphs.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from sf_compile.pipeline.batches import Batch, State
from sf_compile.pipeline.lanes import Part
from sf_compile.pipeline.pictures import PictureError
from sf_compile.pipeline.reader import read
from sf_compile.pipeline.results import results_of
from sf_compile.pipeline.timeline import Span

_POLL = 0.0005  # seconds between looks at the GPU while there may be something to launch before long
_GRACE = 0.5  # seconds that closing waits for a source that is being asked


class PictureStream:
    """An iterator over stylised pictures, uint8 (H, W, 3), in the order of the source.

    Arrays become arrays, tensors become tensors. Made by calling a ``StylizePipeline``. It works ahead of its
    caller in threads of its own; these end, and all buffers are let go, at the end of the source, by
    ``close``, at the end of a ``with`` block, by an interrupt, or when nobody holds it any more. For one
    thread at a time.

    Attributes:
        index: of the picture that was handed out, or raised, last; -1 before the first.
    """

    def __init__(self, state: State, source: Iterable[Any]) -> None:
        iterator = iter(source)
        self.index = -1
        self._state = state
        self._current: Batch | None = None
        state.lanes.begin()
        self._reader = threading.Thread(
            target=read, args=(state, iterator), name="styleforge-read", daemon=True
        )
        self._finalizer = weakref.finalize(self, _close, state, self._reader)
        self._reader.start()

    def __iter__(self) -> PictureStream:
        return self

    def __enter__(self) -> PictureStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __next__(self) -> np.ndarray | Tensor:
        """The next picture.

        Raises:
            PictureError: in place of the one that failed; the next call goes on with the one after it.
        """
        while self._current is None or not self._current.results:
            self._let_go()
            try:
                self._current = self._next_batch()
            except BaseException:
                self.close()
                raise
            if self._current is None:
                self.close()
                raise StopIteration
        result = self._current.results.popleft()
        self.index += 1
        if isinstance(result, PictureError):
            raise result
        return result

    def close(self) -> None:
        """End the threads and let go of all buffers; views that were handed out are not valid any more.

        A source that is being asked right now is waited for half a second; its thread ends when it answers.
        """
        self._current = None
        self._finalizer()

    @property
    def timeline(self) -> list[Span]:
        """What happened when so far, of a pipeline with ``timeline=True``; else nothing."""
        return [] if self._state.timeline is None else list(self._state.timeline.spans)

    def _let_go(self) -> None:
        """The caller has asked for more: views into the current batch's slot end."""
        if self._current is not None:
            with self._state.lock:
                self._state.release(self._current)
            self._current = None

    def _next_batch(self) -> Batch | None:
        """The next batch, whose results are there; launches what is ready before; None at the end."""
        while (step := self._step()) is not None:
            batch, launched = step
            if launched:
                self._land(batch)
                return batch
            self._launch(batch)
        return None

    def _step(self) -> tuple[Batch, bool] | None:
        """What comes next: False and a batch to launch, or True and the oldest launched; None at the end."""
        state = self._state
        with state.lock:
            while not state.closed:
                due = state.due()
                if due is not None and due <= 0:
                    state.ship()
                    due = None
                if state.ready and len(state.flying) < state.depth:
                    state.space.notify()
                    return state.ready.popleft(), False
                # Who waits for the GPU launches nothing: while another batch may become ready one only looks.
                full = state.exhausted or len(state.flying) == state.depth
                if state.flying and (full or state.arrived(state.flying[0])):
                    return state.flying.popleft(), True
                if state.exhausted and not state.ready and not state.flying:
                    if state.failure is not None:
                        raise state.failure
                    return None
                state.news.wait(_POLL if state.flying and (due is None or due > _POLL) else due)
        return None

    def _land(self, batch: Batch) -> None:
        """Wait for the results of a batch; where they are no views of its slot, that is free again."""
        state = self._state
        if batch.slot is not None:
            batch.results.extend(results_of(state, batch))
            if state.copy:
                with state.lock:
                    state.release(batch)

    def _launch(self, batch: Batch) -> None:
        state = self._state
        if batch.slot is not None:
            shape = (len(batch.tensors), *batch.sides, 3)
            try:
                batch.parts = state.lanes.run(batch.slot, shape, batch.first, state.timeline)
            except (MemoryError, RuntimeError) as error:  # a transfer, or memory for it
                plain = error.with_traceback(None)  # whose frames hold the slot
                batch.parts = [Part(i, 1, error=plain) for i in range(shape[0])]
                with contextlib.suppress(RuntimeError):  # the same again, of a GPU that failed
                    state.lanes.synchronize()
        state.flying.append(batch)  # which no other thread looks at


def _close(state: State, reader: threading.Thread) -> None:
    with state.lock:
        state.closed = True
        for condition in (state.space, state.news):
            condition.notify_all()
    # A garbage collection may end up here in the reader, with `lock` held: then it is not waited for.
    if threading.current_thread() is not reader and reader.ident is not None:
        reader.join(_GRACE)
    try:
        # Buffers may be given to others only when no transfer is on its way to them.
        state.lanes.synchronize()
    finally:
        state.copier.close()
        state.spares.close()
        state.open = None
        for waiting in (state.free, state.ready, state.flying):
            waiting.clear()
