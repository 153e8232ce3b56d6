"""The C++ convolutions of csrc/cpu, through the op: every form against float64 and the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LAYOUTS, picture, relative_error
from cpu_cases import DTYPES, built, norm_of, strided
from torch import Tensor

from sf_compile import ops
from sf_compile.cpu import convolution, kernels
from sf_compile.ops.conv2d import composed
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.normalize import Norm

CONVOLUTIONS = [
    # channels, out, kernel, stride, upsample, padding, mode, out activation, statistics
    pytest.param(3, 32, 9, 1, 1, [4] * 4, "reflect", "none", True, id="first"),
    pytest.param(32, 40, 3, 2, 1, [1] * 4, "reflect", "none", True, id="down"),
    pytest.param(24, 24, 3, 1, 1, [1] * 4, "reflect", "none", True, id="residual"),
    pytest.param(32, 48, 3, 1, 1, [1] * 4, "reflect", "none", True, id="winograd"),
    pytest.param(48, 32, 3, 1, 1, [2, 0, 0, 1], "zeros", "silu", False, id="winograd-zeros"),
    pytest.param(64, 64, 3, 1, 3, [1] * 4, "replicate", "none", True, id="winograd-upsampled"),
    pytest.param(16, 8, 3, 1, 2, [1] * 4, "reflect", "none", True, id="subpixel-reflect"),
    pytest.param(16, 5, 3, 1, 2, [1] * 4, "zeros", "relu", True, id="subpixel-zeros"),
    pytest.param(6, 3, 3, 1, 2, [1] * 4, "replicate", "tanh", False, id="subpixel-replicate"),
    pytest.param(16, 8, 3, 1, 2, [1, 1, 1, 0], "reflect", "none", True, id="upsampled, uneven pad"),
    pytest.param(16, 8, 5, 1, 2, [2] * 4, "reflect", "none", True, id="upsampled, 5x5"),
    pytest.param(32, 3, 9, 1, 1, [4] * 4, "reflect", "none", False, id="last"),
    pytest.param(20, 3, 7, 1, 1, [3] * 4, "reflect", "tanh * 150.0 + 127.5", False, id="last-tanh"),
    pytest.param(20, 1, 5, 1, 1, [2, 1, 0, 2], "zeros", "sigmoid", True, id="last-one-channel"),
    pytest.param(8, 16, 1, 1, 3, [0] * 4, "zeros", "leaky_relu(0.2)", True, id="1x1"),
    pytest.param(8, 3, 1, 1, 1, [0] * 4, "zeros", "tanh", False, id="three-channels"),
]


def compare(a: Arguments, exact_of: Arguments, floor: float) -> None:
    """Every result of the op at least as close to float64 as 1.25 x the reference's, and in its strides."""
    got, plain, exact = ops.conv2d(*a), composed(a), composed(exact_of)
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert relative_error(mine, true) <= 1.25 * relative_error(theirs, true) + floor


def doubled(a: Arguments) -> Arguments:
    return Arguments(*(v.double() if isinstance(v, Tensor) else v for v in a))


@built
@pytest.mark.parametrize("shape", [(1, 37, 53), (2, 5, 5), (3, 12, 8)], ids=str)
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "upsample", "padding", "mode", "activation", "statistics"),
    CONVOLUTIONS,
)
def test_conv2d_is_as_close_to_float64_as_the_reference(
    channels, out, kernel, stride, upsample, padding, mode, activation, statistics, shape
):
    n, h, w = shape
    for dtype, last, how in itertools.product(DTYPES, (False, True), (*LAYOUTS, "crop")):
        x = strided(picture((n, channels, h, w), dtype, "contiguous"), how)
        residual = picture(x.shape, dtype, how if how in LAYOUTS else "contiguous")
        weight = torch.nn.Parameter(
            (torch.randn(out, channels, kernel, kernel) / kernel / channels**0.5).to(dtype), False
        )
        bias = None if statistics else torch.randn(out).to(dtype)
        moves = (upsample, padding, mode, [stride] * 2, activation, statistics)
        for normed in (False, True):
            norm = norm_of(x, n == 2) if normed else Norm(None, None, None, None, 1e-5, "none")
            other = residual if normed and n < 3 else None
            a = Arguments(x, weight, bias, *norm, other, *moves, normed, last)
            compare(a, doubled(a), 2e-6 if dtype == torch.float32 else 2e-3)


@built
@pytest.mark.parametrize("last", [False, True])
def test_a_transposed_convolution_is_finished_and_measured(last):
    for dtype in DTYPES:
        x = picture((2, 12, 9, 7), dtype, "channels_last")
        weight = (torch.randn(12, 6, 3, 3) / 10).to(dtype)
        a = Arguments(
            x,
            weight,
            None,
            *norm_of(x, False),
            None,
            1,
            [1, 0, 1, 0],
            "zeros",
            [2, 2],
            "none",
            True,
            True,
            last,
            True,
        )
        compare(a, doubled(a), 2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(
    ("upsample", "size", "kept", "made_anew"),
    [
        (1, 15, kernels.DIRECT, kernels.DIRECT), (1, 16, kernels.WINOGRAD, kernels.DIRECT),
        (1, 127, kernels.WINOGRAD, kernels.DIRECT), (1, 128, kernels.WINOGRAD, kernels.WINOGRAD),
        (2, 8, kernels.SUBPIXEL, kernels.DIRECT), (2, 126, kernels.SUBPIXEL, kernels.DIRECT),
        (2, 128, kernels.SUBPIXEL, kernels.SUBPIXEL),
    ],
)  # fmt: skip
def test_weights_that_every_call_makes_anew_take_a_form_where_it_pays(
    upsample, size, kept, made_anew, monkeypatch
):
    monkeypatch.setattr(convolution, "is_winograd", lambda *_: True)  # whatever this CPU's vectors
    weight = torch.randn(32, 32, 3, 3)
    with torch.inference_mode():
        unversioned = torch.nn.Parameter(weight.clone(), False)
    x = torch.empty(1, 32, size // upsample, size // upsample)
    moves = (upsample, [1] * 4, "reflect", [1, 1], "none", True)
    for each, form in ((torch.nn.Parameter(weight), kept), (weight, made_anew), (unversioned, made_anew)):
        a = Arguments(x, each, None, None, None, None, None, 1e-5, "none", None, *moves, False, True)
        assert convolution.form_of(a, torch.float32) == form


@built
def test_a_changed_weight_is_packed_anew():
    x = picture((1, 16, 12, 12), torch.float32, "channels_last")
    for out, kernel, upsample in ((8, 3, 2), (3, 9, 1), (8, 3, 1)):
        weight = torch.nn.Parameter(torch.randn(out, 16, kernel, kernel), False)
        nothing = Norm(None, None, None, None, 1e-5, "none")
        a = Arguments(
            x,
            weight,
            None,
            *nothing,
            None,
            upsample,
            [kernel // 2] * 4,
            "reflect",
            [1, 1],
            "none",
            False,
            False,
            True,
        )
        for _ in range(2):
            torch.testing.assert_close(ops.conv2d(*a)[0], composed(a)[0], atol=1e-3, rtol=1e-4)
            with torch.no_grad():
                weight.mul_(-2)


@built
def test_bfloat16_is_convolved_in_bfloat16_where_the_cpu_can(monkeypatch):
    monkeypatch.setattr(convolution, "multiplies_bfloat16", lambda: True)
    x = picture((1, 16, 9, 7), torch.bfloat16, "channels_last")
    weight = (torch.randn(8, 16, 3, 3) / 12).bfloat16()
    for activation, upsample in (("none", 1), ("tanh", 2)):
        a = Arguments(
            x,
            weight,
            None,
            *norm_of(x, False),
            None,
            upsample,
            [1] * 4,
            "reflect",
            [1, 1],
            activation,
            True,
            True,
            True,
        )
        compare(a, doubled(a), 2e-3)
