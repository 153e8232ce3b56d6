"""``StylizePipeline`` on a CPU: what a stream holds while it runs, and that every end of it frees that."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from pipeline_streams import PLAIN, WAIT, Source, Watched, frame, frames, inverse, threads, until, values

import sf_compile
from sf_compile.pipeline import PictureError, StylizePipeline

pytestmark = pytest.mark.usefixtures("no_stream_is_left_running")


# -- bounds


@pytest.mark.parametrize(
    ("batch_size", "depth", "copy"), [(1, 1, True), (1, 4, True), (3, 2, True), (2, 2, False)]
)
def test_memory_is_bounded_however_long_the_source(batch_size, depth, copy):
    alive, most, given = weakref.WeakSet(), 0, 0

    class Counted(np.ndarray):
        pass

    def endless():
        nonlocal most, given
        while True:
            picture = frame(given).view(Counted)
            alive.add(Owner(picture))
            given += 1
            most = max(most, len(alive))
            yield picture
            del picture

    class Owner:
        # A weak set needs hashes; an array has none. Lives as long as its array.
        def __init__(self, array):
            array.owner = self

    pipeline = StylizePipeline(inverse, batch_size=batch_size, depth=depth, copy=copy, **PLAIN)
    with pipeline(endless()) as pictures:
        ahead = 0
        for index in range(60):
            assert values([next(pictures)]) == [(255 - index) % 256]
            ahead = max(ahead, given - index)
            if index % 10 == 0:
                time.sleep(0.01)  # to let the others run ahead as far as they can
        # Being filled or worked on, and waiting to be handed out; and what the source has in hand.
        assert ahead <= (2 * depth + 2) * batch_size + 2
        assert most <= 3
        slots = {id(slot) for slot in pictures._state.free}
        assert len(slots) <= depth + (not copy)
    assert given < 60 + (2 * depth + 2) * batch_size + 3


def test_errors_do_not_run_away_either():
    given = 0

    class Broken:
        def __iter__(self):
            return self

        def __next__(self):
            nonlocal given
            given += 1
            raise OSError("camera")

    with StylizePipeline(inverse, depth=2, **PLAIN)(Broken()) as pictures:
        for index in range(5):
            with pytest.raises(PictureError, match=f"picture {index}: the source raised OSError: camera"):
                next(pictures)
        time.sleep(0.05)
        assert given <= 5 + 2 * 2 + 2


# -- ends


def closing_source(closed, count=1000):
    try:
        for i in range(count):
            yield frame(i)
    finally:
        closed.set()


def by_close(pictures):
    next(pictures)
    pictures.close()
    pictures.close()


def by_with(pictures):
    with pictures:
        next(pictures)


def by_break(pictures):
    for _ in pictures:
        break


def by_error_in_the_body(pictures):
    with pytest.raises(ZeroDivisionError), pictures:
        for _ in pictures:
            1 / 0  # noqa: B018


@pytest.mark.parametrize("end", [by_close, by_with, by_break, by_error_in_the_body])
def test_an_early_end_frees_everything(end):
    closed = threading.Event()
    pictures = StylizePipeline(inverse, batch_size=2, **PLAIN)(closing_source(closed))
    state = pictures._state
    slots = [weakref.ref(slot) for slot in state.free]
    end(pictures)
    del pictures
    gc.collect()
    assert closed.wait(WAIT), "the source was not let go of"
    until(lambda: not threads())
    assert state.closed and not any((state.free, state.ready, state.flying, state.open))
    del state
    gc.collect()
    assert not any(slot() for slot in slots)


def test_a_closed_stream_is_at_its_end():
    pictures = StylizePipeline(inverse, **PLAIN)(frames(5))
    next(pictures)
    pictures.close()
    assert list(pictures) == [] and next(pictures, None) is None


def test_the_end_frees_everything_too():
    closed = threading.Event()
    pictures = StylizePipeline(inverse, **PLAIN)(closing_source(closed, 3))
    assert len(list(pictures)) == 3
    assert closed.is_set() and pictures._state.closed and not pictures._state.free
    until(lambda: not threads())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_network_ends_the_stream(error):
    closed = threading.Event()
    pictures = StylizePipeline(Watched(bad=(3,), error=error), **PLAIN)(closing_source(closed))
    with pytest.raises(error):
        list(pictures)
    assert closed.wait(WAIT) and pictures._state.closed
    until(lambda: not threads())


def test_an_interrupt_while_waiting_ends_the_stream(monkeypatch):
    go_on = threading.Event()

    def camera():
        yield frame(0)
        go_on.wait(WAIT)

    pictures = StylizePipeline(inverse, **PLAIN)(camera())
    next(pictures)
    begin = time.monotonic()

    def interrupted(timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures._state.news, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(pictures)
    assert pictures._state.closed and time.monotonic() - begin < 5  # the camera still stands
    go_on.set()


def test_what_ends_the_source_for_good_reaches_the_caller_after_the_pictures():
    pictures = StylizePipeline(inverse, batch_size=4, **PLAIN)(Source([frame(0), frame(1), SystemExit(3)]))
    assert values([next(pictures), next(pictures)]) == [255, 254]
    with pytest.raises(SystemExit):
        next(pictures)
    assert list(pictures) == []


def test_a_process_ends_with_a_stream_open():
    program = """
import itertools, time
import numpy as np, torch
from sf_compile.pipeline import StylizePipeline
def camera():
    yield np.zeros((8, 8, 3), np.uint8)
    time.sleep(1000)
pictures = StylizePipeline(lambda x: x, device="cpu", dtype=torch.float32)(camera())
print(next(pictures).shape)
"""
    root = Path(sf_compile.__file__).parents[1]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "(8, 8, 3)", "")
