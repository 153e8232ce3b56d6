"""``StylizePipeline`` on a GPU: the bits of a plain loop whatever overlaps what, and nothing left behind."""

from __future__ import annotations

import gc
import random
import time

import numpy as np
import pytest
import torch

from sf_compile.backend import styleforge
from sf_compile.models import TransformerNet
from sf_compile.pipeline import PictureError, StylizePipeline

pytestmark = pytest.mark.gpu
CUDA = {"device": "cuda", "dtype": torch.float16}


@pytest.fixture(autouse=True)
def same_algorithms(monkeypatch):
    """cuDNN computes the same bits whichever stream it is on, and however much memory is free."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = TransformerNet(width=16, blocks=2).eval()
    with torch.no_grad():
        net.deconv3.conv2d.weight.mul_(20)
        net.deconv3.conv2d.bias.fill_(128)
    return net.to("cuda", torch.float16)


def frames(count, height, width, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def plain(network, pictures, dtype=torch.float16):
    """The loop that anyone would write."""
    results = []
    with torch.inference_mode():
        for picture in pictures:
            x = torch.from_numpy(picture).cuda().permute(2, 0, 1)[None].to(dtype).contiguous()
            y = network(x)[0].float().clamp(0, 255).round().to(torch.uint8)
            results.append(y.permute(1, 2, 0).contiguous().cpu().numpy())
    return results


def spin(milliseconds):
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_bits_are_those_of_a_plain_loop(network, compiled, copy):
    net = torch.compile(network, backend=styleforge, dynamic=False) if compiled else network
    pictures = frames(12, 256, 320) + frames(4, 128, 132) + frames(6, 256, 320, seed=1)
    expected = plain(net, pictures)
    count = 0
    for index, out in enumerate(StylizePipeline(net, copy=copy)(pictures)):
        assert np.array_equal(out, expected[index]), index
        count += 1
    assert count == len(pictures)


def test_batches_equal_batches(network):
    pictures = frames(11, 128, 160)
    out = list(StylizePipeline(network, batch_size=4)(pictures))
    with torch.inference_mode():
        for first in range(0, 11, 4):
            x = torch.from_numpy(np.stack(pictures[first : first + 4])).cuda().permute(0, 3, 1, 2).half()
            y = network(x.contiguous()).float().clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            assert np.array_equal(np.stack(out[first : first + 4]), y.cpu().numpy())


@pytest.mark.parametrize("seed", range(4))
def test_any_delay_on_any_stream_gives_the_same_pictures(seed):
    """Work of random length before and behind the network, and on the copy streams: nothing may be early."""
    generator = random.Random(seed)

    def network(x):
        spin(generator.choice([0, 0.1, 1, 3]))
        y = 255 - x
        spin(generator.choice([0, 0.1, 1]))
        return y

    pipeline = StylizePipeline(
        network, batch_size=generator.choice([1, 3]), depth=generator.choice([1, 2, 4]),
        copy=generator.choice([True, False]), max_latency_ms=generator.choice([None, 0, 2]), **CUDA,
    )  # fmt: skip
    lanes = pipeline._lanes
    sides = [generator.choice([(270, 480), (272, 480), (64, 63)]) for _ in range(60)]
    pictures = [frames(1, *side, seed=i)[0] for i, side in enumerate(sides)]

    def source():
        for picture in pictures:
            for stream in (lanes._upload, lanes._download):
                if generator.random() < 0.3:
                    with torch.cuda.stream(stream):
                        spin(generator.choice([0.2, 2]))
            time.sleep(generator.choice([0, 0, 0.001]))
            yield picture

    count = 0
    for index, out in enumerate(pipeline(source())):
        assert np.array_equal(out, 255 - pictures[index]), index
        count += 1
    assert count == 60


def test_transfers_overlap_the_network():
    """The GPU's time of a stream is that of the network, not of the network and the transfers."""

    def network(x):
        spin(30)  # longer than a busy host takes to copy such a picture
        return x * 1

    pipeline = StylizePipeline(network, timeline=True, **CUDA)
    picture = frames(1, 2160, 3840)[0]
    list(pipeline(picture for _ in range(5)))
    pictures = pipeline(picture for _ in range(30))
    list(pictures)
    network_spans = [span for span in pictures.timeline if span.lane == "network"]
    for lane in ("upload", "download"):
        hidden = [
            span
            for span in pictures.timeline
            if span.lane == lane
            and any(other.begin < span.end and span.begin < other.end for other in network_spans)
        ]
        assert len(hidden) >= 20, lane


def test_weights_written_before_a_stream_begins_are_the_ones_that_count(network):
    layer = torch.nn.Conv2d(3, 3, 1).to("cuda", torch.float32)
    picture = frames(1, 64, 64)[0]
    with torch.no_grad():
        spin(20)
        layer.weight.copy_(torch.eye(3)[:, :, None, None])
        layer.bias.zero_()
    (out,) = StylizePipeline(layer)([picture])
    assert np.array_equal(out, picture)


def test_errors_take_no_other_picture_with_them(network):
    def net(x):
        if bool((x[:, 0, 0, 0] == 2).any()):
            raise ValueError("two")
        return torch.where(x[:, :1, :1, :1] == 4, torch.nan, x)

    pictures = [np.full((64, 64, 3), i, np.uint8) for i in range(7)]
    stream = StylizePipeline(net, batch_size=3, **CUDA)(pictures)
    found = {}
    while True:
        try:
            out = next(stream)
        except StopIteration:
            break
        except PictureError as error:
            out = str(error)
        found[stream.index] = out
    assert found[2] == "picture 2: ValueError: two" and "NaN or infinity" in found[4]
    assert all(np.array_equal(found[i], pictures[i]) for i in (0, 1, 3, 5, 6))


def test_too_little_memory_is_an_error_of_its_picture(network):
    def net(x):
        if x.shape[2] == 128:
            return x.expand(1 << 16, -1, -1, -1).contiguous()  # 3 GiB
        return x

    source = [np.zeros((side, 64, 3), np.uint8) for side in (64, 128, 64)]
    torch.cuda.empty_cache()  # what other tests left could be taken again
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(0.1, 2**30 / total))
    try:
        stream = StylizePipeline(net, **CUDA)(source)
        assert next(stream).shape == (64, 64, 3)
        with pytest.raises(PictureError, match="picture 1: OutOfMemoryError"):
            next(stream)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert next(stream).shape == (64, 64, 3)
    stream.close()


def test_nothing_is_left_behind(network):
    pipeline = StylizePipeline(network, batch_size=2)
    pictures = frames(6, 256, 256)

    def memory():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    list(pipeline(pictures))
    before = memory()
    for _ in range(5):
        list(pipeline(pictures))
        with pipeline(pictures) as stream:
            next(stream)
        for _ in pipeline(pictures):
            break
    stream = None
    assert memory() == before
    for _ in pipeline(pictures[i % 6] for i in range(200)):
        assert torch.cuda.memory_allocated() < before + 200 * 2**20


@pytest.mark.parametrize("tensors", [False, True])
def test_a_result_may_be_let_go_of_while_it_is_uploaded_again(tensors):
    """Its buffer is not written by a later picture before the caller's stream has read it."""
    given = frames(24, 270, 480)
    source = [torch.from_numpy(picture) for picture in given] if tensors else given
    side, uploaded = torch.cuda.Stream(), []
    with torch.cuda.stream(side):
        for out in StylizePipeline(lambda x: 255 - x, depth=2, **CUDA)(source):
            spin(5)
            uploaded.append(torch.as_tensor(out).to("cuda", non_blocking=True))
            del out
    torch.cuda.synchronize()
    assert all(np.array_equal(a.cpu().numpy(), 255 - b) for a, b in zip(uploaded, given, strict=True))


def test_what_is_handed_out_is_page_locked_and_used_again():
    addresses = set()
    for out in StylizePipeline(lambda x: x, depth=3, **CUDA)(frames(40, 64, 96)):
        assert torch.from_numpy(out).is_pinned()
        addresses.add(out.ctypes.data)
    assert len(addresses) <= 6


def test_the_default_stream_is_not_used(network):
    """A stream of pictures neither waits for what its caller's stream does meanwhile, nor holds it up."""
    pipeline = StylizePipeline(lambda x: x, **CUDA)
    list(pipeline(frames(20, 64, 64)))
    with pipeline(frames(8, 64, 64)) as stream:
        next(stream)
        spin(2000)
        begin = time.perf_counter()
        assert len(list(stream)) == 7
        assert time.perf_counter() - begin < 0.5
    torch.cuda.synchronize()
