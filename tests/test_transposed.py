"""Transposed convolutions in a graph: which fuse, with which crops, and that the numbers are eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, found, fuse
from networks import Net, reflect
from test_rewrite import assert_equal, assert_equal_gradients, assert_finished, gradients
from torch import Tensor, nn

SHAPE = (2, 4, 7, 6)
CONV = torch.ops.styleforge.conv2d.default
NAMES = [argument.name for argument in CONV._schema.arguments]


def up(x: Tensor, weight: Tensor, *sizes, **named) -> Tensor:
    return torch.conv_transpose2d(x, weight, *sizes, **named)


class Decoder(Net):
    """``Net`` with transposed convolutions; their kernels are called after how wide they are."""

    def __init__(self, body) -> None:
        super().__init__(body)
        self.two = nn.ConvTranspose2d(4, 4, 2, 2)
        self.three = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)
        self.four = nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False)
        self.six = nn.InstanceNorm2d(6, affine=True)
        nn.init.normal_(self.six.weight)
        self.eval()


# body, the pattern, and the op's stride and padding (left, right, top, bottom)
FUSES = {
    "3x3": (lambda m, x: F.relu(m.six(m.three(x))), "conv_transpose+norm+relu", [2, 2], [1, 0, 1, 0]),
    "4x4": (lambda m, x: m.norm(m.four(x)), "conv_transpose+norm", [2, 2], [1, 1, 1, 1]),
    "2x2": (lambda m, x: m.plain(m.two(x)).relu_(), "conv_transpose+norm+relu", [2, 2], [0, 0, 0, 0]),
    "by the function": (
        lambda m, x: m.norm(F.conv_transpose2d(x, m.two.weight, stride=(2, 1), padding=1)),
        "conv_transpose+norm", [2, 1], [1, 1, 1, 1],
    ),
    "to a size": (
        lambda m, x: m.six(m.three(x, output_size=(13, 12))), "conv_transpose+norm", [2, 2], [1, 0, 1, 1]
    ),
    "stride 1": (
        lambda m, x: m.norm(up(x, m.conv.weight, m.conv.bias, 1, 1)), "conv_transpose+norm", [1, 1],
        [1, 1, 1, 1],
    ),
    "and an addition": (
        lambda m, x: m.norm(m.four(x)).relu() + m.two(x), "conv_transpose+norm+relu+add", [2, 2],
        [1, 1, 1, 1],
    ),
    "running statistics": (lambda m, x: m.running(m.two(x)), "conv_transpose+norm", [2, 2], [0, 0, 0, 0]),
    "cropped at the end": (
        lambda m, x: m.norm(up(x, m.conv.weight, stride=2)[:, :, :-1, :-1]), "conv_transpose+crop+norm",
        [2, 2], [0, 1, 0, 1],
    ),
    "cropped at the beginning": (
        lambda m, x: m.norm(up(x, m.conv.weight, stride=2)[..., 1:, 1:]), "conv_transpose+crop+norm",
        [2, 2], [1, 0, 1, 0],
    ),
    "cropped rows": (
        lambda m, x: m.norm(up(x, m.four.weight, stride=2)[:, :, 1:-2]), "conv_transpose+crop+norm",
        [2, 2], [0, 0, 1, 2],
    ),
    "cropped to a size": (
        lambda m, x: m.norm(up(x, m.conv.weight, stride=2)[:, :, :14, :12]), "conv_transpose+crop+norm",
        [2, 2], [0, 1, 0, 1],
    ),
    "cropped by a longer slice": (
        lambda m, x: m.norm(up(x, m.conv.weight, stride=2)[:, :, 1:99]), "conv_transpose+crop+norm",
        [2, 2], [0, 0, 1, 0],
    ),
    "narrowed": (
        lambda m, x: m.norm(torch.narrow(up(x, m.conv.weight, stride=2).narrow(2, 1, 13), 3, 0, 12)),
        "conv_transpose+crop+norm", [2, 2], [0, 1, 1, 1],
    ),
    "padded by less than nothing": (
        lambda m, x: m.norm(F.pad(up(x, m.conv.weight, stride=2), (-1, -2, 0, -1))),
        "conv_transpose+crop+norm", [2, 2], [1, 2, 0, 1],
    ),
    "cropped by more than its padding": (
        lambda m, x: m.six(m.three(x)[:, :, 1:, 2:]), "conv_transpose+crop+norm", [2, 2], [3, 0, 2, 0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSES)
def test_fuses(name):
    body, pattern, stride, padding = FUSES[name]
    model, x = Decoder(body), torch.randn(SHAPE, requires_grad=True)
    compiled, made = fuse(model)
    ours, theirs = compiled(x * 1.0), model(x * 1.0)
    assert_equal(ours, theirs)
    assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    (rewritten,) = made
    assert found(rewritten.analysis) == [pattern]
    (call,) = [node for node in rewritten.module.graph.nodes if node.target is CONV]
    arguments = dict(zip(NAMES, call.args, strict=True))
    assert (arguments["stride"], arguments["padding"], arguments["transposed"]) == (stride, padding, True)
    assert_finished(rewritten)


def decoder(m: Decoder, x: Tensor) -> Tensor:
    """Down, a skip path, and up twice."""
    y = F.relu(m.norm(m.down(x)))
    z = m.plain(m.conv(reflect(y))) + y
    z = F.relu(m.norm(m.four(z)))
    z = F.relu(m.six(up(z, m.three.weight, stride=2)[:, :, 1:, 1:]))
    return torch.tanh(F.conv2d(reflect(z), m.three.weight))


@pytest.mark.parametrize("dynamic", [False, True])
def test_finish_of_the_neighbours_is_deferred_through_it(dynamic):
    model, x = Decoder(decoder), torch.randn(2, 4, 12, 16)
    compiled, made = fuse(model, dynamic=dynamic)
    with torch.no_grad():
        assert_equal(compiled(x), model(x))
    (rewritten,) = made
    assert found(rewritten.analysis) == [
        "conv+norm+relu", "pad+conv+norm+add", "conv_transpose+norm+relu", "conv_transpose+crop+norm+relu",
        "pad+conv+tanh",
    ]  # fmt: skip
    finishes = [decision.finish for decision in rewritten.analysis.plan.decisions]
    assert finishes == ["deferred"] * 4 + ["none"]
    ops = [node.target for node in rewritten.module.graph.nodes if "styleforge" in str(node.target)]
    assert ops == [CONV] * 5
    biases = [node.args[2] for node in rewritten.module.graph.nodes if node.target is CONV]
    assert biases[:4] == [None] * 4


def test_bias_in_front_of_an_instance_norm_is_dropped():
    with torch.no_grad():
        analysis = capture(Decoder(FUSES["3x3"][0]), torch.randn(SHAPE))
    assert [decision.drop_bias for decision in analysis.plan.decisions] == [True]


# body, and the patterns that are found
LEAVES = {
    "alone": (lambda m, x: m.two(x), []),
    "with an activation": (lambda m, x: F.relu(m.three(x)), []),
    "a crop that is returned": (lambda m, x: m.four(x)[:, :, 1:, 1:], []),
    "a crop with another reader": (
        lambda m, x: (y := m.four(x)[:, :, 1:, 1:], m.norm(y)), ["norm"]
    ),
    "a crop of channels": (lambda m, x: m.norm(m.three(x)[:, :4, 1:, 1:]), ["norm"]),
    "a crop with a step": (lambda m, x: m.norm(m.four(x)[:, :, ::2]), ["norm"]),
    "a crop from the end": (lambda m, x: m.norm(m.four(x)[:, :, -5:]), ["norm"]),
    "one row": (lambda m, x: m.norm(m.four(x)[:, :, 3][:, :, None]), ["norm"]),
    "rows by number": (lambda m, x: m.norm(m.four(x)[:, :, [0, 1, 2]]), ["norm"]),
    "a crop of a convolution": (lambda m, x: m.norm(m.same(x)[:, :, 1:, 1:]), ["norm"]),
    "padded behind": (lambda m, x: m.norm(F.pad(m.four(x), (-1, 1, 0, 0))), ["norm"]),
    "padded before": (lambda m, x: m.norm(m.four(reflect(x))), ["conv_transpose+norm"]),
    "groups": (lambda m, x: m.norm(up(x, m.conv.weight[:, :1], groups=4)), ["norm"]),
    "dilation": (lambda m, x: m.norm(up(x, m.conv.weight, dilation=2)), ["norm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_alone(name):
    body, patterns = LEAVES[name]
    model, x = Decoder(body), torch.randn(SHAPE)
    compiled, made = fuse(model)
    with torch.no_grad():
        assert_equal(compiled(x), model(x))
    assert found(made[0].analysis) == patterns


@pytest.mark.parametrize(
    ("name", "reason"), [("groups", "grouped transposed"), ("dilation", "dilated transposed")]
)
def test_says_why_not(name, reason):
    misses = capture(Decoder(LEAVES[name][0]), torch.randn(SHAPE)).matches.misses
    assert any(reason in miss.reason for miss in misses)


def test_five_sizes_cost_at_most_three_graphs():
    model = Decoder(decoder)
    compiled, made = fuse(model)
    with torch.no_grad():
        for size in ((12, 8), (16, 8), (8, 20), (24, 12), (20, 28)):
            x = torch.randn(2, 4, *size)
            assert_equal(compiled(x), model(x))
    assert len(made) <= 3
    assert all(len(found(rewritten.analysis)) == 5 for rewritten in made)


@pytest.mark.parametrize("dynamic", [False, True])
def test_tensorflow_s_same_padding_of_a_strided_convolution(dynamic):
    """Of an even picture it is one more pixel behind than before."""

    def same(m, x):
        y = F.relu(m.norm(F.conv2d(F.pad(x, (0, 1, 0, 1)), m.conv.weight, m.conv.bias, 2)))
        return m.plain(F.conv2d(F.pad(y, (1, 2, 1, 2)), m.four.weight, None, 2))

    model, x = Decoder(same), torch.randn(2, 4, 12, 16)
    compiled, made = fuse(model, dynamic=dynamic)
    with torch.no_grad():
        assert_equal(compiled(x), model(x))
    assert found(made[0].analysis) == ["pad+conv+norm+relu", "pad+conv+norm"]
