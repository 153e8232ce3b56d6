"""A finish that is upsampled and padded in its own pass, for readers that are no fused convolution."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, picture, relative_error
from graphs import found, fuse
from networks import Net, double, reflect
from test_rewrite import assert_equal, assert_equal_gradients, assert_finished, gradients
from torch import Tensor

from sf_compile import ops

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = (2, 4, 12, 10)
MOVES = [
    # upsample, padding (l, r, t, b), mode
    (1, [1, 1, 1, 1], "reflect"),
    (2, [0, 0, 0, 0], "zeros"),
    (2, [2, 1, 0, 3], "replicate"),
    (3, [1, 0, 2, 1], "zeros"),
    (2, [2, 3, 1, 1], "reflect"),
]
IDS = ["-".join(map(str, (factor, *padding, mode))) for factor, padding, mode in MOVES]

# ---- the op ------------------------------------------------------------------------------------------------


def exact(x: Tensor, norm, residual: Tensor | None, factor: int, padding, mode: str) -> Tensor:
    z = x.double()
    if norm is not None:
        mean, variance, gamma, beta = (v.double().reshape(-1, x.shape[1], 1, 1) for v in norm)
        z = ((z - mean) / torch.sqrt(variance + 1e-3) * gamma + beta).relu()
    z = z if residual is None else z + residual.double()
    z = z.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return F.pad(z, padding, mode={"zeros": "constant"}.get(mode, mode))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("factor", "padding", "mode"), MOVES, ids=IDS)
def test_op_matches_float64(factor, padding, mode, layout, device):
    for dtype, shape in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), ((1, 16, 12, 11), (3, 3, 9, 14))
    ):
        x, residual = (picture(shape, dtype, layout, device) for _ in range(2))
        gamma, beta = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
        norm = (*ops.instance_statistics(x), gamma, beta)
        for given, add, channels_last in (
            (norm, None, layout == "channels_last"),
            (norm, residual, layout != "channels_last"),
            (None, residual, layout == "channels_last"),
        ):
            arguments = (*(given or [None] * 4), 1e-3, "relu" if given else "none", add, channels_last)
            out = ops.normalize(x, *arguments, factor, padding, mode)
            expected = exact(x, given, add, factor, padding, mode)
            memory_format = LAYOUTS["channels_last" if channels_last else "contiguous"]
            assert out.shape == expected.shape and out.is_contiguous(memory_format=memory_format)
            assert relative_error(out, expected) < 2 * torch.finfo(dtype).eps
            still = ops.normalize(x, *arguments)
            moved = F.interpolate(still, scale_factor=float(factor)) if factor > 1 else still
            moved = F.pad(moved, padding, mode={"zeros": "constant"}.get(mode, mode))
            assert torch.equal(out, moved), "moving changes no bit"


def call(device: str, dtype: torch.dtype, layout: str, factor: int, padding: list[int], mode: str) -> tuple:
    x, residual = (picture((2, 3, 4, 5), dtype, layout, device).requires_grad_() for _ in range(2))
    mean, variance = (t.detach().requires_grad_() for t in ops.instance_statistics(x))
    weight, bias = (torch.randn(3, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    norm = (mean, variance, weight, bias, 1e-5, "relu")
    return (x, *norm, residual, layout == "channels_last", factor, padding, mode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("factor", "padding", "mode"), MOVES, ids=IDS)
def test_opcheck_and_gradcheck(factor, padding, mode, layout, device):
    results = torch.library.opcheck(ops.normalize, call(device, torch.float32, layout, factor, padding, mode))
    assert set(results.values()) == {"SUCCESS"}
    # (PyTorch adds the gradients of what a padding copies in any order.)
    tolerance = 1e-10 if device == "cuda" else 0.0
    arguments = call(device, torch.float64, layout, factor, padding, mode)
    assert torch.autograd.gradcheck(ops.normalize, arguments, nondet_tol=tolerance)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ((0, [0, 0, 0, 0], "zeros"), "upsample must be 1 or more"),
        ((1, [-1, 0, 0, 0], "zeros"), "4 sizes of 0 or more"),
        ((2, [0, 0, 0, 8], "reflect"), "must be smaller than the picture, 8 x 10"),
        ((1, [1, 1, 1, 1], "circular"), "padding_mode must be one of"),
    ],
)
def test_bad_moves_say_what_was_wrong(moves, message):
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="styleforge::normalize") as error:
        ops.normalize(x, None, None, None, None, 1.0, "relu", None, False, *moves)
    assert message in str(error.value)


# ---- in a graph --------------------------------------------------------------------------------------------


def grouped(m: Net, x: Tensor, **sizes) -> Tensor:
    return F.conv2d(x, m.conv.weight[:, :1], groups=4, **sizes)


# body, the patterns, and the fused ops that are left
FUSES = {
    "pad, depthwise": (
        lambda m, x: grouped(m, reflect(F.relu(m.norm(m.same(x))))),
        ["conv+norm+relu+pad"], ["conv2d", "normalize"],
    ),
    "between depthwise convolutions": (
        lambda m, x: grouped(m, reflect(F.relu(m.norm(grouped(m, reflect(x)))))),
        ["norm+relu+pad"], ["instance_statistics", "normalize"],
    ),
    "pad, dilated": (
        lambda m, x: F.conv2d(F.pad(m.plain(m.same(x)), [2] * 4, "replicate"), m.conv.weight, dilation=2),
        ["conv+norm+pad"], ["conv2d", "normalize"],
    ),
    "running statistics, without a convolution": (
        lambda m, x: grouped(m, F.pad(m.running(x).relu(), (1, 1, 1, 1))),
        ["norm+relu+pad"], ["normalize"],
    ),
    "an addition without a norm": (
        lambda m, x: grouped(m, reflect(m.conv(reflect(x)) + x)),
        ["pad+conv+add+pad"], ["conv2d", "normalize"],
    ),
    "upsample, pad, depthwise": (
        lambda m, x: grouped(m, reflect(double(F.relu(m.norm(m.same(x)))))),
        ["conv+norm+relu+upsample+pad"], ["conv2d", "normalize"],
    ),
    "upsample, concatenate": (
        lambda m, x: torch.cat([double(m.norm(m.down(x))), x], 1),
        ["conv+norm+upsample"], ["conv2d", "normalize"],
    ),
    "pad of two convolutions": (
        lambda m, x: (y := reflect(m.norm(m.same(x))), m.plain(m.conv(y)) + m.conv(y))[1],
        ["conv+norm+pad", "conv+norm+add"], ["conv2d", "normalize", "conv2d", "normalize"],
    ),
    "a pad that is returned": (
        lambda m, x: reflect(m.norm(m.same(x))), ["conv+norm+pad"], ["conv2d", "normalize"]
    ),
}  # fmt: skip


def fused_ops(rewritten) -> list[str]:
    nodes = rewritten.module.graph.nodes
    return [node.target._opname for node in nodes if str(node.target).startswith("styleforge.")]


@pytest.mark.parametrize("name", FUSES)
def test_fuses(name):
    body, patterns, expected = FUSES[name]
    model, x = Net(body), torch.randn(SHAPE, requires_grad=True)
    compiled, made = fuse(model)
    ours, theirs = compiled(x), model(x)
    assert_equal(ours, theirs)
    assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    (rewritten,) = made
    assert found(rewritten.analysis) == patterns and fused_ops(rewritten) == expected
    assert_finished(rewritten)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["upsample, pad, depthwise", "between depthwise convolutions"])
def test_layouts_and_sizes(name, layout):
    body, patterns, _ = FUSES[name]
    model = Net(body)
    compiled, made = fuse(model, dynamic=True)
    with torch.no_grad():
        for size in ((12, 10), (7, 9)):
            x = torch.randn(2, 4, *size).contiguous(memory_format=LAYOUTS[layout])
            assert_equal(compiled(x), model(x))
    assert len(made) == 1 and found(made[0].analysis) == patterns


# body, the patterns, and why the last step stays
STAYS = {
    "two readers": (
        lambda m, x: (y := m.norm(m.same(x)), grouped(m, reflect(y)) + y)[1], ["conv+norm"],
        "its reader is not a conv",
    ),
    "another mode": (
        lambda m, x: grouped(m, F.pad(m.norm(m.same(x)), (1, 1, 1, 1), "circular")), ["conv+norm"],
        "mode 'circular'",
    ),
    "bilinear": (
        lambda m, x: F.interpolate(m.norm(m.same(x)), scale_factor=2, mode="bilinear"), ["conv+norm"],
        "mode 'bilinear'",
    ),
    "nothing to finish": (
        lambda m, x: grouped(m, reflect(F.relu(m.conv(reflect(x))))), ["pad+conv+relu"],
        "its reader is not a conv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    body, patterns, reason = STAYS[name]
    model, x = Net(body), torch.randn(SHAPE)
    compiled, made = fuse(model)
    with torch.no_grad():
        assert_equal(compiled(x), model(x))
    assert found(made[0].analysis) == patterns
    assert any(reason in miss.reason for miss in made[0].analysis.matches.misses)


def test_a_switch_of_mode_in_between_keeps_them_apart():
    def body(m, x):
        y = m.norm(m.same(x))
        with torch.no_grad():
            return reflect(y)

    model, x = Net(body), torch.randn(SHAPE)
    compiled, made = fuse(model)
    assert_equal(compiled(x), model(x))
    assert found(made[0].analysis) == ["conv+norm"]
