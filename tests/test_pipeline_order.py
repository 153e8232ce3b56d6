"""``StylizePipeline`` on a CPU: what comes out, in which order and batches, and its timeline."""

from __future__ import annotations

import itertools
import random
import threading
import time

import numpy as np
import pytest
import torch
from pipeline_streams import PLAIN, WAIT, Watched, drained, frame, frames, inverse, style_network, values
from torch.utils.data import DataLoader, Dataset

import sf_compile
from sf_compile.pipeline import PictureError, StylizePipeline, timeline
from sf_compile.pipeline.copier import Copier

pytestmark = pytest.mark.usefixtures("no_stream_is_left_running")


@pytest.fixture(scope="module")
def network():
    return style_network()


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 3}, {"depth": 1}, {"batch_size": 2, "depth": 1, "copy": False}]
)
def test_pictures_equal_those_of_a_plain_loop_in_order(network, options):
    pictures = [np.random.default_rng(i).integers(0, 256, (16, 24, 3), dtype=np.uint8) for i in range(7)]
    with torch.inference_mode():
        expected = []
        for picture in pictures:
            y = network(torch.from_numpy(picture).permute(2, 0, 1)[None].float())
            expected.append(y[0].clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    one_by_one = options.get("batch_size", 1) == 1
    for index, out in enumerate(StylizePipeline(network, **options)(pictures)):
        assert isinstance(out, np.ndarray) and out.dtype == np.uint8 and out.shape == (16, 24, 3)
        difference = np.abs(out.astype(int) - expected[index])
        assert difference.max() <= (0 if one_by_one else 1)  # a batch may sum in another order
    assert index == 6


def test_arrays_become_arrays_and_tensors_tensors():
    pictures = [frame(1), torch.from_numpy(frame(2)), frame(3), torch.from_numpy(frame(4)).expand(4, 6, 3)]
    out = list(StylizePipeline(inverse, batch_size=2, **PLAIN)(pictures))
    assert [isinstance(one, torch.Tensor) for one in out] == [False, True, False, True]
    assert out[1].dtype == torch.uint8 and out[1].is_contiguous() and values(out) == [254, 253, 252, 251]


def test_results_and_sources_are_the_callers_own():
    source = frame(7)
    first, second = StylizePipeline(inverse, **PLAIN)([source, source])
    first[:] = 0
    assert values([source, second]) == [7, 248]


def test_views_hold_until_the_next_is_asked_for():
    pipeline = StylizePipeline(inverse, copy=False, depth=2, **PLAIN)
    pictures = pipeline(frame(i) for i in range(20))
    addresses = set()
    for index, out in enumerate(pictures):
        time.sleep(0.002)  # the others go on meanwhile
        assert np.array_equal(out, 255 - frame(index))
        addresses.add(out.ctypes.data)
    assert len(addresses) <= 3


@pytest.mark.parametrize("threads", [1, 3])
def test_a_source_may_use_one_buffer_again(threads):
    buffer = np.empty((700, 900, 3), np.uint8)

    def source():
        for i in range(12):
            buffer[:] = i
            yield buffer

    for index, out in enumerate(StylizePipeline(inverse, copy_threads=threads, **PLAIN)(source())):
        assert (out == 255 - index).all()


def test_any_strides_are_copied():
    picture = np.random.default_rng(0).integers(0, 256, (900, 700, 3), dtype=np.uint8)
    seen = [picture[..., ::-1], picture[::-1], picture.transpose(1, 0, 2), picture[::2, ::2]]
    for out, source in zip(StylizePipeline(inverse, copy_threads=2, **PLAIN)(seen), seen, strict=True):
        assert np.array_equal(out, 255 - source) and out.flags.c_contiguous


class Faces(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.from_numpy(frame(index))


@pytest.mark.parametrize("size", [None, 3])
def test_a_data_loader_is_a_source(size):
    out = list(StylizePipeline(inverse, batch_size=2, **PLAIN)(DataLoader(Faces(), batch_size=size)))
    assert values(out) == [255 - i for i in range(7)] and all(one.shape == (4, 6, 3) for one in out)


def test_an_empty_source_and_what_is_no_source():
    pipeline = StylizePipeline(inverse, **PLAIN)
    assert list(pipeline([])) == []
    with pytest.raises(TypeError, match="not iterable"):
        pipeline(7)


def test_two_streams_of_a_pipeline_at_once_and_one_after_the_other():
    pipeline = StylizePipeline(inverse, batch_size=2, **PLAIN)
    for _ in range(2):
        pairs = list(zip(pipeline(frames(9)), pipeline(frame(i + 100) for i in range(9)), strict=True))
        assert [values(pair) for pair in pairs] == [[255 - i, 155 - i] for i in range(9)]


def test_inference_mode_may_come_and_go():
    pictures = StylizePipeline(inverse, depth=1, **PLAIN)(frames(6))
    for index in range(6):
        with torch.inference_mode(index % 2 == 0):
            assert values([next(pictures)]) == [255 - index]
    pictures.close()


# -- batches


def test_batches_are_of_equal_neighbours():
    network = Watched()
    sides = [(4, 4)] * 3 + [(4, 8)] * 2 + [(4, 4)] + [(8, 4)] * 5
    source = [frame(i, height, width) for i, (height, width) in enumerate(sides)]
    out = list(StylizePipeline(network, batch_size=4, **PLAIN)(source))
    assert [picture.shape[:2] for picture in out] == sides and values(out) == [255 - i for i in range(11)]
    assert [own for _, own in network.batches] == [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9], [10]]
    assert network.batches[0][0] == (3, 3, 4, 4) and network.batches[-1][0] == (1, 3, 8, 4)


@pytest.mark.parametrize("latency", [0, 20])
def test_a_batch_does_not_wait_longer_than_it_may(latency):
    network, go_on = Watched(), threading.Event()

    def camera():
        yield frame(0)
        yield frame(1)
        assert go_on.wait(WAIT)
        yield from (frame(2), frame(3), frame(4))

    with StylizePipeline(network, batch_size=8, max_latency_ms=latency, **PLAIN)(camera()) as pictures:
        assert values([next(pictures), next(pictures)]) == [255, 254]  # while the source stands still
        go_on.set()
        assert values(pictures) == [253, 252, 251]
    assert len(network.batches) >= 2


def test_without_a_limit_batches_are_full():
    network = Watched()

    def slow():
        for i in range(8):
            time.sleep(0.01)
            yield frame(i)

    assert len(list(StylizePipeline(network, batch_size=4, **PLAIN)(slow()))) == 8
    assert [len(own) for _, own in network.batches] == [4, 4]


@pytest.mark.parametrize("seed", range(4))
def test_any_timing_gives_the_same_pictures(seed):
    generator = random.Random(seed)
    sides = [generator.choice([(4, 4), (4, 8)]) for _ in range(40)]
    delays = [generator.choice([0, 0, 0, 0.001, 0.004]) for _ in range(120)]
    delay = iter(delays).__next__
    wrong = set(generator.sample(range(40), 4))

    def source():
        for i, (height, width) in enumerate(sides):
            time.sleep(delay())
            yield frame(i, height, width) if i not in wrong else frame(i)[..., 0]

    def network(x):
        time.sleep(delays[int(x[0, 0, 0, 0])])
        return 255 - x

    pipeline = StylizePipeline(
        network, batch_size=generator.choice([1, 2, 5]), depth=generator.choice([1, 2, 4]),
        max_latency_ms=generator.choice([None, 0, 1]), copy=generator.choice([True, False]), **PLAIN,
    )  # fmt: skip
    found = drained(pipeline(source()))
    assert [index for _, index in found] == list(range(40))
    for value, index in found:
        assert isinstance(value, PictureError) if index in wrong else value == 255 - index


def test_copies_in_bands_equal_the_source():
    copier = Copier(3)
    for shape in ((1, 1, 3), (2, 2_000_000, 3), (1000, 1500, 3), (7, 999_999, 3)):
        source = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        target = np.zeros_like(source)
        copier(target, source)
        assert np.array_equal(target, source)
    copier.close()


def test_the_package_finds_the_pipeline_by_its_name():
    assert sf_compile.pipeline.StylizePipeline is StylizePipeline


def test_a_default_device_does_not_matter():
    torch.set_default_device("meta")
    try:
        assert values(StylizePipeline(inverse, **PLAIN)(frames(3))) == [255, 254, 253]
    finally:
        torch.set_default_device(None)


# -- time


def test_a_timeline_has_every_step_in_order(tmp_path):
    pipeline = StylizePipeline(inverse, batch_size=2, timeline=True, **PLAIN)
    pictures = pipeline(frames(5))
    list(pictures)
    spans = pictures.timeline
    assert {span.lane for span in spans} == set(timeline.LANES) - {"upload", "download"}
    for first in (0, 2, 4):
        own = {span.lane: span for span in spans if span.picture == first}
        steps = [own[lane] for lane in timeline.LANES if lane in own]
        assert [step.lane for step in steps][-4:] == ["to numbers", "network", "to bytes", "copy out"]
        assert all(0 <= step.begin <= step.end for step in steps)
        assert all(a.end <= b.begin for a, b in itertools.pairwise(steps))
    assert StylizePipeline(inverse, **PLAIN)([]).timeline == []


def test_a_timeline_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = StylizePipeline(inverse, timeline=True, **PLAIN)(frames(3))
    list(pictures)
    timeline.plot(tmp_path / "plot.png", pictures.timeline, "title")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
