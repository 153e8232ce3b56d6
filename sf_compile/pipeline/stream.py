"""The threads of a stream, and the order in which pictures go through it.

Two threads share one ``_State``:

    reader     asks the source, checks its pictures, copies them into the slot of the open batch
    caller     in ``next``: launches batches that are ready, waits for the oldest, hands out its results

The source has been copied from when it is asked for its next picture, so it may use one buffer again and
again. The network runs in the caller's thread, with the caller's autocast, Dynamo caches and CUDA graphs. At
most ``depth`` batches are being filled, worked on or waiting to be handed out, however long the source is.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sf_compile.pipeline.lanes import Lanes, Part, Slot
from sf_compile.pipeline.lending import Spares
from sf_compile.pipeline.pictures import HostPicture, PictureError, pictures_of
from sf_compile.pipeline.timeline import Span, Timeline

_BAND_BYTES = 1 << 20  # the least that another thread is worth
_POLL = 0.0005  # seconds between looks at the GPU while there may be something to launch before long
_GRACE = 0.5  # seconds that closing waits for a source that is being asked


class Copier:
    """Copies pictures, large ones in bands by several threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            # The reader and the caller each copy a band themselves.
            self._pool = ThreadPoolExecutor(2 * (threads - 1), thread_name_prefix="styleforge-copy")

    def __call__(self, target: np.ndarray, source: np.ndarray) -> None:
        """``target[...] = source``; numpy lets go of the interpreter lock while it copies."""
        bands = min(self.threads, target.nbytes // _BAND_BYTES, len(target))
        if self._pool is None or bands < 2:
            np.copyto(target, source)
            return
        edges = [len(target) * i // bands for i in range(bands + 1)]
        others: list[Future[None]] = [
            self._pool.submit(np.copyto, target[begin:end], source[begin:end])
            for begin, end in itertools.pairwise(edges[1:])
        ]
        np.copyto(target[: edges[1]], source[: edges[1]])
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Batch:
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


class _State:
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
        self.open: _Batch | None = None  # being filled
        self.ready: deque[_Batch] = deque()  # to be launched by the caller
        self.flying: deque[_Batch] = deque()  # launched, in the order of the source
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
        batch = _Batch(error.index, None, (0, 0))
        batch.results.append(error)
        with self.lock:
            self.ship()
            self.ready.append(batch)
            self.news.notify()

    def arrived(self, batch: _Batch) -> bool:
        """Whether the results of a batch that was launched need not be waited for."""
        return batch.slot is None or self.lanes.arrived(batch.slot)

    def release(self, batch: _Batch) -> None:
        """The batch's slot may be used again; under ``lock``."""
        if batch.slot is not None:
            self.free.append(batch.slot)
            batch.slot = None
            self.space.notify()


# -- the reader


def _read(state: _State, source: Iterator[Any]) -> None:
    index = 0
    try:
        state.lanes.enter_thread()
        while True:
            with state.lock:
                # Errors take no slot: without a limit a source of nothing else would run away.
                state.space.wait_for(lambda: state.closed or len(state.ready) < state.depth)
                if state.closed:
                    return
            begin = state.timeline.now() if state.timeline else 0.0
            try:
                item = next(source)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - the source's own, handed to the caller
                state.fail(_source_error(index, error))
                index += 1
                continue
            if state.timeline:
                state.timeline.host("source", index, begin)
            try:
                pictures = pictures_of(item)
            except (TypeError, ValueError) as error:
                state.fail(PictureError(index, str(error)))
                index += 1
                continue
            finally:
                del item
            pictures.reverse()
            while pictures:
                if not _take(state, index, pictures.pop()):
                    return
                index += 1
    except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
        state.failure = error
    finally:
        with state.lock:
            state.ship()
            state.exhausted = True
            state.news.notify()


def _source_error(index: int, cause: Exception) -> PictureError:
    # Without this module's frame, and without what the frames hold.
    if cause.__traceback__ is not None:
        cause.__traceback__ = cause.__traceback__.tb_next
        traceback.clear_frames(cause.__traceback__)
    error = PictureError(index, f"the source raised {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _take(state: _State, index: int, picture: HostPicture) -> bool:
    """Copy one picture into the open batch, or into a new one; False where the stream was closed."""
    height, width = picture.pixels.shape[:2]
    with state.lock:
        if state.open is not None and state.open.sides != (height, width):
            state.ship()
        if state.open is None:
            state.space.wait_for(lambda: state.closed or state.free)
            if state.closed:
                return False
            state.open = _Batch(index, state.free.popleft(), (height, width))
        batch = state.open
        batch.copying = True
        place, slot = len(batch.tensors), batch.slot
    assert slot is not None
    try:
        if place == 0:
            state.lanes.reserve(slot, state.batch_size * height * width * 3)
        begin = state.timeline.now() if state.timeline else 0.0
        state.copier(slot.pixels_of((place + 1, height, width, 3))[place].numpy(), picture.pixels)
        if state.timeline:
            state.timeline.host("copy in", batch.first, begin)
    except (MemoryError, RuntimeError) as error:
        if state.closed:
            return False
        with state.lock:
            batch.copying = False
            if place == 0:
                state.open = None
                state.release(batch)
        failed = PictureError(index, f"no buffer on the host for it: {error}", (height, width))
        state.fail(failed)
        return True
    with state.lock:
        batch.copying = False
        batch.tensors.append(picture.tensor)
        if place == 0:
            batch.opened = time.perf_counter()
        if len(batch.tensors) == state.batch_size:
            state.ship()
        elif state.max_latency is not None:
            state.news.notify()  # by when it must go
    return True


# -- the results


def _results(state: _State, batch: _Batch) -> list[Any]:
    """The results of a batch in order, once they are there: arrays, tensors or errors."""
    slot = batch.slot
    assert slot is not None
    try:
        state.lanes.wait(slot, batch.first, state.timeline)
    except RuntimeError as cause:  # what a kernel did, or one before it
        plain = cause.with_traceback(None)
        return [_error(batch, i, plain) for i in range(len(batch.tensors))]
    begin = state.timeline.now() if state.timeline else 0.0
    lent = slot.lent(state.spares) if state.copy else None
    results = [
        _result(state, batch, part, place, lent) for part in batch.parts for place in range(part.size)
    ]
    if state.timeline:
        state.timeline.host("copy out", batch.first, begin)
    return results


def _result(state: _State, batch: _Batch, part: Part, place: int, lent: np.ndarray | None) -> Any:
    """One of them; ``lent`` has the slot's bytes, if they may be handed out as they are."""
    slot, number = batch.slot, part.first + place
    if part.error is not None:
        return _error(batch, number, part.error)
    assert slot is not None and slot.broken is not None
    if state.check_finite and slot.broken[number]:
        what = "the network returned NaN or infinity; run it in float32, or look at its weights"
        return PictureError(batch.first + number, what, batch.sides)
    pixels = part.picture(slot.bytes_of_results() if lent is None else lent, place)
    if state.copy and lent is None:
        try:
            out = np.empty_like(pixels)
        except MemoryError as cause:
            return _error(batch, number, cause)
        state.copier(out, pixels)
        pixels = out
    return torch.from_numpy(pixels) if batch.tensors[number] else pixels


def _error(batch: _Batch, number: int, cause: Exception) -> PictureError:
    error = PictureError(batch.first + number, f"{type(cause).__name__}: {cause}", batch.sides)
    error.__cause__ = cause
    return error


# -- the caller


class PictureStream:
    """An iterator over stylised pictures, uint8 (H, W, 3), in the order of the source.

    Arrays become arrays, tensors become tensors. Made by calling a ``StylizePipeline``. It works ahead of its
    caller in threads of its own; these end, and all buffers are let go, at the end of the source, by
    ``close``, at the end of a ``with`` block, by an interrupt, or when nobody holds it any more. For one
    thread at a time.

    Attributes:
        index: of the picture that was handed out, or raised, last; -1 before the first.
    """

    def __init__(self, state: _State, source: Iterable[Any]) -> None:
        iterator = iter(source)
        self.index = -1
        self._state = state
        self._current: _Batch | None = None
        state.lanes.begin()
        self._reader = threading.Thread(
            target=_read, args=(state, iterator), name="styleforge-read", daemon=True
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

    def _next_batch(self) -> _Batch | None:
        """The next batch, whose results are there; launches what is ready before; None at the end."""
        while (step := self._step()) is not None:
            batch, launched = step
            if launched:
                self._land(batch)
                return batch
            self._launch(batch)
        return None

    def _step(self) -> tuple[_Batch, bool] | None:
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

    def _land(self, batch: _Batch) -> None:
        """Wait for the results of a batch; where they are no views of its slot, that is free again."""
        state = self._state
        if batch.slot is not None:
            batch.results.extend(_results(state, batch))
            if state.copy:
                with state.lock:
                    state.release(batch)

    def _launch(self, batch: _Batch) -> None:
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


def _close(state: _State, reader: threading.Thread) -> None:
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
