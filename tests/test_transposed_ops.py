"""``styleforge::conv2d`` with ``transposed``: against float64, its gradient, and how halo_conv.cu runs it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, check_side_outputs, picture, relative_error
from test_activations import FUNCTIONS
from test_halo_conv import COUNTS, enlarged_by, variant
from torch import Tensor

from sf_compile import ops
from sf_compile.cuda import convolution, first_conv, halo_conv, halo_variant, hopper, last_conv
from sf_compile.ops.conv2d_arguments import Arguments

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
# kernel, stride, padding (l, r, t, b), why
CASES = [
    ((3, 3), (2, 2), [1, 0, 1, 0], "padding 1 and output_padding 1"),
    ((4, 4), (2, 2), [1, 1, 1, 1], "padding 1"),
    ((3, 3), (2, 2), [0, 1, 0, 1], "TensorFlow's, cropped at the end"),
    ((2, 2), (2, 2), [0, 0, 0, 0], "a pixel becomes four"),
    ((3, 3), (1, 1), [1, 1, 1, 1], "stride 1"),
    ((3, 5), (2, 3), [4, -1, 0, 2], "every side its own, more than PyTorch's padding cuts off"),
    ((2, 3), (3, 2), [0, 0, 2, -2], "rows behind the whole result"),
    ((1, 1), (2, 2), [0, -1, 0, -1], "a kernel of 1 with gaps"),
]
IDS = [why.replace(" ", "-") for *_, why in CASES]
SEES_TWO = [(4, 1, 1), (3, 1, 0), (3, 0, 1), (2, 0, 0), (2, 1, -1), (1, 0, -1)]  # taps, before, after


def whole_and_cut(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> Tensor:
    """By its definition: every pixel adds its own picture of the kernel; float64, (N, O, H', W')."""
    (n, _, h, w), (_, o, kh, kw) = x.shape, weight.shape
    left, right, top, bottom = padding
    rows, columns = (h - 1) * stride[0] + kh, (w - 1) * stride[1] + kw
    out = torch.zeros(n, o, rows + max(-bottom, 0), columns + max(-right, 0), dtype=torch.float64)
    out = out.to(x.device)
    for y, x_ in itertools.product(range(h), range(w)):
        pictures = torch.einsum("nc,cokl->nokl", x[:, :, y, x_].double(), weight.double())
        out[:, :, y * stride[0] : y * stride[0] + kh, x_ * stride[1] : x_ * stride[1] + kw] += pictures
    if bias is not None:
        out += bias.double().view(-1, 1, 1)
    return out[:, :, top : rows - bottom, left : columns - right]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "why"), CASES, ids=IDS)
def test_matches_float64(kernel, stride, padding, why, layout, device):
    for dtype, (n, c, h, w) in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), ((1, 16, 5, 4), (3, 3, 4, 7))
    ):
        x, residual = (picture((n, c, h, w), dtype, layout, device) for _ in range(2))
        weight = (torch.randn(c, 8, *kernel, device=device) / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype)
        bias, gamma, beta = (torch.randn(k, device=device).to(dtype) for k in (8, c, c))
        mean, variance = ops.instance_statistics(x)
        for norm, add, activation, upsample, statistics, channels_last in (
            ((None,) * 4, None, "none", 1, True, False),
            ((mean, variance, gamma, beta), residual, "relu", 1, True, True),
            ((mean[0], variance[0], gamma, beta), None, "none", 2, False, True),
        ):
            keep = add is not None
            out, out_mean, out_variance, kept = ops.conv2d(
                x, weight, bias, *norm, 1e-3, activation, add, upsample, padding, "zeros", stride, "none",
                statistics, keep, channels_last, True,
            )  # fmt: skip
            z = x.double()
            if norm[0] is not None:
                m, v, g, b = (t.double().reshape(-1, c, 1, 1) for t in norm)
                z = (z - m) / torch.sqrt(v + 1e-3) * g + b
            z = z.relu() if activation == "relu" else z
            z = z if add is None else z + add.double()
            enlarged = z.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
            exact = whole_and_cut(enlarged, weight, bias, stride, padding)
            tolerance = 8 * torch.finfo(dtype).eps
            if dtype == torch.float32:
                tolerance = 2e-3 if device == "cuda" else 1e-5  # TF32 on a GPU
            assert out.shape == exact.shape
            assert relative_error(out, exact) < tolerance
            check_side_outputs((out, out_mean, out_variance, kept), z if keep else None, statistics)


def calls(device: str, dtype: torch.dtype, layout: str) -> list[tuple]:
    channels_last = layout == "channels_last"
    x = picture((2, 3, 3, 4), dtype, layout, device).requires_grad_()
    mean, variance = (t.detach().requires_grad_() for t in ops.instance_statistics(x))
    vector = lambda k: torch.randn(k, dtype=dtype, device=device, requires_grad=True)  # noqa: E731
    weight = torch.randn(3, 2, 3, 4, dtype=dtype, device=device, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_()
    norm = (mean, variance, vector(3), vector(3), 1e-5, "relu", residual)
    return [
        (x, weight, vector(2), *norm, 1, [1, 1, 1, 0], "zeros", [2, 2], "none", True, True, channels_last,
         True),
        (x, weight, None, *norm, 2, [3, -1, 0, 2], "zeros", [1, 2], "relu", False, False, channels_last,
         True),
    ]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(2))
def test_opcheck_and_gradcheck(index, layout, device):
    results = torch.library.opcheck(ops.conv2d, calls(device, torch.float32, layout)[index])
    assert set(results.values()) == {"SUCCESS"}
    # cuDNN's float64 weight gradient differs in the last bits from run to run.
    tolerance = 1e-10 if device == "cuda" else 0.0
    arguments = calls(device, torch.float64, layout)[index]
    assert torch.autograd.gradcheck(ops.conv2d, arguments, nondet_tol=tolerance)


def call(x, padding=(0, 0, 0, 0), mode="zeros", weight=(3, 2, 3, 3), bias=None, stride=(2, 2)):
    return ops.conv2d(
        x, torch.randn(weight, device=x.device), bias, None, None, None, None, 1.0, "none", None, 1,
        list(padding), mode, list(stride), "none", False, False, False, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": (2, 3, 3, 3)}, "weight must be (3, out, kh, kw)"),
        ({"bias": torch.ones(3)}, "bias must be (2,)"),
        ({"mode": "reflect"}, "has no padding 'reflect'"),
        ({"padding": [-1, 0, 0, 0]}, "has no padding 'zeros' [-1, 0, 0, 0]"),
        ({"padding": [0, -2, 0, 0]}, "has no padding 'zeros' [0, -2, 0, 0]"),
        ({"padding": [0, 0, 7, 6]}, "cuts off all of 13 x 15"),
        ({"stride": [0, 1]}, "stride must be 2 numbers of 1 or more"),
    ],
)
def test_bad_arguments_say_what_was_wrong(changes, message):
    x = torch.randn(2, 3, 6, 7)
    with pytest.raises(RuntimeError, match="styleforge::") as error:
        call(x, **changes)
    assert message in str(error.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(RuntimeError) as error:
            call(fake, **changes)
    assert message in str(error.value)


# ---- as halo_conv.cu runs it -------------------------------------------------------------------------------


def exact_of(x: Tensor, weight: Tensor, tops: tuple[int, int], lefts: tuple[int, int]) -> Tensor:
    return whole_and_cut(x, weight, None, (2, 2), [*lefts, *tops])


@pytest.mark.parametrize(("channels", "out_channels"), COUNTS)
def test_packed_weights(channels, out_channels):
    """Whole numbers, so that float64 is exact in any order; tops and lefts of different kernels."""
    v = variant(channels, out_channels, subpixel=True, pad=1)
    x = torch.randint(-9, 10, (1, channels, 3, 4)).double()
    padded = F.pad(x, [1] * 4)[0]
    for (kh, top, below), (kw, left, right) in zip(SEES_TWO, SEES_TWO[1:] + SEES_TWO[:1], strict=True):
        weight = torch.randint(-9, 10, (channels, out_channels, kh, kw)).double()
        out = enlarged_by(v, halo_variant.pack_transposed(v, top, left, weight), padded)
        assert torch.equal(out, exact_of(x, weight, (top, below), (left, right))[0])


@pytest.mark.parametrize("kernel", range(1, 7))
def test_every_padding_that_fits_is_admitted_and_no_other(kernel):
    """A window of two pixels holds all that an output pixel sees, if and only if ``_sees_two`` says so."""
    size = 6
    for before, after in itertools.product(range(5), range(-1, 5)):
        if (size - 1) * 2 + kernel - before - after != 2 * size:
            assert not halo_conv._sees_two(kernel, before, after)
            continue
        fits = True
        for at in range(2 * size):
            y, p = divmod(at, 2)
            sources = {i for i in range(size) for tap in range(kernel) if 2 * i + tap - before == at}
            fits = fits and sources <= {y - 1 + p, y + p}
        assert fits == halo_conv._sees_two(kernel, before, after)
    admitted = [(t, b) for k, t, b in SEES_TWO if k == kernel]
    assert all(halo_conv._sees_two(kernel, t, b) for t, b in admitted) and (admitted or kernel > 4)


def arguments(c=64, o=64, kernel=(4, 4), padding=(1, 1, 1, 1), **changes) -> Arguments:
    x = torch.zeros(1, c, 16, 32).half().contiguous(memory_format=torch.channels_last)
    plain = Arguments(
        x, torch.zeros(c, o, *kernel).half(), None, None, None, None, None, 1e-5, "none", None, 1,
        list(padding), "zeros", [2, 2], "none", True, False, True, True,
    )  # fmt: skip
    return plain._replace(**changes)


@pytest.fixture
def as_on_hopper(monkeypatch):
    for kernel in (hopper, first_conv, last_conv):
        monkeypatch.setattr(kernel, "refusal", lambda a: None)
    monkeypatch.setattr(halo_conv, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(convolution, "_choices", {})


@pytest.mark.usefixtures("as_on_hopper")
def test_what_the_kernel_takes():
    for (kh, top, below), (kw, left, right) in itertools.product(SEES_TWO, SEES_TWO):
        a = arguments(kernel=(kh, kw), padding=[left, right, top, below])
        assert halo_conv.refusal(a) is None
    for a, reason in (
        (arguments(padding=[1, 1, 0, 2]), "transposed 4x4 convolution padded by (1, 1, 0, 2)"),
        (arguments(padding=[1, 1, 1, 0]), "transposed 4x4"),
        (arguments(kernel=(3, 3)), "transposed 3x3"),
        (arguments(kernel=(5, 5), padding=[2, 1, 2, 1]), "transposed 5x5"),
        (arguments(kernel=(3, 3), stride=[1, 1]), "stride (1, 1)"),
        (arguments(upsample=2), "upsampling by 2"),
        (arguments(c=12), "multiples of 8"),
        (arguments(o=12), "multiples of 8"),
        (arguments(channels_last=False), "not channels_last"),
    ):
        refused = halo_conv.refusal(a)
        assert refused is not None and reason in refused


@pytest.mark.usefixtures("as_on_hopper")
def test_kernels_that_do_not_transpose_are_not_asked():
    """The others of the family refuse nothing here."""
    assert convolution.choice(arguments()) == (halo_conv, False, False)
    assert convolution.choice(arguments(padding=[0, 2, 0, 2])) == (None, False, False)
    plain = arguments(padding_mode="reflect", transposed=False, stride=[1, 1])
    assert convolution.choice(plain)[0] is last_conv


def test_one_kernel_for_every_width_of_a_transposed_convolution():
    made = {halo_conv._variant(arguments(kernel=(k, k), padding=[t, b, t, b])) for k, t, b in SEES_TWO}
    assert len(made) == 1
    (one,) = made
    assert (one.subpixel, one.pad, one.stride, one.out_channels) == (True, 1, 1, 64)
    assert halo_conv._variant(arguments(c=32, o=16)).out_channels == 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", FUNCTIONS)
def test_every_activation_behind_it(text, device):
    for dtype, layout in itertools.product((torch.float64, torch.float16), LAYOUTS):
        x = picture((2, 8, 5, 7), dtype, layout, device)
        weight, bias = (torch.randn(s, device=device).to(dtype) / 4 for s in ((8, 8, 3, 3), (8,)))
        out = ops.conv2d(
            x, weight, bias, *(None,) * 4, 1.0, "none", None, 1, [1, 0, 1, 0], "zeros", [2, 2], text, False,
            False, layout == "channels_last", True,
        )[0]  # fmt: skip
        plain = F.conv_transpose2d(x.double(), weight.double(), bias.double(), 2, 1, 1)
        assert relative_error(out, FUNCTIONS[text](plain)) < 8 * torch.finfo(dtype).eps
