"""What csrc/halo_conv.cu computes on compute capability 9.0, against float64 and eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from halo_layers import (
    BARE,
    BFLOAT16,
    CASES,
    DOUBLING,
    FLOAT32,
    GENERAL,
    HALVING,
    IDS,
    KEEP,
    LARGE_SKIP,
    PLAIN,
    SKIP,
    SMALL_DOUBLING,
    check,
    check_margins,
    compile_all,
    equal,
    far_from_zero,
    fused,
    made,
    run,
    steps,
)

from sf_compile import ops
from sf_compile.cuda import convolution, halo_conv
from sf_compile.cuda.loader import loaded

NAN, INFINITY = float("nan"), float("inf")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]


@pytest.fixture(scope="module")
def compiled(hopper_kernels):
    layers = [(layer, torch.float16) for layer, _, _ in CASES]
    layers += [(layer, torch.bfloat16) for layer in BFLOAT16]
    compile_all(layers + [(layer, torch.float32) for layer in FLOAT32])


@pytest.mark.parametrize(("layer", "size", "why"), CASES, ids=IDS)
def test_against_float64(layer, size, why):
    check(made(layer, size))


@pytest.mark.parametrize("size", [(1, 37, 53), (2, 16, 64), (3, 9, 33)])
@pytest.mark.parametrize("layer", BFLOAT16, ids=["plain", "skip", "halving", "doubling"])
def test_bfloat16(layer, size):
    check(made(layer, size, torch.bfloat16))


@pytest.mark.parametrize("size", [(1, 37, 53), (2, 16, 64), (3, 9, 33)])
@pytest.mark.parametrize("layer", FLOAT32, ids=[str(i) for i in range(len(FLOAT32))])
def test_float32_in_tf32(layer, size):
    check(made(layer, size, torch.float32))


@pytest.mark.parametrize("layer", [PLAIN, BARE])
def test_float32_where_tf32_is_forbidden(layer, monkeypatch):
    a = made(layer, (2, 37, 53), torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "TF32" in halo_conv.refusal(a) and convolution.choice(a) == (None, False, False)
    exact, eager = (steps(a, dtype)[0] for dtype in (torch.float64, torch.float32))
    assert relative_error(ops.conv2d(*a)[0], exact) <= 1.25 * relative_error(eager, exact)
    monkeypatch.undo()
    assert convolution.choice(a) == (halo_conv, False, False)


def test_the_fused_kernel_is_what_runs():
    for layer in (PLAIN, LARGE_SKIP, DOUBLING):
        a = made(layer, (1, 16, 32))
        run(a)
        constants = tuple(sorted(halo_conv._variant(fused(a)).constants().items()))
        assert any(
            kernel.key.source == halo_conv.SOURCE and kernel.key.constants == constants for kernel in loaded()
        )
    a = made(LARGE_SKIP, (1, 16, 32))
    assert "pass of its own" in halo_conv.refusal(a)


@pytest.mark.parametrize("layer", [KEEP, SKIP, HALVING, DOUBLING, SMALL_DOUBLING, GENERAL])
@pytest.mark.parametrize("size", [(1, 5, 6), (2, 37, 53), (1, 16, 64), (1, 9, 33)])
def test_writes_nothing_beside_its_outputs(layer, size, monkeypatch):
    a = fused(made(layer, size))
    check_margins(a, run(a), monkeypatch)


# ---- statistics that are hard to take, and numbers that are not finite ------------------------------------


def test_mean_of_100_deviations():
    a = far_from_zero(made(BARE, (2, 64, 96)))
    _, mean, variance, _ = run(a)
    exact_variance, exact_mean = torch.var_mean(steps(a, torch.float64)[0], (2, 3), correction=0)
    assert (exact_mean > 50 * exact_variance.sqrt()).all()
    assert ((mean - exact_mean).abs() <= 5e-3 * exact_variance.sqrt()).all()
    assert ((variance / exact_variance - 1).abs() <= 5e-3).all()


@pytest.mark.parametrize("layer", [PLAIN, DOUBLING, HALVING])
def test_input_of_a_mean_of_100_deviations(layer):
    a = made(layer, (2, 37, 53))
    x = (128 + torch.randn(a.input.shape, device="cuda") * 1.28).half()
    x = x.contiguous(memory_format=torch.channels_last)
    variance, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    check(a._replace(input=x, mean=mean.float(), variance=variance.float()))


def test_constant_picture_has_no_variance():
    a = made(BARE, (2, 64, 96))
    a.input.fill_(0.7)
    out, mean, variance, _ = run(a)
    assert (out == out[:, :, :1, :1]).all()
    assert (variance >= 0).all() and (variance <= 1e-7 * (1 + mean.square())).all()


def reached(a):
    """Where the output has a pixel of z in its window that is not finite."""
    bad = (~steps(a, torch.float64)[1].isfinite()).half()
    finished = convolution._finished(a, bad)._replace(weight=torch.ones_like(a.weight), bias=None)
    return steps(finished, torch.float64)[0] > 0.5


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("pixel", [(0, 0), (20, 31), (36, 52)])
@pytest.mark.parametrize("layer", [BARE, PLAIN, SKIP, HALVING, DOUBLING])
def test_what_is_not_finite_shows_where_eager_shows_it(layer, pixel, value):
    a = made(layer, (2, 37, 53))
    clean = run(a)
    a.input[(1, 5, *pixel)] = value
    out, mean, variance, kept = run(a)
    bad = reached(a)
    assert bool(bad.any()) == (value != -INFINITY or not layer.relu)
    assert not out[bad].isfinite().any()
    assert torch.equal(out[~bad], clean[0][~bad]) or value == -INFINITY
    affected = bad.flatten(2).any(2)
    assert mean[affected].isnan().all() and variance[affected].isnan().all()
    assert not affected[0].any() and equal((mean[0], variance[0]), (clean[1][0], clean[2][0]))
    if layer.keep:
        exact_kept = steps(a, torch.float64)[1]
        assert torch.equal(kept.isnan(), exact_kept.isnan()) and torch.equal(kept.isinf(), exact_kept.isinf())
    a.input[(1, 5, *pixel)] = 0.0
    assert bool(run(a)[1].isfinite().all()), "the workspace is clean again"


def test_nan_statistics_and_nan_passing_both_relus():
    a = made(PLAIN, (2, 20, 40))
    a.mean[1, 3] = NAN
    out, mean, variance, _ = run(a)
    assert out[1].isnan().all() and mean[1].isnan().all() and variance[1].isnan().all()
    assert out[0].isfinite().all() and mean[0].isfinite().all() and variance[0].isfinite().all()
    a = made(GENERAL, (1, 30, 50))
    a.input[0, 7, 11, 13] = NAN
    out, bad = run(a)[0], reached(a)
    assert torch.equal(out.isnan(), bad) and bad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", BFLOAT16, ids=["plain", "skip", "halving", "doubling"])
def test_large_weights_are_no_less_finite_than_eagers(layer, dtype):
    a = made(layer, (2, 37, 53), dtype)
    a.weight.mul_(100)
    check(a)
    a.weight.mul_(100)  # float16 overflows here and there
    out, mean, variance, _ = run(a)
    eager, exact = steps(a, dtype)[0], steps(a, torch.float64)[0]
    # Close to the limit either may round to infinity.
    certain = eager.isfinite() & (exact.abs() < 0.99 * torch.finfo(dtype).max)
    assert out[certain].isfinite().all() and not out.isnan().any()
    whole = out.isfinite().all(3).all(2)  # statistics are those of what is written
    assert mean[whole].isfinite().all() and variance[whole].isfinite().all()
    assert not mean[~whole].isfinite().any()


@pytest.mark.parametrize("layer", BFLOAT16, ids=["plain", "skip", "halving", "doubling"])
def test_the_fake_kernel_describes_what_is_returned(layer):
    results = torch.library.opcheck(
        torch.ops.styleforge.conv2d.default,
        tuple(made(layer, (2, 37, 53))),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}
