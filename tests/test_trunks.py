"""Residual blocks as one op: which chains are found in a graph, and that the op computes what they did."""

from __future__ import annotations

import logging
from operator import getitem

import pytest
import torch
import torch.nn.functional as F
from graphs import capture
from networks import reflect
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import sf_compile
from sf_compile import ops
from sf_compile.backend import styleforge
from sf_compile.graph.regions import group
from sf_compile.graph.rewrite import rewrite
from sf_compile.graph.trunks import join
from sf_compile.models import TransformerNet


def rewritten(model, x: Tensor) -> fx.GraphModule:
    """The graph that ``model`` becomes, before trunks are looked for."""
    with torch.no_grad():
        analysis = capture(model, x)
    return rewrite(analysis.normalized, analysis.plan)


def depths(gm: fx.GraphModule) -> list[int]:
    """Join the trunks of ``gm``; for each, how many convolutions it has."""

    def sites() -> list[str]:
        return sorted(site for node in gm.graph.nodes for site in node.meta.get("sites", ()))

    before = sites()
    found = [len(call.args[7]) for call in join(gm)]
    assert sites() == before
    assert sum("residual_trunk" in str(node.target) for node in gm.graph.nodes) == len(found)
    return found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("blocks", "expected"), [(5, [10]), (3, [6]), (2, [4]), (1, []), (0, [])])
def test_the_trunk_of_a_transformer_net(blocks, expected, dynamic):
    x = torch.rand(1, 3, 24, 20)
    if dynamic:
        torch._dynamo.mark_dynamic(x, (2, 3))
    assert depths(rewritten(TransformerNet(4, blocks).eval(), x)) == expected


class Blocks(nn.Module):
    """A layer, and four residual blocks with norms of their own; ``change`` does something in the second."""

    def __init__(self, change=None, at: int = 1) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, bias=False) for _ in range(8))
        self.norms = nn.ModuleList(nn.InstanceNorm2d(4, affine=True) for _ in range(9))
        self.tail = nn.Conv2d(4, 3, 3)
        self.change, self.at = change, at
        self.eval()

    def forward(self, x: Tensor):
        x = F.relu(self.norms[8](self.head(x)))
        seen = []
        for i in range(4):
            change = self.change if i == self.at else None
            if change is not None:
                x, more = change(self, x, i)
                seen.append(more)
            else:
                x = self.norms[2 * i + 1](self.inside(x, i)) + x
        return [self.tail(reflect(x)), *seen]

    def inside(self, x: Tensor, i: int, pad=reflect, norm=None) -> Tensor:
        y = F.relu((norm or self.norms[2 * i])(self.convs[2 * i](pad(x))))
        return self.convs[2 * i + 1](reflect(y))


def read_by_another(m, x, i):
    return m.norms[2 * i + 1](m.inside(x, i)) + x, torch.sigmoid(x)


def raw_read_by_another(m, x, i):
    y = m.inside(x, i)
    return m.norms[2 * i + 1](y) + x, torch.sigmoid(y)


def zero_padding(m, x, i):
    return m.norms[2 * i + 1](m.inside(x, i, pad=lambda v: F.pad(v, (1, 1, 1, 1)))) + x, None


def uneven_padding(m, x, i):
    return m.norms[2 * i + 1](m.inside(x, i, pad=lambda v: F.pad(v, (2, 0, 1, 1), "reflect"))) + x, None


def norm_without_weights(m, x, i):
    return m.norms[2 * i + 1](m.inside(x, i, norm=lambda v: F.instance_norm(v))) + x, None


def another_eps(m, x, i):
    norm = m.norms[2 * i]
    return m.norms[2 * i + 1](
        m.inside(x, i, norm=lambda v: F.instance_norm(v, weight=norm.weight, bias=norm.bias, eps=0.1))
    ) + x, None


def no_skip(m, x, i):
    return m.norms[2 * i + 1](m.inside(x, i)), None


def activated(m, x, i):
    return F.relu(m.norms[2 * i + 1](m.inside(x, i))) + x, None


# For each change the trunks that are left when it is made in the first, second, third or last of four blocks.
# Behind a break a block begins with a picture that is finished already, so it belongs to no trunk.
CHANGES = {
    read_by_another: ([], [], [], [4]),
    raw_read_by_another: ([], [], [4], [6]),
    zero_padding: ([], [], [4], [6]),
    uneven_padding: ([], [], [4], [6]),
    norm_without_weights: ([], [], [4], [6]),
    another_eps: ([], [], [4], [6]),
    no_skip: ([6], [4], [4], [6]),
    activated: ([], [4], [6], [8]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_of_another_kind_ends_a_trunk(change):
    x = torch.randn(1, 4, 12, 10)
    assert [depths(rewritten(Blocks(change, at), x)) for at in range(4)] == list(CHANGES[change])


class TwoTrunks(Blocks):
    """Two blocks' worth of convolutions whose picture a long skip keeps, then two more blocks behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(4, 4, 3, bias=False)
        self.last_norm = nn.InstanceNorm2d(4, affine=True)
        self.eval()

    def forward(self, x):
        first = F.relu(self.norms[8](self.head(x)))
        second = self.norms[1](self.inside(first, 0)) + first
        plain = F.relu(self.norms[3](self.inside(second, 1)))
        third = self.norms[5](self.inside(plain, 2)) + plain
        fourth = self.norms[7](self.inside(third, 3)) + third
        return self.tail(reflect(self.last_norm(self.after(reflect(fourth))) + second))


def test_a_trunk_that_begins_where_another_ends():
    x, model = torch.randn(1, 4, 12, 10), TwoTrunks()
    assert depths(rewritten(model, x)) == [4, 4]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=styleforge)(x), model(x))


def test_four_blocks_and_kernels_of_another_size():
    x, model = torch.randn(1, 4, 12, 10), Blocks()
    assert depths(rewritten(model, x)) == [8]
    model.convs[6] = nn.Conv2d(4, 4, 1, bias=False)
    model.convs[7] = nn.Conv2d(4, 4, 5, bias=False)
    assert depths(rewritten(model, x)) == [6]


@pytest.mark.parametrize(
    ("convolution", "before", "expected"), [(5, 6, [4]), (5, 8, [6]), (7, 8, [6]), (7, 9, [8])]
)
def test_another_reader_of_a_kept_picture(convolution, before, expected):
    """Of the convolutions, 0 is the head, 1 and 2 are the first block, 7 and 8 the last, 9 is the tail."""
    gm = rewritten(Blocks(), torch.randn(1, 4, 12, 10))
    convolutions = [node for node in gm.graph.nodes if "styleforge.conv2d" in str(node.target)]
    kept = next(user for user in convolutions[convolution].users if user.args[1] == 3)
    with gm.graph.inserting_before(convolutions[before]):
        reader = gm.graph.call_function(torch.sigmoid, (kept,))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], reader),)
    assert depths(gm) == expected


def compiled(model, trunks: bool):
    return torch.compile(model, backend=styleforge, options={} if trunks else {"fallback": as_it_is})


def as_it_is(gm, inputs):
    return gm.forward


@pytest.mark.parametrize("model", [Blocks(), Blocks(read_by_another, 3), TransformerNet(4, 3).eval()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_and_gradients_as_the_layers_one_by_one(model, dtype):
    channels = next(model.parameters()).shape[1]
    model = model.to(dtype)
    results, gradients = [], []
    for trunks in (True, False):
        x = torch.linspace(-2, 2, 960 * channels).reshape(2, channels, 24, 20).to(dtype).requires_grad_()
        torch._dynamo.reset()
        out = compiled(model, trunks)(x)
        out = out if isinstance(out, list) else [out]
        results.append([y for y in out if y is not None])
        inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
        loss = sum(y.float().square().mean() for y in results[-1])
        gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    for one, other in (*zip(*results, strict=True), *zip(*gradients, strict=True)):
        assert (one is None and other is None) or torch.equal(one, other)


def arguments(n: int = 2, c: int = 4, depth: int = 4, dtype: torch.dtype = torch.float64) -> list:
    """Arguments of the op, for CPU."""
    x = torch.randn(n, c, 9, 7, dtype=dtype)
    weights = [torch.randn(c, c, 3, 3, dtype=dtype) / 6 for _ in range(depth)]
    affine = [[torch.randn(c, dtype=dtype) for _ in range(depth - 1)] for _ in range(2)]
    mean, variance = x.mean((2, 3)), x.var((2, 3), unbiased=False)
    return [x, mean, variance, torch.randn(c, dtype=dtype), None, 1e-5, "relu", weights, *affine, 1e-3]


def test_the_op_is_the_blocks():
    a = arguments()
    x, *_, weights, scales, shifts, _ = a

    def conv(z, weight):
        return F.conv2d(reflect(z), weight)

    def norm(y, i):
        return F.instance_norm(y, weight=scales[i], bias=shifts[i], eps=1e-3)

    z = F.relu(F.instance_norm(x, weight=a[3]))
    z = norm(conv(F.relu(norm(conv(z, weights[0]), 0)), weights[1]), 1) + z
    raw = conv(F.relu(norm(conv(z, weights[2]), 2)), weights[3])
    wanted = raw, raw.mean((2, 3)), raw.var((2, 3), unbiased=False), z
    for ours, theirs in zip(ops.residual_trunk(*a), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fakes_and_strides_of_the_op():
    a = arguments(dtype=torch.float32)
    real = ops.residual_trunk(*a)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = ops.residual_trunk(*tree_map_only(Tensor, mode.from_tensor, a))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [(7, lambda v: v[:3], "a block has two convolutions.* got 3 with 3 norm weights and 3"),
     (8, lambda v: v[:2], "got 4 with 2 norm weights and 3 norm biases"),
     (7, lambda v: [], "got 0 with"),
     (9, lambda v: [*v[:2], v[2][:3]], r"bias must be \(4,\) or \(2, 4\), got \(3,\)"),
     (6, lambda v: "softsign", "activation.*'softsign'")],
)  # fmt: skip
def test_arguments_that_do_not_fit(position, change, message):
    a = arguments()
    a[position] = change(a[position])
    with pytest.raises(RuntimeError, match=message):
        ops.residual_trunk(*a)


def test_a_trunk_alone_is_a_region_and_is_told(caplog):
    gm = rewritten(Blocks(), torch.randn(1, 4, 12, 10))
    with caplog.at_level(logging.DEBUG, logger="sf_compile"):
        (call,) = join(gm)
    assert "trunk: one op for 8 sites, conv2d_1, conv2d_2, " in caplog.text
    graph = fx.Graph()
    inputs = {node: graph.placeholder(node.name) for node in call.all_input_nodes}
    trunk = graph.node_copy(call, inputs.__getitem__)
    graph.output(graph.call_function(getitem, (trunk, 0)))
    (region,) = group(fx.GraphModule(nn.Module(), graph), lambda inner: inner)
    assert len(region.sites) == 8 and str(region).startswith("1 ops in one call, of conv2d_1, ")


def test_explain_shows_every_layer():
    with torch.no_grad():
        report = sf_compile.explain(TransformerNet(4, 3).eval(), torch.rand(1, 3, 24, 20))
    assert [site.region for site in report.fused] == [0] * 12
