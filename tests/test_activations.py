"""Activations beyond ReLU, endings and dropout: their spellings, where they are fused, and their numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import picture, relative_error
from graphs import SHAPE, capture, found, fuse
from networks import Net, reflect
from test_rewrite import assert_equal, assert_equal_gradients, assert_finished, gradients
from torch import nn

from sf_compile import activations, ops
from sf_compile.activations import Activation, parse
from sf_compile.graph import trunks
from sf_compile.nn import FusedInstanceNorm2d

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
# The text of each and the function it stands for.
FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu(0.2)": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu(-1.5)": lambda x: F.leaky_relu(x, -1.5),
    "leaky_relu(0.0)": lambda x: F.leaky_relu(x, 0.0),
    "hardtanh(-1.0, 0.5)": lambda x: F.hardtanh(x, -1.0, 0.5),
    "clamp(-0.25, inf)": lambda x: x.clamp(min=-0.25),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu(0.7)": lambda x: F.elu(x, 0.7),
    "tanh * 150.0 + 127.5": lambda x: torch.tanh(x) * 150 + 127.5,
    "none * -2.0 + 1.0": lambda x: 1 - 2 * x,
    "relu * 0.5 + -1.0": lambda x: F.relu(x) / 2 - 1,
}


# ---- the text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FUNCTIONS)
def test_a_text_is_read_as_what_it_was_made_of(text):
    assert str(parse(text)) == text and parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "Relu", "relu()", "leaky_relu", "leaky_relu(nan)", "leaky_relu(inf)", "clamp(1.0)",
     "tanh * inf + 0.0", "clamp(nan, 1.0)", "tanh*2+1", "clamp(0.0,1.0)", "leaky_relu(a)", "tanh * 2.0"],
)  # fmt: skip
def test_a_text_that_is_none(text):
    with pytest.raises(ValueError):
        parse(text)


def test_maps_after_one_another():
    ending = Activation("tanh").then(1.0, 1.0).then(0.5, 0.0).then(255.0, 0.0)
    assert str(ending) == "tanh * 127.5 + 127.5" and not Activation("tanh").then(1.0, 0.0).is_scaled


# ---- the ops ---------------------------------------------------------------------------------------------


def test_every_function_is_tested():
    # A PReLU's slope is a tensor: test_prelu.py.
    assert {parse(text).function for text in FUNCTIONS} | {"prelu"} == set(activations.PARAMETERS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("text", FUNCTIONS)
def test_ops_are_as_close_to_float64_as_eager(text, layout, device):
    function, last = FUNCTIONS[text], layout == "channels_last"
    for dtype, shape in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), ((2, 8, 12, 16), (1, 3, 7, 9), (1, 2, 300, 301))
    ):
        x, residual = (picture(shape, dtype, layout, device) for _ in range(2))
        c = shape[1]
        weight, bias = (torch.randn(c, device=device).to(dtype) * 3 for _ in range(2))
        norm = ops.instance_statistics(x)

        def normed(x, function=function, weight=weight, bias=bias):
            return function(F.instance_norm(x, weight=weight.to(x.dtype), bias=bias.to(x.dtype)))

        exact, eager = normed(x.double()) + residual.double(), normed(x) + residual
        allowed = 1.25 * relative_error(eager, exact) + torch.finfo(dtype).eps
        for ours in (
            ops.instance_norm(x, weight, bias, 1e-5, text, residual, last),
            ops.normalize(x, *norm, weight, bias, 1e-5, text, residual, last),
            ops.normalize(x, *norm, weight, bias, 1e-5, text, residual, not last),  # another layout
        ):
            assert relative_error(ours, exact) <= allowed, (dtype, shape)


def convolve(x, weight, bias=None, activation="none", output_activation="none", channels_last=False):
    none = (None,) * 4
    return ops.conv2d(
        x, weight, bias, *none, 1.0, activation, None, 1, [1, 2, 0, 1], "reflect", [1, 1], output_activation,
        False, activation != "none", channels_last,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", FUNCTIONS)
def test_a_convolution_between_activations(text, device):
    function = FUNCTIONS[text]
    for dtype, channels_last in itertools.product((torch.float32, torch.float16), (False, True)):
        if dtype == torch.float32 and device == "cuda":
            continue  # TF32 is another test's subject
        layout = "channels_last" if channels_last else "contiguous"
        x = picture((2, 16, 13, 15), dtype, layout, device)
        weight, bias = (torch.randn(*s, device=device).to(dtype) / 4 for s in ((8, 16, 3, 3), (8,)))

        def steps(x, weight=weight, bias=bias):
            z = function(x)
            padded = F.pad(z, [1, 2, 0, 1], mode="reflect")
            return function(F.conv2d(padded, weight.to(x.dtype), bias.to(x.dtype))), z

        for ours, exact, eager in zip(
            convolve(x, weight, bias, text, text, channels_last)[::3],
            steps(x.double()),
            steps(x),
            strict=True,
        ):
            if ours.numel():  # nothing is kept of an input that is not changed
                # A saturated picture has few pixels that err: in float32 the order of a sum shows.
                units = 4 if dtype == torch.float32 else 1
                allowed = 1.25 * relative_error(eager, exact) + units * torch.finfo(dtype).eps
                assert relative_error(ours, exact) <= allowed, (dtype, channels_last)


@pytest.mark.parametrize("text", FUNCTIONS)
def test_gradcheck(text):
    x = picture((1, 2, 4, 3), torch.float64, "contiguous", "cpu").requires_grad_()
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.instance_norm(*a, 1e-5, text), (x, vector, vector))
    assert torch.autograd.gradcheck(lambda x: ops.normalize(x, *(None,) * 4, 1.0, text), (x,))
    if text != "none":
        run = lambda *a: convolve(*a, activation=text, output_activation=text)[::3]  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, weight, vector))


@pytest.mark.parametrize("text", ["tanh * 1.5 + 0.5", "leaky_relu(0.2)"])
def test_opcheck(text):
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    for op, arguments in (
        (ops.instance_norm, (x, None, None, 1e-5, text, None, True)),
        (ops.normalize, (x, *(None,) * 4, 1.0, text)),
        (ops.conv2d, (x, weight, *(None,) * 5, 1.0, text, None, 1, [1] * 4, "reflect", [1, 1], text, False,
                      True, False)),
    ):  # fmt: skip
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", FUNCTIONS)
def test_kinks_nan_and_infinity_are_eagers(text, device, strict_float32):
    """Values, and gradients at the very bounds, of numbers that are not all finite."""
    special = [0.0, -0.0, 1.0, -1.0, 0.5, -0.25, 6.0, float("inf"), -float("inf"), float("nan"), -1e30, 88.0]
    x = torch.tensor(special, device=device).view(1, 1, 3, 4).requires_grad_()
    one = torch.ones(1, 1, 1, 1, device=device)
    norm = (None,) * 4
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's gelu(inf) is NaN with AVX-512
        eager = FUNCTIONS[text](x)
        passed = ops.normalize(x, *norm, 1.0, text)
        ending = ops.conv2d(
            x, one, None, *norm, 1.0, "none", None, 1, [0] * 4, "zeros", [1, 1], text, False, False, False
        )[0]
    for ours in (passed, ending):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6, equal_nan=True)
    expected = torch.autograd.grad(eager.sum(), x)[0].flatten()[:7]
    for ours in (passed, ending):
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), x)[0].flatten()[:7], expected)


@pytest.mark.parametrize("text", FUNCTIONS)
def test_the_module_on_a_picture_without_a_batch(text):
    module, plain = FusedInstanceNorm2d(3, affine=True, activation=text), nn.InstanceNorm2d(3, affine=True)
    x = torch.randn(3, 6, 7, requires_grad=True)
    ours, theirs = module(x), FUNCTIONS[text](plain(x))
    torch.testing.assert_close(ours, theirs)
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


# ---- the graph -------------------------------------------------------------------------------------------

SPELLINGS = {
    "leaky_relu(0.2)": [
        lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2, True), lambda x: F.leaky_relu_(x, 0.2),
        lambda x: F.leaky_relu(x, negative_slope=0.2, inplace=True), nn.LeakyReLU(0.2),
        lambda x: torch._C._nn.leaky_relu(x, 0.2),
    ],
    "leaky_relu(0.01)": [F.leaky_relu, F.leaky_relu_],
    "hardtanh(0.0, 6.0)": [F.relu6, lambda x: F.relu6(x, inplace=True), nn.ReLU6(inplace=True)],
    "hardtanh(-1.0, 1.0)": [F.hardtanh, F.hardtanh_, nn.Hardtanh(), lambda x: F.hardtanh(x, inplace=True)],
    "clamp(0.0, 255.0)": [
        lambda x: x.clamp(0, 255), lambda x: x.clamp_(0, 255), lambda x: torch.clamp(x, min=0, max=255),
        lambda x: torch.clip(x, 0, 255), lambda x: x.clip(0, 255), lambda x: torch.clamp_(x, 0, 255),
    ],
    "clamp(-inf, 1.0)": [lambda x: x.clamp(max=1)],
    "silu": [F.silu, lambda x: F.silu(x, True), nn.SiLU(), torch._C._nn.silu],
    "gelu": [F.gelu, nn.GELU(), lambda x: torch._C._nn.gelu(x, approximate="none")],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")],
    "tanh": [torch.tanh, F.tanh, torch.tanh_, lambda x: x.tanh(), lambda x: x.tanh_(), nn.Tanh()],
    "sigmoid": [torch.sigmoid, F.sigmoid, torch.sigmoid_, lambda x: x.sigmoid_(), torch.special.expit],
    "elu(0.5)": [lambda x: F.elu(x, 0.5), lambda x: F.elu(x, 0.5, True), lambda x: F.elu_(x, 0.5),
                 nn.ELU(0.5)],
    "relu": [torch.relu_, F.relu_, lambda x: x.relu_(), nn.ReLU(True)],
}  # fmt: skip
ENDINGS = {
    "tanh * 150.0 + 127.5": [
        lambda x: torch.tanh(x) * 150 + 255.0 / 2, lambda x: 127.5 + 150 * torch.tanh(x),
        lambda x: torch.tanh(x).mul(150).add(127.5), lambda x: x.tanh_().mul(150).add_(127.5),
        lambda x: torch.add(torch.mul(torch.tanh(x), 150), 127.5),
    ],
    "tanh * 0.5 + 0.5": [lambda x: (torch.tanh(x) + 1) / 2, lambda x: 0.5 * (torch.tanh(x) + 1)],
    "sigmoid * 255.0 + -1.0": [lambda x: torch.sigmoid(x) * 255 - 1,
                                lambda x: torch.sigmoid(x).mul(255).sub(1)],
    "none * 127.5 + 127.5": [lambda x: (x + 1) / 2 * 255],
}  # fmt: skip


def inplace(x):
    """Every in-place form of arithmetic with a number."""
    x += 1
    x /= 2
    x *= 255
    x -= 0.5
    return x


ENDINGS["none * 127.5 + 127.0"] = [inplace]


@pytest.mark.parametrize("text", [*SPELLINGS, *ENDINGS])
def test_every_spelling_after_a_norm_and_after_a_convolution(text):
    for spelled in (SPELLINGS | ENDINGS)[text]:
        model = Net(lambda m, x, act=spelled: act(m.conv(reflect(act(m.norm(m.conv(reflect(x))))))))
        compiled, made = fuse(model)
        x = torch.randn(SHAPE, requires_grad=True)
        ours, theirs = compiled(x), model(x)
        assert_equal(ours, theirs)
        assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
        (rewritten,) = made
        first, second = rewritten.analysis.matches.sites
        assert str(first.function) == str(second.function) == text
        assert first.pattern.startswith("pad+conv+norm+") or parse(text).function == "none"
        assert rewritten.analysis.normalized.barriers == ()
        calls = [str(n.target) for n in rewritten.module.graph.nodes if n.op.startswith("call")]
        assert all("styleforge" in call or "getitem" in call for call in calls), calls
        assert_finished(rewritten)
        torch._dynamo.reset()


BODIES = {
    "an activation alone in front of a convolution": (
        lambda m, x: m.conv(reflect(F.leaky_relu(x, 0.2))), ["leaky_relu+pad+conv"],
    ),
    "in front of an upsampling": (
        lambda m, x: m.conv(reflect(F.interpolate(torch.tanh(x), scale_factor=2))),
        ["tanh+upsample+pad+conv"],
    ),
    "a pre-activation block": (
        lambda m, x: m.conv(reflect(F.silu(m.norm(x)))) + x, ["norm+silu", "pad+conv+add"],
    ),
    "a pre-activation after a norm that is not fused": (
        lambda m, x: m.conv(reflect(F.elu(F.instance_norm(x, m.batch.running_mean, m.batch.running_var)))),
        ["elu+pad+conv"],
    ),
    "an activation after an addition": (
        lambda m, x: m.conv(reflect(F.relu(m.norm(m.conv(reflect(x))) + x))),
        ["pad+conv+norm+add", "relu+pad+conv"],
    ),
    "an activation after a convolution that is left alone": (
        lambda m, x: m.conv(reflect(F.leaky_relu(m.same(x)))), ["leaky_relu+pad+conv"],
    ),
    "an activation with two readers": (
        lambda m, x: (y := F.relu6(x), m.conv(reflect(y)))[::-1], ["pad+conv"],
    ),
    "leaky residual blocks": (
        lambda m, x: m.plain(m.conv(reflect(F.leaky_relu(m.norm(m.conv(reflect(x))), 0.2, True)))) + x,
        ["pad+conv+norm+leaky_relu", "pad+conv+norm+add"],
    ),
    "a norm with another reader than its activation": (
        lambda m, x: (y := m.norm(x), m.conv(reflect(F.tanh(y))) + y)[1], ["norm", "tanh+pad+conv+add"],
    ),
    "a scale beyond float32": (lambda m, x: (m.norm(x) * 1e30 * 1e30).clamp(-1, 1), ["norm+affine"]),
    "a scaled residual": (
        lambda m, x: m.conv(reflect(x)) * 0.1 + x, ["pad+conv+affine+add"],
    ),
    "a scaled skip": (lambda m, x: m.norm(m.same(x)) + x * 0.5, ["conv+norm+add"]),
    "an affine map before an activation": (
        lambda m, x: m.conv(reflect(F.relu(m.norm(x) * 2 + 1))), ["norm+affine", "relu+pad+conv"],
    ),
    "dropout in eval": (
        lambda m, x: m.conv(reflect(F.dropout(F.relu(m.norm(m.conv(reflect(x)))), 0.5, False, False))),
        ["pad+conv+norm+relu", "pad+conv"],
    ),
    "dropout of nothing": (
        lambda m, x: F.relu(F.dropout(m.norm(m.same(x)), 0.0, True, True)), ["conv+norm+relu"],
    ),
    "dropout that the network returns": (
        lambda m, x: (y := m.norm(m.same(x)), torch.dropout(y, 0.5, False))[1], ["conv+norm"],
    ),
    "a network without norms": (
        lambda m, x: torch.sigmoid(m.conv(reflect(F.leaky_relu(m.conv(reflect(x)), 0.1)))),
        ["pad+conv+leaky_relu", "pad+conv+sigmoid"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_where_an_activation_goes(name):
    body, patterns = BODIES[name]
    model, x = Net(body), torch.randn(SHAPE, requires_grad=True)
    compiled, made = fuse(model)
    ours, theirs = compiled(x * 1.0), model(x * 1.0)
    assert_equal(ours, theirs)
    assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    assert found(made[0].analysis) == patterns
    assert_finished(made[0])


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_a_norm_and_its_activation_are_deferred_into_the_next_convolution(activation):
    function = getattr(F, activation)
    model = Net(lambda m, x: m.plain(m.conv(reflect(function(m.norm(m.conv(reflect(x))))))))
    (first, _) = capture(model, torch.randn(SHAPE)).plan.decisions
    assert (first.finish, first.deferred_to) == ("deferred", 1)


LEFT = {
    "tensor bounds": (lambda m, x: m.norm(x).clamp(m.norm.weight.sum()), "not a constant", ["norm"]),
    "division by zero": (lambda m, x: torch.tanh(m.norm(x)) / 0, "truediv with 0", ["norm+tanh"]),
    "NaN as a bound": (lambda m, x: m.norm(x).clamp(float("nan"), 1), "not a constant", ["norm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_pytorch_says_why(name):
    body, reason, patterns = LEFT[name]
    model, x = Net(body), torch.randn(SHAPE)
    compiled, made = fuse(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4, equal_nan=True)
    analysis = made[0].analysis
    assert found(analysis) == patterns
    assert any(reason in miss.reason for miss in analysis.matches.misses), analysis.matches.misses


def leaky() -> Net:
    model = Net(lambda m, x: m.leaky(m.norm(m.same(x))))
    model.leaky = nn.LeakyReLU(0.3)
    return model


def test_a_slope_that_a_module_keeps_is_read_and_guarded_on():
    model, x = leaky(), torch.randn(SHAPE)
    compiled, made = fuse(model, dynamic=True)
    for slope, calls in ((0.3, 1), (0.3, 1), (0.5, 2)):
        model.leaky.negative_slope = slope
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert len(made) == calls
    assert [found(one.analysis) for one in made] == [["conv+norm+leaky_relu"]] * 2
    assert made[1].analysis.matches.sites[0].function == Activation("leaky_relu", (0.5,))


def test_a_slope_that_has_changed_stays_symbolic():
    model, x = leaky(), torch.randn(SHAPE)
    compiled, made = fuse(model)
    for slope, calls in ((0.3, 1), (0.4, 2), (0.5, 2), (0.6, 2)):
        model.leaky.negative_slope = slope
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert len(made) == calls
    assert [found(one.analysis) for one in made] == [["conv+norm+leaky_relu"], ["conv+norm"]]
    misses = made[1].analysis.matches.misses
    assert any("slope or a bound that is not a constant" in miss.reason for miss in misses)


def test_a_slope_of_a_size_adds_no_guard():
    model = Net(lambda m, x: F.leaky_relu(m.norm(m.same(x)), x.shape[3] / 100))
    compiled, made = fuse(model, dynamic=True)
    for width in (10, 12, 14):
        x = torch.randn(2, 4, 12, width)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(made) == 1 and found(made[0].analysis) == ["conv+norm"]


def test_dropout_in_training_stays():
    model = Net(lambda m, x: m.conv(reflect(F.dropout(F.relu(m.norm(x)), 0.5, True))))
    analysis = capture(model, torch.randn(SHAPE))
    assert found(analysis) == ["norm+relu", "pad+conv"]
    assert any(node.target is F.dropout for node in analysis.normalized.graph.nodes)


def test_a_finish_is_not_deferred_into_a_convolution_with_an_activation_of_its_own():
    model = Net(BODIES["an activation after an addition"][0])
    first, second = capture(model, torch.randn(SHAPE)).plan.decisions
    assert first.finish == "here" and "an activation of its own" in first.why
    assert second.site.before is not None


@pytest.mark.parametrize(("activation", "trunks_found"), [(F.relu, 1), (F.leaky_relu, 0)])
def test_a_trunk_begins_with_a_relu_or_none(activation, trunks_found):
    def body(m, x):
        y = activation(m.norm(m.conv(reflect(x))))
        for _ in range(2):
            y = m.norm(m.conv(reflect(F.relu(m.norm(m.conv(reflect(y))))))) + y
        return m.conv(reflect(y))

    compiled, made = fuse(Net(body))
    with torch.no_grad():
        compiled(torch.randn(SHAPE))
    assert len(trunks.join(made[0].module)) == trunks_found


def test_half_precision_is_as_close_to_float64_as_eager():
    model = Net(lambda m, x: torch.tanh(m.conv(reflect(F.silu(m.norm(m.conv(reflect(x))))))) * 150 + 127.5)
    x = torch.randn(2, 4, 20, 24)
    exact = model.double()(x.double())
    model.half()
    compiled, _ = fuse(model)
    with torch.no_grad():
        ours, eager = compiled(x.half()), model(x.half())
    assert relative_error(ours, exact) <= 1.25 * relative_error(eager, exact)
