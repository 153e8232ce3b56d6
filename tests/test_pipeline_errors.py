"""``StylizePipeline`` on a CPU: errors of a source, of a picture, of the network; the others come out."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from pipeline_streams import PLAIN, Source, Watched, drained, frame, frames, inverse

from sf_compile.pipeline import PictureError, StylizePipeline, lanes

pytestmark = pytest.mark.usefixtures("no_stream_is_left_running")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_source_that_raises_loses_nothing_else(batch_size):
    failures = OSError("no light"), ValueError("again"), OSError("once more")
    items = [frame(0), frame(1), failures[0], frame(3), *failures[1:], frame(6)]
    found = drained(StylizePipeline(inverse, batch_size=batch_size, **PLAIN)(Source(items)))
    assert [index for _, index in found] == list(range(7))
    assert [value for value, index in found if index in (0, 1, 3, 6)] == [255, 254, 252, 249]
    for index in (2, 4, 5):
        error = found[index][0]
        assert error.__cause__ is items[index]
        kind = type(items[index]).__name__
        assert str(error) == f"picture {index}: the source raised {kind}: {items[index]}"


def test_a_generator_that_raises_ends_after_its_error():
    def source():
        yield from frames(3)
        raise OSError("end of tape")

    found = drained(StylizePipeline(inverse, batch_size=2, **PLAIN)(source()))
    assert [value for value, _ in found[:3]] == [255, 254, 253]
    assert len(found) == 4 and found[3][0].index == 3
    assert found[3][0].__cause__.__traceback__.tb_frame.f_code.co_name == "source"


WRONG = [
    (frame(0)[..., 0], "shape (4, 6) is a grey picture; make it RGB by numpy.repeat(picture[..., None]"),
    (frame(0)[..., :1], "a grey picture; make it RGB by numpy.repeat(picture, 3, -1)"),
    (torch.zeros(4, 6).byte(), "make it RGB by picture[..., None].expand(-1, -1, 3)"),
    (torch.zeros(4, 6, 1).byte(), "make it RGB by picture.expand(-1, -1, 3)"),
    (np.zeros((4, 6, 4), np.uint8), "RGBA; drop the alpha by picture[..., :3]"),
    (np.zeros((3, 4, 6), np.uint8), "channels first; use picture.transpose(1, 2, 0)"),
    (torch.zeros(2, 3, 4, 6, dtype=torch.uint8), "channels first; use picture.permute(0, 2, 3, 1)"),
    (np.zeros((0, 6, 3), np.uint8), "an empty picture"),
    (np.zeros((4, 6, 5), np.uint8), "shape (4, 6, 5) is not (height, width, 3)"),
    (frame(0).astype(np.float32), "dtype float32 is not uint8; of numbers from 0 to 1 make bytes by (pic"),
    (torch.zeros(4, 6, 3), "dtype torch.float32 is not torch.uint8; of numbers"),
    (torch.zeros(4, 6, 3, dtype=torch.uint8, device="meta"), "it is on meta; pictures come from the host"),
    ("photo.jpg", "str is no picture; give numpy arrays or tensors of uint8"),
    ((frame(0), 1), "tuple is no picture"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_a_wrong_picture_is_named_with_its_fix(wrong, message):
    source = [frame(0), frame(1), frame(2), wrong, frame(4)]
    found = drained(StylizePipeline(inverse, batch_size=2, **PLAIN)(source))
    assert [index for _, index in found] == [0, 1, 2, 3, 4]
    assert [found[i][0] for i in (0, 1, 2, 4)] == [255, 254, 253, 251]
    assert str(found[3][0]).startswith("picture 3: ") and message in str(found[3][0])


def test_a_pillow_picture_is_told_what_to_do():
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    with pytest.raises(PictureError, match=r"use numpy.asarray\(image.convert\('RGB'\)\)"):
        next(StylizePipeline(inverse, **PLAIN)([image]))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_picture_that_the_network_fails_on_takes_no_other_with_it(batch_size):
    network = Watched(bad=(2, 5))
    found = drained(StylizePipeline(network, batch_size=batch_size, **PLAIN)(frames(7)))
    assert [value for value, index in found if index not in (2, 5)] == [255, 254, 252, 251, 249]
    for index in (2, 5):
        error = found[index][0]
        assert isinstance(error, PictureError) and isinstance(error.__cause__, ValueError)
        assert str(error) == f"picture {index}: ValueError: no [{index}]" and error.sides == (4, 6)


def test_a_failed_network_holds_no_memory():
    class Large:
        pass

    held = []

    def network(x):
        large = Large()
        held.append(weakref.ref(large))
        raise RuntimeError("too large")

    pictures = StylizePipeline(network, **PLAIN)(frames(1))
    held += [weakref.ref(slot) for slot in pictures._state.free]
    error = drained(pictures)[0][0]
    del pictures
    gc.collect()
    assert "too large" in str(error)
    assert error.__cause__.__traceback__.tb_frame.f_code.co_name == "network"
    assert not any(reference() for reference in held)


@pytest.mark.parametrize("check", [True, False])
def test_what_is_not_finite_is_an_error_of_its_picture(check):
    def network(x):
        return torch.where(x[:, :, :1, :1] == 2, torch.nan, x)

    found = drained(StylizePipeline(network, batch_size=3, check_finite=check, **PLAIN)(frames(4)))
    assert [value for value, index in found if index != 2] == [0, 1, 3]
    if check:
        assert "picture 2: the network returned NaN or infinity" in str(found[2][0])
    else:
        assert found[2][0] == 0


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: x[0], "turned shape (1, 3, 4, 6) into (3, 4, 6)"),
        (lambda x: x[:, :1], "turned shape (1, 3, 4, 6) into (1, 1, 4, 6)"),
        (lambda x: (x,), "returned tuple, not a tensor"),
        (lambda x: x.int(), "returned torch.int32, not floating"),
    ],
)
def test_a_network_that_returns_something_else_is_told_so(network, message):
    with pytest.raises(PictureError) as caught:
        next(StylizePipeline(network, **PLAIN)(frames(1)))
    assert message in str(caught.value)


def test_no_memory_for_one_size_is_an_error_of_its_pictures(monkeypatch):
    reserve = lanes.Lanes.reserve

    def limited(self, slot, size):
        if size > 1000:
            raise MemoryError("full")
        reserve(self, slot, size)

    monkeypatch.setattr(lanes.Lanes, "reserve", limited)
    source = [frame(0), frame(1), frame(2, 40, 40), frame(3), frame(4, 40, 40)]
    found = drained(StylizePipeline(inverse, batch_size=2, depth=1, **PLAIN)(source))
    assert [value for value, index in found if index not in (2, 4)] == [255, 254, 252]
    for index in (2, 4):
        assert str(found[index][0]) == f"picture {index}: no buffer on the host for it: full"
