"""Norms that a model spells out: read for what they are, fused, and computing what eager does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, relative_error
from graphs import capture, found, fuse, rewritten_graph
from norm_spellings import SPELLINGS, exact
from torch import Tensor, nn

from sf_compile.backend import analyse
from sf_compile.options import Options

SMALL = (2, 4, 3, 3)  # n / (n - 1) is 1.125


class Layers(nn.Module):
    """Two convolutions, and what ``body(self, x)`` does with them and with numbers of each channel."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3)
        self.weight, self.bias = (nn.Parameter(torch.randn(4, 1, 1)) for _ in range(2))
        self.fc = nn.Linear(3, 8)
        self.register_buffer("mean", torch.randn(4))

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


@pytest.mark.parametrize("name", SPELLINGS)
def test_is_read_for_what_it_is_at_any_size(name):
    spelling = SPELLINGS[name]
    model = Layers(lambda m, x: m.last(F.relu(spelling.body(m.conv(x)), inplace=True)))
    analysis = capture(model, torch.randn(SMALL), dynamic=True)
    assert found(analysis) == ["conv+norm+relu", "conv"], analysis.matches.misses
    assert len(list(analysis.normalized.graph.find_nodes(op="call_method"))) == 0, "is not needed any more"
    norm = analysis.matches.sites[0].norm
    assert norm.groups == spelling.groups and norm.correction == spelling.correction
    assert norm.eps == spelling.eps and norm.outer_eps == spelling.outer_eps


@pytest.mark.parametrize("name", SPELLINGS)
def test_is_as_close_to_float64_as_eager(name):
    spelling = SPELLINGS[name]
    compiled, made = fuse(spelling.body)
    x = 3 * torch.randn(SMALL) + 1
    ours, theirs, right = compiled(x), spelling.body(x), exact(x, spelling)
    assert relative_error(theirs, right) < 1e-6, "the table says something else than the model"
    assert relative_error(ours, right) <= 1.25 * relative_error(theirs, right) + 2e-7
    assert ours.stride() == theirs.stride()
    assert found(made[0].analysis) == ["norm"]


@pytest.mark.parametrize("outside", [False, True])
def test_eps_that_is_a_node_of_the_graph(outside):
    def body(m: Layers, x: Tensor) -> Tensor:
        x = m.conv(x)
        mean, variance = x.mean((2, 3), True), x.var((2, 3), keepdim=True)
        if outside:
            return m.last((x - mean) / (variance.sqrt() + m.eps))
        return m.last((x - mean) * torch.rsqrt(variance + m.eps))

    model = Layers(body)
    model.eps = 0.25
    compiled, made = fuse(model, dynamic=True)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    norm = made[0].analysis.matches.sites[0].norm
    assert isinstance(norm.outer_eps if outside else norm.eps, torch.fx.Node)


def unbiased(x: Tensor) -> Tensor:
    return (x - x.mean((2, 3), True)) / (x.std((2, 3), keepdim=True) + 1e-5)


def per_image(m: Layers, code: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, 1, 1) each, of a style code (N, 3): both are parts of one tensor."""
    scale, shift = m.fc(code).view(-1, 8, 1, 1).chunk(2, 1)
    return scale, shift


def adain(m: Layers, x: Tensor, style: Tensor) -> Tensor:
    """Of Huang and Belongie, with the style's statistics expanded."""

    def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
        flat = y.view(*y.shape[:2], -1)
        return flat.mean(2).view(*y.shape[:2], 1, 1), (flat.var(2) + 1e-5).sqrt().view(*y.shape[:2], 1, 1)

    x = m.conv(x)
    (mean, std), (to_mean, to_std) = statistics(x), statistics(style)
    normalized = (x - mean.expand(x.size())) / std.expand(x.size())
    return m.last(normalized * to_std.expand(x.size()) + to_mean.expand(x.size()))


def starganv2(m: Layers, x: Tensor, code: Tensor) -> Tensor:
    gamma, beta = per_image(m, code)
    return m.last(F.relu((1 + gamma) * F.instance_norm(m.conv(x)) + beta))


def munit(m: Layers, x: Tensor, code: Tensor) -> Tensor:
    numbers = m.fc(code)
    weight, bias = (numbers[:, i : i + 4].contiguous().view(-1) for i in (0, 4))
    x = m.conv(x)
    n, c = x.size(0), x.size(1)
    mean, variance = m.mean.repeat(n), m.mean.square().repeat(n)
    y = x.contiguous().view(1, n * c, *x.size()[2:])
    y = F.batch_norm(y, mean, variance, weight, bias, True, 0.1, 1e-5)
    return m.last(y.view(n, c, *x.size()[2:]))


def by_index(m: Layers, x: Tensor, code: Tensor) -> Tensor:
    gamma, beta = m.fc.weight.t().chunk(2, 1)  # three styles of four channels
    index = code[:, 0].gt(0).long()
    scale, shift = gamma[index].unsqueeze(2).unsqueeze(3), beta[index].unsqueeze(2).unsqueeze(3)
    return F.relu(torch.mul(F.instance_norm(m.conv(x)), scale).add(shift))


def munit_layer_norm(m: Layers, x: Tensor, _: Tensor) -> Tensor:
    y = SPELLINGS["layer norm of MUNIT"].body(m.conv(x))
    shape = [1, -1] + [1] * (y.dim() - 2)
    return m.last(y * m.weight.flatten().view(*shape) + m.bias.flatten().view(*shape))


def weight_inside(m: Layers, x: Tensor, _: Tensor) -> Tensor:
    x = m.conv(x)
    return m.weight * (x - x.mean((2, 3), True)) / (x.std((2, 3), keepdim=True) + 1e-3) + m.bias


def weight_beside_the_root(m: Layers, x: Tensor, _: Tensor) -> Tensor:
    x = m.conv(x)
    scale = m.weight[None] / torch.sqrt(x.var((2, 3), keepdim=True) + 1e-5)
    return m.bias.expand_as(x) + (x - x.mean((2, 3), keepdim=True)) * scale


def written_in_place(m: Layers, x: Tensor, _: Tensor) -> Tensor:
    x = unbiased(m.conv(x))
    x *= m.weight
    return x.add_(m.bias.expand_as(x)).relu_()


def group_norm_with_a_bias_before(m: Layers, x: Tensor, _: Tensor) -> Tensor:
    return m.last(F.group_norm(m.conv(x), 2, m.weight.flatten(), m.bias.flatten()))


def weight_alone(m: Layers, x: Tensor, _: Tensor) -> Tensor:
    return m.last(m.conv(x).relu() + unbiased(m.conv(x)) * m.weight)


# the patterns found, and the dimensions of weight and bias (0: none)
AFFINES = {
    adain: (["conv+norm", "conv"], 2, 2),
    starganv2: (["conv+norm+relu", "conv"], 2, 2),
    munit: (["conv+norm", "conv"], 2, 2),
    by_index: (["conv+norm+relu"], 2, 2),
    munit_layer_norm: (["conv+norm", "conv"], 1, 1),
    weight_inside: (["conv+norm"], 1, 1),
    weight_beside_the_root: (["conv+norm"], 1, 1),
    written_in_place: (["conv+norm+relu"], 1, 1),
    group_norm_with_a_bias_before: (["conv+norm", "conv"], 1, 1),
    weight_alone: (["conv+norm+add"], 1, 0),
}


def example(body: Any, images: int = 2) -> tuple[Tensor, Tensor]:
    x = 2 * torch.randn(images, 4, 5, 5) + 1
    return x, 3 * torch.randn_like(x) if body is adain else torch.randn(images, 3)


@pytest.mark.parametrize(
    ("body", "dynamic"),
    [(body, False) for body in AFFINES] + [(body, True) for body in (adain, starganv2, munit)],
)
def test_affine_becomes_the_norm_s_own(body, dynamic):
    patterns, weight, bias = AFFINES[body]
    model = Layers(body)
    compiled, made = fuse(model, dynamic=dynamic)
    for images in (2, 3):
        inputs = example(body, images)
        with torch.no_grad():
            ours, theirs = compiled(*inputs), model(*inputs)
            right = model.double()(*(x.double() for x in inputs))
            model.float()
        assert relative_error(ours, right) <= 1.25 * relative_error(theirs, right) + 2e-7
        assert ours.stride() == theirs.stride()
    fused = [pattern for pattern in patterns if pattern != "conv"]
    assert [pattern for pattern in found(made[0].analysis) if "norm" in pattern] == fused
    norm = next(site.norm for site in made[0].analysis.matches.sites if site.norm is not None)
    assert [v is not None for v in (norm.weight, norm.bias)] == [bool(weight), bool(bias)]


def test_one_style_serves_every_image():
    model = Layers(adain)
    compiled, made = fuse(model)
    x, style = torch.randn(2, 4, 5, 5), torch.randn(1, 4, 7, 6)
    model.body = lambda m, x, style: adain(m, x, style.expand(2, -1, -1, -1).contiguous())
    theirs = model(x, style)
    model.body = lambda m, x, style: adain(m, x, style.mul(1.0))
    torch.testing.assert_close(compiled(x, style), theirs, rtol=1e-4, atol=1e-5)
    assert found(made[0].analysis)[0] == "conv+norm"


# what looks like a norm, the reason why it is none, and the patterns found all the same
MISSES = {
    "over the batch too": (
        lambda x: (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), keepdim=True),
        "statistics over the dimensions (0, 2, 3) of 4", [],
    ),
    "over the channels": (
        lambda x: (x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-5), "over the dimensions (1,) of 4", []
    ),
    "over the columns": (
        lambda x: (x - x.mean(3, True)) / x.std(3, keepdim=True), "100 statistics of 5 images of 4", []
    ),
    "mean and variance of different tensors": (
        lambda x: (x - x.mean((2, 3), True)) / (x.relu().var((2, 3), keepdim=True) + 1e-5).sqrt(),
        "of different tensors or pixels", [],
    ),
    "mean and variance of different pixels": (
        lambda x: (x - x.mean((2, 3), True)) / (x.var((1, 2, 3), keepdim=True) + 1e-5).sqrt(),
        "of different tensors or pixels", [],
    ),
    "the mean of another tensor": (
        lambda x: (x - x.relu().mean((2, 3), True)) / x.std((2, 3), keepdim=True),
        "the mean of another tensor", [],
    ),
    "n - 2": (
        lambda x: (c := x - x.mean((2, 3), True)) / (c.square().sum((2, 3), True) / 23).sqrt(),
        "a sum over 25 pixels divided by 23", [],
    ),
    "the n of all channels": (
        lambda x: (c := x - x.mean((2, 3), True)) / (c.square().sum((2, 3), True) / 100).sqrt(),
        "a sum over 25 pixels divided by 100", [],
    ),
    "statistics that are read too": (
        lambda x: ((x - (mean := x.mean((2, 3), True))) / x.std((2, 3), keepdim=True), mean),
        "mean of the norm is also read by output", [],
    ),
    "a difference that is read too": (
        lambda x: (y := x - x.mean((2, 3), True), y / y.std((2, 3), keepdim=True)),
        "y of the norm is also read by output", [],
    ),
    "means along the rows": (
        lambda x: ((y := x[..., :4]) - y.mean((2, 3)).view(5, 1, 4, 1).repeat(1, 1, 2, 1)[:, :, :5])
        / y.std((2, 3), keepdim=True),
        None, [],
    ),
    "means along the columns": (
        lambda x: ((y := x[..., :4]) - y.mean((2, 3))[:, None, None]) / y.std((2, 3), keepdim=True),
        "a mean that is not broadcast over its own pixels", [],
    ),
    "deviations along the columns": (
        lambda x: ((y := x[..., :4]) - y.mean((2, 3), True)) / y.std((2, 3))[:, None, None],
        "a standard deviation that is not broadcast", [],
    ),
    "means of other images": (
        lambda x: ((y := x[:4]) - y.mean((2, 3)).t()[:, :, None, None]) / y.std((2, 3), keepdim=True),
        None, [],
    ),
    "two eps": (
        lambda x: (x - x.mean((2, 3), True)) / ((x.var((2, 3), keepdim=True) + 1e-5).sqrt() + 1e-3),
        "an eps inside of the root and another one outside", [],
    ),
    "an eps whose square is lost": (
        lambda x: (x - x.mean((2, 3), True)) / (x.std((2, 3), keepdim=True) + 1e-30), "an eps of 1e-30", []
    ),
    "in another dtype": (
        lambda x: (x - x.mean((2, 3), True)) / x.std((2, 3), keepdim=True) * torch.ones(4, 1, 1).double(),
        None, ["norm"],
    ),
    "switched gradients": (
        lambda x: (x - frozen_mean(x)) / x.std((2, 3), keepdim=True), "switches a mode, inside the norm", []
    ),
    "written in between": (lambda x: overwritten(x.clone()), "mul_ writes in place", []),
    "of vectors": (
        lambda x: ((y := x[:, :, 0]) - y.mean(2, True)) / y.std(2, keepdim=True), "no picture", []
    ),
    "response": (lambda x: x * torch.rsqrt(x.square().mean((2, 3), True) + 1e-6), None, []),
    "numbers for every pixel": (
        lambda x: unbiased(x) * x.sigmoid() + x, "differs from pixel to pixel", ["norm"]
    ),
    "numbers for every pixel, after a function": (
        lambda x: F.instance_norm(x) * (1 + x.sigmoid()) + x, "differs from pixel to pixel", ["norm"]
    ),
    "layer norm with a weight": (
        lambda x: F.layer_norm(x, x.shape[1:], torch.ones(4, 5, 5)), "weight and bias for every pixel", []
    ),
    "layer norm of rows": (lambda x: F.layer_norm(x, (5,)), "other dimensions than (C, H, W)", []),
    "running statistics in training": (
        lambda x: F.batch_norm(x.view(1, 20, 5, 5), x.new_zeros(20), x.new_ones(20), training=True),
        "updates its running statistics", [],
    ),
}  # fmt: skip


def frozen_mean(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mean((2, 3), True)


def overwritten(x: Tensor) -> Tensor:
    mean, std = x.mean((2, 3), True), x.std((2, 3), keepdim=True)
    x.view(-1).mul_(2)
    return (x - mean) / std


@pytest.mark.parametrize("name", MISSES)
def test_near_miss_is_left_alone(name):
    body, reason, remain = MISSES[name]
    compiled, made = fuse(body)
    x = torch.randn(5, 4, 5, 5)
    torch.testing.assert_close(compiled(x.clone()), body(x.clone()), rtol=1e-5, atol=1e-5)
    reasons = [miss.reason for miss in made[0].analysis.matches.misses]
    assert found(made[0].analysis) == remain
    assert reason is None or any(reason in given for given in reasons), reasons


def by_hand(x: Tensor) -> Tensor:
    return (x - x.mean((2, 3), True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_strides_that_no_op_returns_are_left_alone():
    """PyTorch's own norm returns a contiguous picture; one by hand keeps the strides of its input."""
    x = torch.randn(2, 4, 6, 5)
    turned = torch.randn(2, 4, 5, 6).transpose(2, 3)
    cases = (by_hand, turned, False), (by_hand, x, True), (F.instance_norm, turned, True)
    for body, picture, fused in cases:
        compiled, made = fuse(body)
        assert compiled(picture).stride() == body(picture).stride()
        torch.testing.assert_close(compiled(picture), body(picture), rtol=1e-5, atol=1e-5)
        assert (found(made[0].analysis) != []) == fused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_norm_of_a_turned_picture_is_left_alone(layout):
    """Dynamo records strides that are neither layout's, where eager returns a contiguous picture."""
    weight = torch.randn(4, 4, 3, 3).contiguous(memory_format=LAYOUTS[layout])
    mean, variance = torch.randn(4), torch.rand(4) + 0.5

    def body(x: Tensor) -> Tensor:
        turned = by_hand(F.conv2d(x, weight)).relu().transpose(2, 3)
        return F.relu(F.batch_norm(by_hand(turned) + turned, mean, variance))

    compiled, made = fuse(body)
    x = torch.randn(1, 4, 12, 5)
    assert compiled(x).stride() == body(x).stride()
    torch.testing.assert_close(compiled(x), body(x), rtol=1e-5, atol=1e-5)
    assert found(made[0].analysis) == ["conv+norm+relu"]
    reasons = [miss.reason for miss in made[0].analysis.matches.misses]
    assert reasons.count("a norm whose result is neither contiguous nor channels_last") == 2


@pytest.mark.parametrize("body", [adain, starganv2, munit, munit_layer_norm, group_norm_with_a_bias_before])
def test_gradients_are_eager_s(body):
    model = Layers(body).double()
    compiled, made = fuse(model)
    inputs = [x.double().requires_grad_() for x in example(body)]
    ours, theirs = compiled(*inputs), model(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    wanted = [*inputs, *model.parameters()]
    weights = torch.linspace(-1, 1, theirs.numel(), dtype=theirs.dtype).view(theirs.shape)
    gradients = [torch.autograd.grad(out, wanted, weights, allow_unused=True) for out in (ours, theirs)]
    for mine, eager in zip(*gradients, strict=True):
        if eager is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-9)
    assert "norm" in found(made[0].analysis)[0]


def test_finish_is_deferred_and_the_ops_stay_neighbours():
    def body(m: Layers, x: Tensor, code: Tensor) -> Tensor:
        gamma, beta = per_image(m, code)
        for _ in range(2):
            y = F.relu(unbiased(m.conv(x)) * gamma + beta)
            x = x + (SPELLINGS["mean of squares"].body(m.conv(y)) * m.weight + m.bias)
        return m.last(F.group_norm(x, 2))

    compiled, made = fuse(model := Layers(body))
    inputs = example(starganv2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    decisions = made[0].analysis.plan.decisions
    assert [d.finish for d in decisions[:2]] == ["deferred", "deferred"]
    _, regions = rewritten_graph(analyse(made[0].gm, made[0].inputs, Options()), Options())
    assert len(regions) == 1 and len(set(regions[0].sites)) == len(decisions)


@pytest.mark.parametrize("name", ["no eps", "std_mean", "reciprocal", "var_mean", "layer norm of MUNIT"])
def test_constant_channels_are_what_eager_makes_of_them(name):
    body = SPELLINGS[name].body
    compiled, made = fuse(body)
    x = torch.tensor([0.0, 1.0, -2.0, 0.5]).view(1, 4, 1, 1).repeat(2, 1, 4, 4)
    x[0, 1] += torch.randn(4, 4)
    if name == "layer norm of MUNIT":
        x[1] = 2.0
    ours, theirs = compiled(x), body(x)
    assert theirs.isnan().any() == (name == "no eps")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found(made[0].analysis) == ["norm"]


def test_running_statistics_in_training_are_updated():
    class Tracking(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)))

    for kind in (nn.InstanceNorm2d, nn.BatchNorm2d):
        norm = kind(4, track_running_stats=True, momentum=0.3)
        model, x = Tracking(norm), torch.randn(2, 4, 6, 6)
        twin = copy.deepcopy(model)
        compiled, made = fuse(model)
        torch.testing.assert_close(compiled(x), twin(x))
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
        assert not torch.equal(model.norm.running_mean, torch.zeros(4))
        assert any("running statistics" in m.reason or "from the batch" in m.reason
                   for m in made[0].analysis.matches.misses)  # fmt: skip


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_running_statistics_in_eval_are_an_affine(kind, affine):
    norm = kind(4, eps=0.1, affine=affine, track_running_stats=True, momentum=None).eval()
    norm.running_mean.copy_(torch.randn(4))
    norm.running_var.copy_(torch.rand(4) / 10)
    model = Layers(lambda m, x: m.last(F.pad(norm(m.conv(x)), [1] * 4, "reflect")))  # no plain network
    compiled, made = fuse(model)
    x = torch.randn(2, 4, 6, 6)
    ours, theirs = compiled(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    site = made[0].analysis.matches.sites[0]
    assert site.pattern == "conv+norm" and site.norm.eps == 0.1
    assert (site.norm.weight is not None) == affine and site.norm.mean is not None
