"""What the tests of ``StylizePipeline`` on a CPU share: pictures, networks, and what a stream gave."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from sf_compile import models
from sf_compile.pipeline import PictureError

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


def style_network():
    """Small, its pictures neither black nor white."""
    torch.manual_seed(0)
    net = models.TransformerNet(width=4, blocks=1).eval()
    with torch.no_grad():
        net.deconv3.conv2d.weight.mul_(40)
        net.deconv3.conv2d.bias.fill_(128)
    return net


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
    """(value or error, index) of everything that a stream gives."""
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
