"""Statistics of groups, unbiased and with an eps beside the root; weights and biases of each image."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import picture, relative_error
from torch import Tensor

from sf_compile import ops

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = ("contiguous", "channels_last")
FORMS = list(itertools.product((None, 1, 2, 6), (0.0, 1.0), (None, 1e-9, 1e-2)))


def exact(x: Tensor, groups: int | None, correction: float, outer_eps: float | None) -> tuple[Tensor, Tensor]:
    """In float64, from the pixels."""
    pixels = x.double().reshape(x.shape[0], groups or x.shape[1], -1)
    variance, mean = torch.var_mean(pixels, 2, correction=correction)
    if outer_eps is not None:
        variance = (variance.sqrt() + outer_eps).square()
    repeats = x.shape[1] // pixels.shape[1]
    return mean.repeat_interleave(repeats, 1), variance.repeat_interleave(repeats, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("groups", "correction", "outer_eps"), FORMS)
def test_statistics_are_those_of_the_pixels(groups, correction, outer_eps, device):
    for shape in ((2, 6, 3, 3), (1, 600, 2, 5), (3, 6, 16, 9)):
        for dtype in (torch.float32, torch.float64):
            # Channels far from zero, and from each other.
            offsets = 100 + torch.arange(shape[1], dtype=torch.float64).view(1, -1, 1, 1)
            x = (picture(shape, torch.float64, "contiguous") + offsets).to(dtype).to(device)
            own = ops.instance_statistics(x)
            mean, variance = ops.norm_statistics(x, *own, groups, correction, outer_eps)
            right = exact(x, groups, correction, outer_eps)
            assert mean.dtype == variance.dtype == dtype and mean.is_contiguous() and variance.is_contiguous()
            tolerance = 1e-5 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(mean.double(), right[0], rtol=tolerance, atol=0)
            torch.testing.assert_close(variance.double(), right[1], rtol=10 * tolerance, atol=0)
            again = ops.norm_statistics(x, *own, groups, correction, outer_eps)
            assert torch.equal(mean, again[0]) and torch.equal(variance, again[1])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_divide_by_is_nan_and_a_constant_picture_keeps_its_digits(device):
    x = torch.full((1, 2, 1, 1), 3.0, device=device)
    own = ops.instance_statistics(x)
    assert ops.norm_statistics(x, *own, None, 1.0, None)[1].isnan().all()
    x = torch.full((1, 2, 8, 8), 200.0, device=device)
    mean, variance = ops.norm_statistics(x, *ops.instance_statistics(x), None, 1.0, 1e-9)
    assert ops.normalize(x, mean, variance, None, None, 0.0).abs().max() <= 1e-4
    _, variance = ops.norm_statistics(x, *ops.instance_statistics(x), None, 1.0, None)
    assert ops.normalize(x, mean, variance, None, None, 0.0).isnan().all()


def calls(device: str, dtype: torch.dtype) -> list[tuple]:
    x = picture((2, 6, 4, 5), dtype, "contiguous", device)
    own = tuple(t.requires_grad_() for t in ops.instance_statistics(x))
    weight = torch.randn(2, 12, dtype=dtype, device=device)[:, :6].requires_grad_()
    bias = torch.randn(6, dtype=dtype, device=device, requires_grad=True)
    image = x.clone().requires_grad_()
    kernel = torch.randn(4, 6, 3, 3, dtype=dtype, device=device)
    return [
        (ops.norm_statistics, (x, *own, None, 1.0, None)),
        (ops.norm_statistics, (x, *own, 2, 0.0, 1e-2)),
        (ops.norm_statistics, (x, *own, 1, 1.0, 1e-2)),
        (ops.normalize, (image, *own, weight, bias, 1e-5, "none")),
        (ops.instance_norm, (image, weight, bias, 1e-5)),
        (ops.conv2d, (
            image, kernel, None, *own, weight, bias, 1e-5, "none", None, 1, [1, 1, 1, 1], "reflect", [1, 1],
            "none", True, True, False,
        )),
    ]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(6))
def test_opcheck(index, device):
    op, arguments = calls(device, torch.float32)[index]
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(6))
def test_gradcheck(index, device):
    op, arguments = calls(device, torch.float64)[index]
    assert torch.autograd.gradcheck(op, arguments, nondet_tol=1e-10 if device == "cuda" else 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: ops.norm_statistics(x, m, m, 4), "4 groups of 6 channels"),
        (lambda x, m: ops.norm_statistics(x, m, m.double()), "must be (2, 6) in torch.float32"),
        (lambda x, m: ops.norm_statistics(x, m[0], m[0]), "must be (2, 6) in torch.float32"),
        (lambda x, m: ops.norm_statistics(x, m[:, :5], m[:, :5]), "must be (2, 6) or (6,)"),
        (lambda x, m: ops.norm_statistics(x[0], m, m), "must be (N, C, H, W)"),
        (lambda x, m: ops.normalize(x, m, m, m[:1], None, 1e-5), "weight must be (6,) or (2, 6)"),
        (lambda x, m: ops.instance_norm(x, None, m[:, :5], 1e-5), "bias must be (6,) or (2, 6), got (2, 5)"),
    ],
)
def test_bad_arguments_say_what_was_wrong(call, message):
    with pytest.raises(RuntimeError) as error:
        call(torch.randn(2, 6, 4, 5), torch.rand(2, 6))
    assert message in str(error.value)


def affines(n: int, c: int, dtype: torch.dtype, device: str) -> list[tuple[Tensor | None, Tensor | None]]:
    """Weights and biases per image, strided, shared by some, in float32, and not dense."""
    both = torch.randn(n, 2 * c, device=device).to(dtype)
    one = torch.randn(c, device=device).to(dtype)
    return [
        (both[:, :c], both[:, c:]),
        (both[:, c:].contiguous(), one),
        (None, both[:, :c]),
        (one.expand(n, c), None),
        (both[:, :c].float(), both[:, c:].float()),
        (both[:, ::2], both[:, 1::2]),
    ]


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, outer_eps: float | None) -> Tensor:
    mean, variance = (v[..., None, None] for v in exact(x, None, 0.0, outer_eps))
    y = (x.double() - mean) / (variance + (1e-5 if outer_eps is None else 0.0)).sqrt()
    y = y if weight is None else y * weight.double().reshape(-1, x.shape[1], 1, 1)
    return y if bias is None else y + bias.double().reshape(-1, x.shape[1], 1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 8, 6, 10), (2, 5, 7, 9), (3, 64, 40, 33)])
def test_weight_and_bias_of_each_image(shape, layout, device):
    channels_last = layout == "channels_last"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = picture(shape, dtype, layout, device)
        statistics = ops.instance_statistics(x)
        tolerance = 4 * torch.finfo(dtype).eps
        for weight, bias in affines(*shape[:2], dtype, device):
            for channels_last_out in (channels_last, not channels_last):
                right = normalized(x, weight, bias, None)
                for out in (
                    ops.instance_norm(x, weight, bias, 1e-5, "none", None, channels_last_out),
                    ops.normalize(x, *statistics, weight, bias, 1e-5, "none", None, channels_last_out),
                ):
                    assert relative_error(out, right) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "kernel", "padding", "upsample", "stride", "residual"),
    [
        pytest.param((64, 64), 3, 1, 1, 1, False, id="halo"),
        pytest.param((64, 64), 3, 1, 1, 1, True, id="halo-residual"),
        pytest.param((64, 128), 3, 1, 1, 2, False, id="halo-stride-2"),
        pytest.param((128, 64), 3, 1, 2, 1, False, id="halo-upsampled"),
        pytest.param((32, 3), 9, 4, 1, 1, False, id="last"),
        pytest.param((12, 5), 3, 1, 1, 1, False, id="cudnn"),
    ],
)
def test_convolution_behind_such_a_norm(channels, kernel, padding, upsample, stride, residual, device):
    c, o = channels
    size = (24, 40) if device == "cuda" else (10, 12)
    for dtype in (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32,):
        x = picture((3, c, *size), dtype, "channels_last", device)
        add = picture((3, c, *size), dtype, "channels_last", device) if residual else None
        own = ops.instance_statistics(x)
        statistics = ops.norm_statistics(x, *own, None, 1.0, 1e-5)
        weight = (torch.randn(o, c, kernel, kernel, device=device) / (c * kernel * kernel) ** 0.5).to(dtype)
        for gamma, beta in affines(3, c, dtype, device):
            z = normalized_unbiased(x, gamma, beta).relu()
            z = z if add is None else z + add.double()
            z = z.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
            z = torch.nn.functional.pad(z, [padding] * 4, mode="reflect")
            right = torch.nn.functional.conv2d(z, weight.double(), None, stride)
            out, mean, _, _ = ops.conv2d(
                x, weight, None, *statistics, gamma, beta, 0.0, "relu", add, upsample, [padding] * 4,
                "reflect", [stride, stride], "none", o > 4, False, True,
            )  # fmt: skip
            assert relative_error(out, right) < 8 * torch.finfo(dtype).eps
            if o > 4:
                torch.testing.assert_close(mean.double(), out.double().mean((2, 3)), rtol=1e-4, atol=1e-4)


def normalized_unbiased(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean, variance = (v[..., None, None] for v in exact(x, None, 1.0, 1e-5))
    y = (x.double() - mean) / variance.sqrt()
    y = y if weight is None else y * weight.double().reshape(-1, x.shape[1], 1, 1)
    return y if bias is None else y + bias.double().reshape(-1, x.shape[1], 1, 1)
