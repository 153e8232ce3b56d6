"""A stream's first thread: asks the source, checks its pictures, copies them into the slot of the open batch.

The source has been copied from when it is asked for its next picture, so it may use one buffer again and
again.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from typing import Any

from sf_compile.pipeline.batches import Batch, State
from sf_compile.pipeline.pictures import HostPicture, PictureError, pictures_of


def read(state: State, source: Iterator[Any]) -> None:
    """Fill batches with the pictures of ``source``, to its end or until the stream is closed."""
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


def _take(state: State, index: int, picture: HostPicture) -> bool:
    """Copy one picture into the open batch, or into a new one; False where the stream was closed."""
    height, width = picture.pixels.shape[:2]
    with state.lock:
        if state.open is not None and state.open.sides != (height, width):
            state.ship()
        if state.open is None:
            state.space.wait_for(lambda: state.closed or state.free)
            if state.closed:
                return False
            state.open = Batch(index, state.free.popleft(), (height, width))
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
