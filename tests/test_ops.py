"""The ops against plain float64 PyTorch, in every layout; on the GPU against its kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import IDS, SHAPES, check_side_outputs, picture, relative_error
from cases import LAYOUTS as MEMORY_FORMATS
from torch import Tensor

from sf_compile import ops

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONV_CASES = [
    # upsample, padding (l, r, t, b), mode, kernel, stride
    pytest.param(1, [1, 1, 1, 1], "reflect", 3, 1, id="reflect-3x3"),
    pytest.param(1, [4, 4, 4, 4], "reflect", 9, 1, id="reflect-9x9"),
    pytest.param(1, [1, 1, 1, 1], "zeros", 3, 2, id="own-zeros-3x3s2"),
    pytest.param(1, [0, 1, 0, 1], "zeros", 3, 2, id="same-zeros-3x3s2"),
    pytest.param(2, [1, 1, 1, 1], "reflect", 3, 1, id="up2-reflect-3x3"),
    pytest.param(3, [2, 1, 0, 3], "replicate", 2, 1, id="up3-replicate-2x2"),
    pytest.param(1, [0, 0, 0, 0], "zeros", 1, 1, id="1x1"),
]


def instance_norm_exact(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    x = x.double()
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + eps)
    if weight is not None:
        y = y * weight.double().view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.double().view(1, -1, 1, 1)
    y = y.relu() if activation == "relu" else y
    return y if residual is None else y + residual.double()


def eager_instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    if x.shape[2] * x.shape[3] == 1:  # eager refuses; the best it could do is rounding
        return instance_norm_exact(x, weight, bias, 1e-5, activation, residual).to(x.dtype)
    y = F.instance_norm(x, weight=weight, bias=bias)
    y = y.relu() if activation == "relu" else y
    return y if residual is None else y + residual


def conv2d_exact(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, ...] | None, eps: float,
    activation: str, residual: Tensor | None, upsample: int, padding: list[int], mode: str, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = x.double()
    if norm is not None:
        mean, variance, gamma, beta = (v.double().reshape(-1, x.shape[1], 1, 1) for v in norm)
        z = (z - mean) / torch.sqrt(variance + eps) * gamma + beta
    z = z.relu() if activation == "relu" else z
    z = z if residual is None else z + residual.double()
    padded = z.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    padded = F.pad(padded, padding, mode={"zeros": "constant"}.get(mode, mode))
    return F.conv2d(padded, weight.double(), None if bias is None else bias.double(), stride), z


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", SHAPES, ids=IDS)
def test_instance_norm_is_as_close_to_float64_as_eager(row, layout, device):
    for dtype, mean in itertools.product(DTYPES, (0.0, 100.0)):
        if dtype == torch.bfloat16 and mean:
            continue  # 100 sigma leaves bfloat16 two bits of signal: eager's error is all there is
        x = picture(row.shape, dtype, layout, device, mean)
        residual = picture(row.shape, dtype, layout, device)
        c = row.shape[1]
        weight, bias = torch.randn(c, device=device).to(dtype), torch.randn(c, device=device).to(dtype)
        for affine, activation, add in itertools.product((True, False), ("none", "relu"), (None, residual)):
            w, b = (weight, bias) if affine else (None, None)
            exact = instance_norm_exact(x, w, b, 1e-5, activation, add)
            out = ops.instance_norm(x, w, b, 1e-5, activation, add, layout == "channels_last")
            eager = eager_instance_norm(x, w, b, activation, add)
            assert out.is_contiguous(memory_format=MEMORY_FORMATS[layout])
            allowed = 1.25 * relative_error(eager, exact) + torch.finfo(dtype).eps
            assert relative_error(out, exact) <= allowed, (dtype, mean, affine, activation, add is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", SHAPES, ids=IDS)
def test_instance_statistics(row, layout, device):
    for dtype in (*DTYPES, torch.float64):
        x = picture(row.shape, dtype, layout, device, mean=0.0 if dtype == torch.bfloat16 else 100.0)
        mean, variance = ops.instance_statistics(x)
        exact_variance, exact_mean = torch.var_mean(x.double(), (2, 3), correction=0)
        assert mean.shape == variance.shape == row.shape[:2]
        assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(variance.double(), exact_variance, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("upsample", "padding", "mode", "kernel", "stride"), CONV_CASES)
def test_conv2d_matches_float64(upsample, padding, mode, kernel, stride, layout, device):
    for dtype, (n, c, h, w) in itertools.product(DTYPES, ((1, 16, 12, 11), (3, 3, 9, 14))):
        x, residual = (picture((n, c, h, w), dtype, layout, device) for _ in range(2))
        weight = (torch.randn(8, c, kernel, kernel, device=device) / (c * kernel * kernel) ** 0.5).to(dtype)
        bias, gamma, beta = (torch.randn(k, device=device).to(dtype) for k in (8, c, c))
        mean, variance = ops.instance_statistics(x)
        for norm, activation, add, keep in (
            (None, "none", None, False),
            ((mean, variance, gamma, beta), "relu", None, True),
            ((mean, variance, gamma, beta), "none", residual, True),
            ((mean[0], variance[0], gamma, beta), "relu", residual, False),
        ):
            for statistics, channels_last in itertools.product((True, False), repeat=2):
                arguments = norm or (None, None, None, None)
                out, out_mean, out_variance, kept = ops.conv2d(
                    x, weight, bias, *arguments, 1e-3, activation, add, upsample, padding, mode,
                    [stride, stride], "none", statistics, keep, channels_last,
                )  # fmt: skip
                exact, z = conv2d_exact(
                    x, weight, bias, norm, 1e-3, activation, add, upsample, padding, mode, stride
                )
                tolerance = 8 * torch.finfo(dtype).eps
                if dtype == torch.float32:
                    tolerance = 2e-3 if device == "cuda" else 1e-5  # TF32 on a GPU
                assert relative_error(out, exact) < tolerance
                check_side_outputs((out, out_mean, out_variance, kept), z if keep else None, statistics)


def conv2d_arguments(x: Tensor, channels_last: bool) -> tuple:
    c = x.shape[1]
    mean, variance = (t.detach().requires_grad_() for t in ops.instance_statistics(x))
    vector = lambda k: torch.randn(k, dtype=x.dtype, device=x.device, requires_grad=True)  # noqa: E731
    weight = torch.randn(4, c, 3, 3, dtype=x.dtype, device=x.device, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_()
    return (
        x, weight, vector(4), mean, variance, vector(c), vector(c), 1e-5, "relu", residual, 2, [1, 1, 2, 1],
        "reflect", [2, 1], "relu", True, True, channels_last,
    )  # fmt: skip


def op_calls(device: str, dtype: torch.dtype, layout: str) -> list[tuple]:
    channels_last = layout == "channels_last"
    x = picture((2, 3, 6, 7), dtype, layout, device).requires_grad_()
    weight, bias = (torch.randn(3, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    residual = picture((2, 3, 6, 7), dtype, layout, device).requires_grad_()
    mean, variance = (t.detach().requires_grad_() for t in ops.instance_statistics(x))
    running = (mean[0].detach(), variance[0].detach())
    plain = (x, torch.randn(4, 3, 3, 3, dtype=dtype, device=device), None, *(None,) * 4, 1.0, "none", None)
    return [
        (ops.instance_statistics, (x,)),
        (ops.instance_norm, (x, weight, bias, 1e-5, "relu", residual, channels_last)),
        (ops.instance_norm, (x, None, None, 1e-5, "none", None, channels_last)),
        (ops.normalize, (x, mean, variance, weight, bias, 1e-5, "relu", residual, channels_last)),
        (ops.normalize, (x, *running, weight, bias, 1e-5, "none", None, channels_last)),
        (ops.normalize, (x, None, None, None, None, 1.0, "relu", residual, not channels_last)),
        (ops.conv2d, conv2d_arguments(x, channels_last)),
        (ops.conv2d, (*plain, 1, [1, 1, 1, 1], "zeros", [1, 1], "none", False, False, channels_last)),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(8))
def test_opcheck(index, layout, device):
    dtype = torch.float32
    op, arguments = op_calls(device, dtype, layout)[index]
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(8))
def test_gradcheck_in_float64(index, layout, device):
    op, arguments = op_calls(device, torch.float64, layout)[index]
    # cuDNN's float64 weight gradient differs in the last bits from run to run.
    assert torch.autograd.gradcheck(op, arguments, nondet_tol=1e-10 if device == "cuda" else 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_reach_the_output_as_in_eager(device):
    x = torch.randn(1, 2, 4, 4, device=device)
    x[0, 1, 2, 3] = float("nan")
    out = ops.instance_norm(x, None, None, 1e-5, "relu")
    eager = F.relu(F.instance_norm(x))
    assert torch.equal(out.isnan(), eager.isnan())
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_nan_reaches_no_more_weights_than_in_eager(layout, device):
    """The taps that see nothing but zero padding keep their gradient of 0, where eager's do."""
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    x = torch.randn(1, 32, 2, 2, device=device, dtype=dtype)
    x = x.contiguous(memory_format=MEMORY_FORMATS[layout])
    weight = torch.randn(5, 32, 3, 3, device=device, dtype=dtype, requires_grad=True)
    norm = (None,) * 4
    fused = ops.conv2d(
        x, weight, None, *norm, 1.0, "none", None, 1, [1] * 4, "zeros", [2, 2], "none", False, False,
        layout == "channels_last",
    )[0]  # fmt: skip
    both = fused, F.conv2d(x, weight, stride=2, padding=1)
    ours, eager = (torch.autograd.grad(y, weight, torch.full_like(y, torch.nan))[0].isnan() for y in both)
    assert ours.any() and not (ours & ~eager).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channels_give_the_bias(layout, device):
    for dtype in DTYPES:
        x = torch.full((2, 4, 8, 8), 200.0, dtype=dtype, device=device)
        x = x.contiguous(memory_format=MEMORY_FORMATS[layout])
        bias = torch.arange(4.0, device=device).to(dtype)
        out = ops.instance_norm(x, torch.ones_like(bias), bias, 1e-5, "none", None, layout == "channels_last")
        assert torch.equal(out, bias.view(1, 4, 1, 1).expand_as(out))


BAD_CALLS = [
    (lambda x: ops.instance_norm(x[0], None, None, 1e-5), "must be (N, C, H, W)"),
    (lambda x: ops.instance_norm(x.int(), None, None, 1e-5), "float16, bfloat16, float32 or float64"),
    (lambda x: ops.instance_norm(x, torch.ones(5), None, 1e-5), "weight must be (3,)"),
    (lambda x: ops.instance_norm(x, None, None, 1e-5, "tan"), "activation must be one of none, relu"),
    (lambda x: ops.normalize(x, *(None,) * 4, 1.0, "clamp(0.0)"), "activation must be clamp of 2 numbers"),
    (lambda x: ops.instance_norm(x, None, None, 1e-5, "none", x[:, :1]), "residual (2, 1, 6, 7)"),
    (lambda x: ops.instance_norm(x, None, None, 1e-5, "none", x.double()), "residual is torch.float64"),
    (lambda x: ops.normalize(x, torch.ones(2, 3), None, None, None, 1e-5), "given together"),
    (lambda x: ops.normalize(x, torch.ones(4, 3), torch.ones(4, 3), None, None, 1e-5), "mean (4, 3)"),
    (lambda x: ops.normalize(x, None, None, torch.ones(3), None, 1e-5), "needs mean and variance"),
    (lambda x: conv_call(x, padding=[7, 0, 0, 0], mode="reflect"), "must be smaller than the picture"),
    (lambda x: conv_call(x, padding=[-1, 0, 0, 0]), "4 sizes of 0 or more"),
    (lambda x: conv_call(x, mode="circular"), "padding_mode must be one of"),
    (lambda x: conv_call(x, upsample=0), "upsample must be 1 or more"),
    (lambda x: conv_call(x, kernel=9), "larger than the padded picture"),
    (lambda x: conv_call(x, channels=4), "weight must be (out, 3, kh, kw)"),
    (lambda x: conv_call(x, keep=True), "keep_input needs"),
]


def conv_call(x, padding=(0, 0, 0, 0), mode="zeros", upsample=1, kernel=3, channels=3, keep=False):
    weight = torch.randn(2, channels, kernel, kernel, device=x.device)
    return ops.conv2d(
        x, weight, None, None, None, None, None, 1.0, "none", None, upsample, list(padding), mode, [1, 1],
        "none", False, keep, False,
    )  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_arguments_say_what_was_wrong_on_real_and_fake_tensors(call, message):
    x = torch.randn(2, 3, 6, 7)
    with pytest.raises(RuntimeError, match="styleforge::") as error:
        call(x)
    assert message in str(error.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(RuntimeError) as error:
            call(fake)
    assert message in str(error.value)


@pytest.mark.parametrize("device", DEVICES)
def test_overlapping_and_strided_inputs_are_read_right(device):
    base = torch.randn(2, 6, 16, 20, device=device)
    for x in (base[:, ::2], base[:, :3, ::2, ::3], base.transpose(2, 3), base[:, :1].expand(2, 6, 16, 20)):
        out = ops.instance_norm(x, None, None, 1e-5)
        assert relative_error(out, instance_norm_exact(x, None, None, 1e-5, "none", None)) < 1e-5


def test_rows_that_32_bits_cannot_count_are_left_to_pytorch(monkeypatch):
    from sf_compile.cuda import normalization

    monkeypatch.setattr(normalization, "usable_or_warn", lambda: True)
    x = torch.empty((1, 64, 4, 2**20), dtype=torch.float16, device="meta")
    assert normalization.usable(x)
    assert normalization.usable(x, 2**24 - 1)
    assert not normalization.usable(x, 2**24)
    assert not normalization.usable(torch.empty((1, 64, 4, 2**25), dtype=torch.float16, device="meta"))
