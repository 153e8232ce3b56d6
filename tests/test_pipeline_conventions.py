"""``StylizePipeline`` on a CPU: the dtype, layout, sides and range of a network, told or found out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline_streams import PLAIN, frame, inverse, style_network
from torch import nn

from sf_compile import models
from sf_compile.pipeline import Convention, PictureError, StylizePipeline

pytestmark = pytest.mark.usefixtures("no_stream_is_left_running")


@pytest.fixture(scope="module")
def network():
    return style_network()


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
