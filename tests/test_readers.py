"""What else may read a fused tensor: one op writes it, once, and the numbers stay eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, found, fuse, targets
from networks import Net, reflect
from test_moved import fused_ops
from test_rewrite import assert_equal, assert_equal_gradients, assert_finished, gradients
from torch import Tensor, nn

SHAPE = (2, 4, 12, 10)
CONV = torch.ops.styleforge.conv2d.default
KEEPS = [argument.name for argument in CONV._schema.arguments].index("keep_input")
# Eager has no gradient for these: they write into what the reflection pad keeps for its backward.
WRITTEN = ("written after the convolution",)


class Case(NamedTuple):
    """A body, the fused ops in its place, and how many finished tensors a convolution keeps."""

    body: Callable[[Any, Tensor], Any]
    ops: list[str]
    kept: int


def projected(m: Net, x: Tensor) -> Tensor:
    """A residual block whose skip path is a convolution with a norm of its own."""
    y = F.relu(m.norm(m.conv(reflect(x))))
    return F.relu(m.plain(m.conv(reflect(y))) + m.batch(m.skip(x)))


def projected_inside(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.norm(m.same(x)))
    y = F.relu(m.plain(m.same(x)))
    return m.conv(reflect(m.norm(m.same(y)) + m.batch(m.skip(x))))


def unet(m: Net, x: Tensor) -> Tensor:
    """Each level is read by the next and by the concatenation; up by transposed convolutions."""
    top = F.relu(m.norm(m.same(x)))
    low = F.relu(m.plain(m.down(top)))
    up = F.relu(m.norm(torch.conv_transpose2d(low, m.conv.weight, None, 2, 1, 1)))
    both = torch.cat([top, up], 1)
    return m.norm(F.conv2d(reflect(both), m.conv.weight.repeat(1, 2, 1, 1)))


def dense_block(m: Net, x: Tensor) -> Tensor:
    """Each layer reads all before it."""
    features = [x]
    for _ in range(3):
        all_of_them = torch.cat(features, 1)
        weight = m.conv.weight.repeat(1, len(features), 1, 1)
        features.append(F.relu(m.norm(F.conv2d(reflect(all_of_them), weight))))
    return torch.cat(features, 1)


def read_twice(m: Net, x: Tensor) -> Tensor:
    y = m.norm(m.same(x))
    return torch.sigmoid(y) * torch.tanh(y)


def returned(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(m.norm(m.conv(reflect(x))))
    return y, m.plain(m.conv(reflect(y)))


def returned_raw(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norm is of a tensor that leaves the graph: the convolution's site ends before it."""
    y = m.conv(reflect(x))
    return y, m.norm(y)


def written_later(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.norm(m.same(x))
    z = torch.sigmoid(y)
    y.mul_(2)
    return y, z


def written_after_the_convolution(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.norm(m.conv(reflect(x)))
    z = m.conv(reflect(y))
    y.mul_(2)
    return y, z


def read_through_a_view(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.norm(m.conv(reflect(x)))
    return y.flatten(2), m.conv(reflect(y))


def written_through_a_view(m: Net, x: Tensor) -> Tensor:
    y = m.norm(m.conv(reflect(x)))
    y[:, :2].mul_(3)
    return m.conv(reflect(y))


def norm_of_a_view(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.same(x).flip(3).transpose(2, 3))


def called_twice(m: Net, x: Tensor) -> Tensor:
    """Two pictures through the same layers."""
    a, b = (F.relu(m.norm(m.conv(reflect(y)))) for y in (x, x.flip(3)))
    return m.conv(reflect(a)) - m.conv(reflect(b))


def sliced_channels(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.norm(m.same(x)))
    left, right = y[:, :2], y[:, 2:]
    return m.norm(m.conv(reflect(torch.cat([right, left], 1))))


def chunked(m: Net, x: Tensor) -> Tensor:
    a, b = torch.chunk(F.relu(m.norm(m.same(x))), 2, 1)
    return m.plain(m.same(torch.cat([a * torch.sigmoid(b), b], 1)))


def slice_into_a_convolution(m: Net, x: Tensor) -> Tensor:
    """A crop of a picture is no crop of a transposed convolution."""
    return m.norm(m.conv(reflect(x[:, :, 1:-1, 1:])))


def shuffled(m: Net, x: Tensor) -> Tensor:
    y = F.conv2d(reflect(x), m.conv.weight.repeat(4, 1, 1, 1))
    y = F.relu(m.norm(F.pixel_shuffle(y, 2)))
    return m.conv(reflect(y))


def shuffled_at_the_end(m: Net, x: Tensor) -> Tensor:
    y = m.norm(m.same(x))
    return nn.PixelShuffle(2)(F.relu(m.conv(reflect(y))))


def shuffled_and_finished(m: Net, x: Tensor) -> Tensor:
    """Sub-pixel upsampling at a network's end: a biased convolution, the shuffle, then its norm."""
    y = F.conv2d(reflect(x), m.conv.weight.repeat(4, 1, 1, 1), m.conv.bias.repeat(4))
    return F.relu(m.norm(nn.PixelShuffle(2)(y)))


def filter_response(m: Net, x: Tensor) -> Tensor:
    """A norm that subtracts no mean, with its thresholded linear unit (Singh and Krishnan, 2020)."""
    y = m.conv(reflect(x))
    y = y * torch.rsqrt(y.pow(2).mean((2, 3), keepdim=True) + 1e-6)
    g, h = (v.view(1, -1, 1, 1) for v in (m.norm.weight, m.norm.bias))
    return m.same(F.pad(torch.max(g * y + h, h), (1, 1, 1, 1)))


def bilinear(m: Net, x: Tensor) -> Tensor:
    y = F.interpolate(F.relu(m.norm(m.same(x))), scale_factor=2, mode="bilinear", align_corners=False)
    return F.relu(m.plain(m.conv(reflect(y))))


CASES = {
    "projected skip": Case(projected, ["conv2d", "conv2d", "conv2d", "normalize", "normalize"], 0),
    "projected skip inside": Case(projected_inside, ["conv2d"] * 4 + ["normalize", "conv2d"], 1),
    # (What a concatenation reads has eager's layout, what a convolution keeps its own.)
    "U-Net": Case(unet, ["conv2d", "normalize", "conv2d", "conv2d", "normalize", "conv2d", "normalize"], 0),
    "DenseNet": Case(dense_block, ["conv2d", "normalize"] * 3, 0),
    "read twice": Case(read_twice, ["conv2d", "normalize"], 0),
    "returned": Case(returned, ["conv2d", "conv2d", "normalize"], 1),
    "returned before its norm": Case(returned_raw, ["conv2d", "instance_norm"], 0),
    "written later": Case(written_later, ["conv2d", "normalize"], 0),
    "written after the convolution": Case(written_after_the_convolution, ["conv2d", "conv2d"], 1),
    "read through a view": Case(read_through_a_view, ["conv2d", "normalize", "conv2d"], 0),
    "written through a view": Case(written_through_a_view, ["conv2d", "normalize", "conv2d"], 0),
    "norm of a view": Case(norm_of_a_view, ["instance_norm"], 0),
    "called twice": Case(called_twice, ["conv2d"] * 4, 0),
    "sliced channels": Case(sliced_channels, ["conv2d", "normalize", "conv2d", "normalize"], 0),
    "chunked": Case(chunked, ["conv2d", "normalize", "conv2d", "normalize"], 0),
    "sliced picture": Case(slice_into_a_convolution, ["conv2d", "normalize"], 0),
    "pixel shuffle": Case(shuffled, ["conv2d", "instance_statistics", "conv2d"], 0),
    "pixel shuffle at the end": Case(shuffled_at_the_end, ["conv2d", "conv2d"], 0),
    "pixel shuffle and its norm": Case(shuffled_and_finished, ["conv2d", "instance_norm"], 0),
    "filter response norm": Case(filter_response, ["conv2d", "conv2d"], 0),
    "bilinear": Case(bilinear, ["conv2d", "normalize", "conv2d", "normalize"], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_one_op_a_tensor_and_eager_s_numbers(name):
    case = CASES[name]
    model, x = Net(case.body), torch.randn(SHAPE, requires_grad=True)
    compiled, made = fuse(model)
    ours, theirs = compiled(x), model(x)
    assert_equal(ours, theirs)
    if name not in WRITTEN:
        assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    (rewritten,) = made
    assert fused_ops(rewritten) == case.ops
    calls = [node for node in rewritten.module.graph.nodes if node.target is CONV]
    assert sum(call.args[KEEPS] for call in calls) == case.kept
    left = set(targets(rewritten.module.graph))
    assert not left & {F.instance_norm, F.batch_norm, torch._C._nn.pad}
    assert_finished(rewritten)


def test_a_convolution_before_a_pixel_shuffle_is_left_with_the_reason():
    misses = capture(Net(shuffled_at_the_end), torch.randn(SHAPE)).matches.misses
    assert any("pixel shuffle" in miss.reason for miss in misses)


UPSAMPLINGS = {
    "module": lambda x, k: nn.Upsample(scale_factor=k)(x),
    "module of two floats": lambda x, k: nn.Upsample(scale_factor=(float(k), float(k)), mode="nearest")(x),
    "module to a size": lambda x, k: nn.Upsample(size=(12 * k, 10 * k))(x),
    "UpsamplingNearest2d": lambda x, k: nn.UpsamplingNearest2d(scale_factor=k)(x),
    "UpsamplingNearest2d to a size": lambda x, k: nn.UpsamplingNearest2d(size=(12 * k, 10 * k))(x),
    "by scale": lambda x, k: F.interpolate(x, None, k),
    "by size": lambda x, k: F.interpolate(x, (x.shape[2] * k, x.shape[3] * k), mode="nearest"),
}


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("name", UPSAMPLINGS)
def test_nearest_upsampling_in_every_spelling(name, factor):
    upsample = UPSAMPLINGS[name]
    model = Net(lambda m, x: m.norm(m.conv(reflect(upsample(x, factor)))))
    compiled, made = fuse(model)
    with torch.no_grad():
        x = torch.randn(SHAPE)
        assert_equal(compiled(x), model(x))
    (site,) = made[0].analysis.matches.sites
    assert site.pattern == "upsample+pad+conv+norm" and site.upsample.factor == factor


def test_found_in_a_dense_block():
    assert found(capture(Net(dense_block), torch.randn(SHAPE))) == ["pad+conv+norm+relu"] * 3
