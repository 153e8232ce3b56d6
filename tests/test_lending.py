"""Results are handed out in the buffers that they were downloaded to, and these come back."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from sf_compile.pipeline import StylizePipeline
from sf_compile.pipeline.copier import Copier
from sf_compile.pipeline.lending import Spares

PLAIN = {"device": "cpu", "dtype": torch.float32}
SIDES = (40, 60)


def frame(value: int) -> np.ndarray:
    return np.full((*SIDES, 3), value % 256, np.uint8)


def inverse(x: torch.Tensor) -> torch.Tensor:
    return 255 - x


def pipeline(**options) -> StylizePipeline:
    return StylizePipeline(inverse, **PLAIN, **options)


@pytest.fixture
def copied(monkeypatch):
    """The sizes of what is copied out."""
    sizes: list[int] = []
    copy = Copier.__call__

    def noted(self, target, source):
        if threading.current_thread() is threading.main_thread():
            sizes.append(target.nbytes)
        copy(self, target, source)

    monkeypatch.setattr(Copier, "__call__", noted)
    return sizes


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pictures_that_are_let_go_of_are_not_copied(batch_size, copied):
    addresses = set()
    for index, out in enumerate(pipeline(batch_size=batch_size, depth=2)(frame(i) for i in range(60))):
        assert (out == 255 - frame(index)).all() and out.flags.writeable and out.flags.c_contiguous
        addresses.add(out.ctypes.data)
    assert copied == [] and len(addresses) <= 2 * 2 * batch_size


def test_of_pictures_that_are_held_all_but_depth_are_copies(copied):
    held = list(pipeline(depth=3)(frame(i) for i in range(20)))
    assert len(copied) == 20 - 3
    for index, out in enumerate(held):
        assert (out == 255 - frame(index)).all()
        out[:] = index  # nobody else's
    assert all((out == index).all() for index, out in enumerate(held))


def test_what_views_and_tensors_hold_is_not_used_again():
    source = [torch.from_numpy(frame(i)) if i % 2 else frame(i) for i in range(30)]
    with pipeline(depth=2)(source) as pictures:
        kept = [next(pictures)[3:5, ::2], next(pictures)[7]]
        for index in range(2, 30):
            assert int(next(pictures)[0, 0, 0]) == 255 - index
        assert all(int(one.min()) == int(one.max()) == 255 - i for i, one in enumerate(kept))
    gc.collect()
    assert all(int(one.min()) == int(one.max()) == 255 - i for i, one in enumerate(kept))


def test_a_batch_of_which_one_picture_is_held_is_held():
    kept = []
    for index, out in enumerate(pipeline(batch_size=4, depth=1)(frame(i) for i in range(40))):
        assert (out == 255 - frame(index)).all()
        if index % 4 == 2:
            kept.append((index, out))
    assert all((out == 255 - frame(index)).all() for index, out in kept)


def test_buffers_come_back_from_other_threads(copied):
    dropped: list[threading.Thread] = []
    for out in pipeline(depth=2)(frame(i) for i in range(40)):
        box = [out]
        del out
        dropped.append(threading.Thread(target=box.clear))
        dropped[-1].start()
        dropped[-1].join()
    assert copied == []


def test_a_picture_that_grows_is_handed_out_whole():
    source = [np.full((side, side, 3), side, np.uint8) for side in (8, 16, 8, 32, 4, 64, 4)]
    for out, given in zip(pipeline(depth=2)(source), source, strict=True):
        assert out.shape == given.shape and (out == 255 - given).all()


def test_spares_are_lent_one_by_one_and_wait_for_their_readers():
    moments = iter(("first", "second")).__next__
    spares = Spares(1, moments)
    buffer, other = torch.zeros(6, dtype=torch.uint8), torch.ones(6, dtype=torch.uint8)
    array, spare, since = spares.exchange(buffer)
    assert spare is None and since is None and array.ctypes.data == buffer.data_ptr()
    assert spares.exchange(other) is None
    view = array.reshape(2, 3)[1]
    del array
    assert spares.exchange(other) is None, "the view holds it"
    del view
    array, spare, since = spares.exchange(other)
    assert spare is buffer and since == "first" and array.ctypes.data == other.data_ptr()
    spares.close()
    del array
    assert spares.exchange(buffer) is None, "what comes back after the end is let go of"
