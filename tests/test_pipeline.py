"""``StylizePipeline`` on a CPU: order, bounds, batches, errors and ends; as on a GPU, less the streams."""

from __future__ import annotations

import gc
import itertools
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import sf_compile
from sf_compile import models
from sf_compile.pipeline import Convention, PictureError, StylizePipeline, lanes, timeline
from sf_compile.pipeline.copier import Copier

PLAIN = {"device": "cpu", "dtype": torch.float32}
WAIT = 20  # seconds until a test gives up on another thread


def frame(value=0, height=4, width=6):
    return np.full((height, width, 3), value % 256, np.uint8)


def frames(count, **sides):
    return [frame(i, **sides) for i in range(count)]


def values(pictures):
    return [int(picture[0, 0, 0]) for picture in pictures]


def inverse(x):
    return 255 - x


class Watched:
    """A network that inverts, and keeps what it was given: shapes and first values."""

    def __init__(self, bad=(), error=ValueError):
        self.batches = []
        self.bad = set(bad)
        self.error = error

    def __call__(self, x):
        own = [int(one[0, 0, 0]) for one in x]
        self.batches.append((tuple(x.shape), own))
        if self.bad & set(own):
            raise self.error(f"no {sorted(self.bad & set(own))}")
        return 255 - x


class Source:
    """An iterator that raises where an item is an exception, and goes on."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.items)
        if isinstance(item, BaseException):
            raise item
        return item


def drained(pictures):
    """(index, value or error) of everything that a stream gives."""
    found = []
    while True:
        try:
            found.append((int(next(pictures)[0, 0, 0]), pictures.index))
        except StopIteration:
            return found
        except PictureError as error:
            assert error.index == pictures.index
            found.append((error, pictures.index))


def until(condition):
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit, "gave up"
        time.sleep(0.005)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("styleforge")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if threads():
        gc.collect()
    until(lambda: not threads())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = models.TransformerNet(width=4, blocks=1).eval()
    with torch.no_grad():
        net.deconv3.conv2d.weight.mul_(40)
        net.deconv3.conv2d.bias.fill_(128)
    return net


# -- what comes out


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


# -- errors


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


# -- conventions


def test_the_models_weights_tell_device_dtype_and_layout():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True))
    assert StylizePipeline(net).convention == Convention(torch.device("cpu"), torch.float32)
    net[0].to(torch.bfloat16, memory_format=torch.channels_last)
    expected = Convention(torch.device("cpu"), torch.bfloat16, channels_last=True)
    assert StylizePipeline(net).convention == expected
    given = StylizePipeline(net, dtype=torch.float16, channels_last=False).convention
    assert (given.dtype, given.channels_last) == (torch.float16, False)


def test_our_own_networks_tell_their_sides_and_range(network):
    compiled = torch.compile(network, backend="eager")
    for net in (network, compiled):
        convention = StylizePipeline(net).convention
        assert (convention.side_multiple, convention.min_side) == (models.SIDE_MULTIPLE, models.MIN_SIDE)
        assert convention.input_range == (0.0, 255.0)
    assert StylizePipeline(models.MultiStyleNet()).convention.output_range == (0.0, 1.0)


def test_sides_that_the_network_does_not_keep_are_extended_and_cropped(network):
    for height, width in ((1, 1), (9, 14), (16, 24)):
        (out,) = StylizePipeline(network)([frame(9, height, width)])
        assert out.shape == (height, width, 3)
    (out,) = StylizePipeline(network, side_multiple=1)([frame(9, 9, 14)])
    assert out.shape == (12, 16, 3)


def test_larger_and_smaller_results():
    double, half = nn.Upsample(scale_factor=2), nn.AvgPool2d(2)
    (out,) = StylizePipeline(double, **PLAIN)([frame(9, 5, 6)])
    assert out.shape == (10, 12, 3) and (out == 9).all()
    (out,) = StylizePipeline(double, side_multiple=4, **PLAIN)([frame(9, 5, 6)])
    assert out.shape == (10, 12, 3)
    (out,) = StylizePipeline(half, **PLAIN)([frame(9, 4, 6)])
    assert out.shape == (2, 3, 3)
    with pytest.raises(PictureError, match="which cannot be cropped to the picture"):
        next(StylizePipeline(half, side_multiple=4, **PLAIN)([frame(9, 5, 6)]))


def test_ranges():
    seen = []

    def network(x):
        seen.append((x.min().item(), x.max().item()))
        return x * 0.5 + 0.5

    picture = frame(0)
    picture[1] = 255
    pipeline = StylizePipeline(network, input_range=(-1, 1), output_range=(0, 1), **PLAIN)
    (out,) = pipeline([picture])
    assert seen == [(-1.0, 1.0)] and np.array_equal(out, picture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"depth": 0}, "depth must be 1 or more"),
        ({"copy_threads": 0}, "copy_threads must be 1 or more"),
        ({"max_latency_ms": -1}, "max_latency_ms must be 0 or more"),
        ({"input_range": (1, 1)}, r"input_range must be \(low, high\) with low < high"),
        ({"output_range": (0, float("inf"))}, "output_range must be"),
        ({"side_multiple": 0}, "side_multiple must be 1 or more"),
        ({"dtype": torch.int8}, "dtype must be a floating one"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StylizePipeline(inverse, **{**PLAIN, **options})


def test_a_network_without_weights_needs_device_and_dtype():
    with pytest.raises(ValueError, match=r"function has no parameters .*; pass device= and dtype="):
        StylizePipeline(inverse)
    with pytest.raises(ValueError, match="Identity has no parameters"):
        StylizePipeline(nn.Identity(), device="cpu")


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
