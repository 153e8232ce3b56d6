"""PReLU, whose slope is a tensor: the op that takes it, where it is fused, and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import picture, relative_error
from graphs import SHAPE, capture, found, fuse
from networks import Net, reflect
from test_rewrite import assert_equal, assert_equal_gradients, assert_finished, gradients
from torch import Tensor, nn

from sf_compile import ops

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ("contiguous", "channels_last")


def normed(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance, weight, bias = (v.reshape(-1, x.shape[1], 1, 1) for v in (mean, variance, weight, bias))
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["one slope", "a slope for each channel"])
def test_the_op_is_as_close_to_float64_as_eager(shared, layout, device):
    last = layout == "channels_last"
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for dtype, shape in itertools.product(dtypes, ((2, 8, 12, 16), (1, 3, 7, 9), (1, 40, 30, 31))):
        x, residual = (picture(shape, dtype, layout, device) for _ in range(2))
        c = shape[1]
        weight, bias, slope = (torch.randn(k, device=device).to(dtype) for k in (c, c, 1 if shared else c))
        norm = (*ops.instance_statistics(x), weight, bias)
        for (activation, scale, offset), add, moves in itertools.product(
            (("prelu", 1, 0), ("prelu * 2.0 + -0.5", 2, -0.5)),
            (None, residual),
            ((), (2, [1, 1, 1, 1], "reflect"), (3, [0, 2, 1, 0], "zeros")),
        ):
            exact = scale * F.prelu(normed(*(v.double() for v in (x, *norm))), slope.double()) + offset
            eager = scale * F.prelu(normed(x, *norm).to(dtype), slope) + offset
            exact, eager = (y if add is None else y + add.to(y.dtype) for y in (exact, eager))
            factor, padding, mode = moves or (1, [0, 0, 0, 0], "zeros")
            exact = exact.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            exact = F.pad(exact, padding, mode="constant" if mode == "zeros" else mode)
            out = ops.normalize(x, *norm, 1e-5, activation, add, last, factor, padding, mode, slope)
            eager = eager.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            eager = F.pad(eager, padding, mode="constant" if mode == "zeros" else mode)
            allowed = 1.25 * relative_error(eager, exact) + torch.finfo(dtype).eps
            assert relative_error(out, exact) <= allowed, (dtype, shape, activation, add is not None, moves)


def calls(device: str, dtype: torch.dtype, layout: str) -> list[tuple]:
    x = picture((2, 3, 6, 7), dtype, layout, device).requires_grad_()
    weight, bias, slope, one = (
        torch.randn(k, dtype=dtype, device=device, requires_grad=True) for k in (3, 3, 3, 1)
    )
    residual = picture((2, 3, 6, 7), dtype, layout, device).requires_grad_()
    mean, variance = (t.detach().requires_grad_() for t in ops.instance_statistics(x))
    last = layout == "channels_last"
    norm = (mean, variance, weight, bias)
    return [
        (ops.normalize, (x, *norm, 1e-5, "prelu", residual, last, 2, [1, 0, 1, 2], "reflect", slope)),
        (ops.normalize, (x, *norm, 1e-5, "prelu * 2.0 + 1.0", None, last, 1, [0] * 4, "zeros", one)),
        (ops.normalize, (x, *(None,) * 4, 1.0, "prelu", None, not last, 1, [0] * 4, "zeros", slope)),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(3))
def test_opcheck_and_gradcheck(index, layout, device):
    op, arguments = calls(device, torch.float32, layout)[index]
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    op, arguments = calls(device, torch.float64, layout)[index]
    assert torch.autograd.gradcheck(op, arguments, nondet_tol=1e-10 if device == "cuda" else 0.0)


def call(activation: str, slope: Tensor | None) -> Tensor:
    x = torch.randn(2, 3, 6, 7)
    return ops.normalize(x, *(None,) * 4, 1.0, activation, None, False, 1, [0] * 4, "zeros", slope)


@pytest.mark.parametrize(
    ("activation", "slope", "message"),
    [
        ("prelu", None, "needs a slope"),
        ("relu", torch.ones(3), "has no slope"),
        ("prelu", torch.ones(4), "must be (1,) or (3,)"),
        ("prelu", torch.ones(1, 3), "must be (1,) or (3,)"),
        ("prelu", torch.ones(3).double(), "slope is torch.float64"),
    ],
)
def test_bad_arguments_say_what_was_wrong(activation, slope, message):
    with pytest.raises(RuntimeError) as error:
        call(activation, slope)
    assert "styleforge::normalize" in str(error.value) and message in str(error.value)


def test_the_ops_without_a_slope_do_not_take_a_prelu():
    x, weight = torch.randn(1, 3, 6, 7), torch.randn(2, 3, 3, 3)
    convolve = (1, [0] * 4, "zeros", [1, 1])
    for make in (
        lambda: ops.instance_norm(x, None, None, 1e-5, "prelu"),
        lambda: ops.conv2d(
            x, weight, *(None,) * 5, 1.0, "prelu", None, *convolve, "none", False, False, False
        ),
        lambda: ops.conv2d(
            x, weight, *(None,) * 5, 1.0, "none", None, *convolve, "prelu", False, False, False
        ),
    ):
        with pytest.raises(RuntimeError, match="needs a slope"):
            make()


BODIES = {
    "after a convolution's norm": (lambda m, x: m.prelu(m.norm(m.conv(reflect(x)))), ["pad+conv+norm+prelu"]),
    "after a norm alone": (lambda m, x: m.prelu(m.norm(x)), ["norm+prelu"]),
    "one slope": (lambda m, x: m.one(m.norm(m.same(x))), ["conv+norm+prelu"]),
    "after running statistics": (lambda m, x: m.prelu(m.running(m.same(x))) + x, ["conv+norm+prelu+add"]),
    "after a group norm": (lambda m, x: m.prelu(F.group_norm(x, 2)), ["norm+prelu"]),
    "as a function, with an ending": (
        lambda m, x: F.prelu(m.norm(m.same(x)), m.prelu.weight) * 2 + 1, ["conv+norm+prelu+affine"],
    ),
    "as a method, in a block": (
        lambda m, x: m.norm(m.conv(reflect(m.norm(m.conv(reflect(x))).prelu(m.prelu.weight)))) + x,
        ["pad+conv+norm+prelu", "pad+conv+norm+add"],
    ),
    "upsampled for a grouped convolution": (
        lambda m, x: F.conv2d(
            reflect(F.interpolate(m.prelu(m.norm(x)), scale_factor=2)), m.conv.weight[:, :1], groups=4
        ),
        ["norm+prelu+upsample+pad"],
    ),
    "without a norm": (lambda m, x: m.prelu(m.conv(reflect(x))), ["pad+conv"]),
    "in front of a convolution": (lambda m, x: m.conv(reflect(m.prelu(x))), ["pad+conv"]),
    "a slope made in the graph": (
        lambda m, x: F.prelu(m.norm(x), torch.sigmoid(m.prelu.weight)), ["norm+prelu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_where_a_prelu_goes(name):
    body, patterns = BODIES[name]
    model, x = Net(body), torch.randn(SHAPE, requires_grad=True)
    model.prelu, model.one = nn.PReLU(4), nn.PReLU()
    nn.init.normal_(model.prelu.weight)
    compiled, made = fuse(model)
    ours, theirs = compiled(x * 1.0), model(x * 1.0)
    assert_equal(ours, theirs)
    assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    assert found(made[0].analysis) == patterns
    assert_finished(made[0])


def test_it_is_finished_at_its_end_and_says_why():
    model = Net(lambda m, x: m.plain(m.conv(reflect(m.prelu(m.norm(m.conv(reflect(x))))))))
    model.prelu = nn.PReLU(4)
    (first, _) = capture(model, torch.randn(SHAPE)).plan.decisions
    assert first.finish == "here" and "the slope of its PReLU is a tensor" in first.why
