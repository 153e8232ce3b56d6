"""Networks for the tests of the graph pipeline, each a function of ``Net``'s layers and a picture.

``FUSES`` is one table: the matcher's tests check the patterns, the rewriter's tests the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers of 4 channels, all in eval, for ``body(self, x)`` to use as it likes."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(4, 4, 3)
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.plain = nn.InstanceNorm2d(4, eps=1e-3)
        self.running = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.batch = nn.BatchNorm2d(4)
        for layer in (self.running, self.batch):
            layer.get_buffer("running_mean").normal_()
            layer.get_buffer("running_var").uniform_(0.5, 2)
        for layer in (self.norm, self.running, self.batch):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def reflect(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


def block(m: Net, x: Tensor) -> Tensor:
    """A residual block of style transfer networks."""
    y = F.relu(m.norm(m.conv(reflect(x))))
    return m.plain(m.conv(reflect(y))) + x


def residual_network(m: Net, x: Tensor) -> Tensor:
    """Down, three blocks of which the first projects its skip, up."""
    x = F.relu(m.norm(m.down(x)), inplace=True)
    y = F.relu(m.norm(m.conv(reflect(x))))
    x = m.plain(m.conv(reflect(y))) + m.skip(x)
    x = block(m, block(m, x))
    return m.conv(reflect(double(x)))


def unet(m: Net, x: Tensor) -> Tensor:
    """The concatenation reads what the in-place ReLU wrote."""
    y = m.norm(m.same(x))
    y.relu_()
    low = m.plain(m.down(y)).relu_()
    return m.conv(reflect(torch.cat([double(low), y], 2)))


def shared_twice(m: Net, x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.relu(m.norm(m.conv(reflect(x))))
    return x


def two_consumers(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(m.norm(m.conv(reflect(x))))
    return m.plain(m.same(y)), m.batch(m.skip(y))


def preactivation(m: Net, x: Tensor) -> Tensor:
    return m.conv(reflect(F.relu(m.norm(x)))) + x


def mutated_between(m: Net, x: Tensor) -> Any:
    x = x * 2
    y = reflect(x)
    x.exp_()
    return m.norm(m.conv(y)) + x


def autocast_part(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = m.plain(torch.sin(y))
    return m.conv(reflect(z))


def grad_switched_inside(m: Net, x: Tensor) -> Any:
    y = m.conv(reflect(x))
    with torch.no_grad():
        y = m.norm(y)
    return m.plain(m.same(F.relu(y)))


def unknown_reader(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    return torch.sigmoid(y) + m.conv(reflect(y))


def reader_after_the_convolution(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    return m.conv(reflect(y)), torch.sigmoid(y)


def reader_in_another_layout(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    z = m.plain(m.conv(reflect(y)))
    return m.conv(reflect(z)) + torch.sigmoid(y)


def barrier_before_the_convolution(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    x.mul_(2)
    return m.conv(reflect(y))


def mode_switch_before_the_convolution(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    with torch.autocast("cpu", enabled=False):
        x = torch.sin(x)
    return m.conv(reflect(y)), x


def read_by_two_convolutions(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    return m.conv(reflect(m.plain(m.same(y)))), m.batch(m.skip(y))


def read_by_a_plain_convolution(m: Net, x: Tensor) -> Any:
    return m.skip(F.relu(m.norm(m.conv(reflect(x)))))


def running_norm_on_the_way_in(m: Net, x: Tensor) -> Any:
    return m.conv(reflect(F.relu(m.running(x))))


def inference_part(m: Net, x: Tensor) -> Any:
    y = m.norm(m.conv(reflect(x)))
    with torch.inference_mode():
        z = m.norm(m.same(y))
    return y, z


def other_additions(m: Net, x: Tensor) -> Any:
    y, v = m.norm(m.same(x)), m.norm.weight[:, None, None]
    return torch.add(m.norm(y), x, alpha=2), torch.add(m.plain(y), 1), torch.add(m.batch(y), v)


def other_scale(m: Net, x: Tensor) -> Any:
    """To the size of twice the picture, by another index map than twice."""
    return m.conv(reflect(F.interpolate(x, scale_factor=2.05)))


# Bodies in which something that the matcher does not know stands between or beside the sites.
TANGLED = (
    mutated_between, autocast_part, grad_switched_inside, inference_part, unknown_reader,
    reader_after_the_convolution, reader_in_another_layout, barrier_before_the_convolution,
    mode_switch_before_the_convolution, read_by_two_convolutions, read_by_a_plain_convolution,
    running_norm_on_the_way_in, other_additions, other_scale,
)  # fmt: skip


class Case(NamedTuple):
    """A network's body and the patterns expected of it, in graph order."""

    body: Callable[[Any, Tensor], Any]
    patterns: tuple[str, ...]


FUSES: dict[str, Case] = {
    "reflect": Case(lambda m, x: m.conv(reflect(x)), ("pad+conv",)),
    "replicate": Case(lambda m, x: m.conv(F.pad(x, (1, 2, 0, 3), "replicate")), ("pad+conv",)),
    "zero": Case(lambda m, x: m.conv(F.pad(x, (0, 1, 2, 0))), ("pad+conv",)),
    "zero, width only": Case(lambda m, x: m.conv(F.pad(x, (1, 1))), ("pad+conv",)),
    "zero and own padding": Case(lambda m, x: m.same(F.pad(x, (1, 1, 1, 1))), ("pad+conv",)),
    "pad of nothing, own padding": Case(
        lambda m, x: m.norm(m.same(F.pad(x, (0, 0, 0, 0), "reflect"))), ("pad+conv+norm",)
    ),
    "upsample by factor": Case(lambda m, x: m.same(F.interpolate(x, scale_factor=3)), ("upsample+conv",)),
    "upsample by size": Case(
        lambda m, x: m.same(F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2))), ("upsample+conv",)
    ),
    "upsample by module": Case(
        lambda m, x: m.skip(nn.Upsample(scale_factor=(2.0, 2.0))(x)), ("upsample+conv",)
    ),
    "every step": Case(
        lambda m, x: F.relu(m.norm(m.conv(reflect(double(x))))) + double(x),
        ("upsample+pad+conv+norm+relu+add",),
    ),
    "own padding": Case(lambda m, x: F.relu(m.plain(m.same(x))), ("conv+norm+relu",)),
    "stride": Case(lambda m, x: m.norm(m.down(x)), ("conv+norm",)),
    "kernel of 1": Case(lambda m, x: m.norm(m.skip(x)), ("conv+norm",)),
    "same padding": Case(
        lambda m, x: m.norm(F.conv2d(x, m.conv.weight, padding="same")), ("conv+norm",)
    ),
    "valid padding": Case(
        lambda m, x: m.norm(F.conv2d(x, m.conv.weight[:, :, :1], stride=(2, 1), padding="valid")),
        ("conv+norm",),
    ),
    "running statistics": Case(lambda m, x: F.relu(m.running(m.conv(reflect(x)))), ("pad+conv+norm+relu",)),
    "batch norm in eval": Case(
        lambda m, x: m.batch(m.same(double(x))).relu(), ("upsample+conv+norm+relu",)
    ),
    "relu only": Case(lambda m, x: torch.relu_(m.conv(reflect(x))), ("pad+conv+relu",)),
    "add only": Case(lambda m, x: x + m.conv(reflect(x)), ("pad+conv+add",)),
    "relu, add": Case(lambda m, x: m.conv(reflect(x)).relu() + x, ("pad+conv+relu+add",)),
    "skip first": Case(lambda m, x: x + m.norm(m.same(x)), ("conv+norm+add",)),
    "add of two sites": Case(
        lambda m, x: m.norm(m.same(x)) + m.plain(m.skip(x)), ("conv+norm+add", "conv+norm")
    ),
    "norm": Case(lambda m, x: m.norm(x), ("norm",)),
    "batch norm, relu": Case(lambda m, x: (m.norm(x), m.batch(x).relu_()), ("norm", "norm+relu")),
    "norm, add": Case(lambda m, x: m.plain(x).add(x), ("norm+add",)),
    "norm, relu, add": Case(
        lambda m, x: m.norm(x.add(m.running(x).relu())), ("norm+relu+add", "norm")
    ),
    "norm after a tensor with two readers": Case(
        lambda m, x: (y := m.conv(reflect(x)), F.relu(m.norm(y))), ("pad+conv", "norm+relu")
    ),
    "residual block": Case(block, ("pad+conv+norm+relu", "pad+conv+norm+add")),
    "residual network": Case(
        residual_network,
        (
            "conv+norm+relu", "pad+conv+norm+relu", "pad+conv+norm+add", "conv", "pad+conv+norm+relu",
            "pad+conv+norm+add", "pad+conv+norm+relu", "pad+conv+norm+add", "upsample+pad+conv",
        ),
    ),
    "U-Net": Case(unet, ("conv+norm+relu", "conv+norm+relu+upsample", "pad+conv")),
    "called twice": Case(shared_twice, ("pad+conv+norm+relu", "pad+conv+norm+relu")),
    "two consumers": Case(two_consumers, ("pad+conv+norm+relu", "conv+norm", "conv+norm")),
    "pre-activation": Case(preactivation, ("norm+relu", "pad+conv+add")),
    "a plain convolution of a norm": Case(
        lambda m, x: F.relu(m.same(F.relu(m.norm(x)))) + x, ("norm+relu", "conv+relu+add")
    ),
    "a plain convolution of a sum": Case(
        lambda m, x: m.skip(x + m.conv(reflect(x))), ("pad+conv+add", "conv")
    ),
}  # fmt: skip
