"""The C++ kernels of csrc/cpu, through the ops: against float64, eager's own error, and the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import IDS, LAYOUTS, SHAPES, picture, relative_error
from cpu_cases import DTYPES, built, norm_of, strided
from torch import Tensor

from sf_compile import ops
from sf_compile.activations import parse
from sf_compile.cpu import kernels
from sf_compile.models import TransformerNet
from sf_compile.ops import reference
from sf_compile.ops.normalize import Norm

ACTIVATIONS = (
    "none", "relu", "leaky_relu(0.2)", "hardtanh(0.0, 6.0)", "clamp(-0.5, inf)", "tanh * 150.0 + 127.5",
    "sigmoid", "silu", "gelu", "gelu_tanh", "elu(0.7)", "relu * 0.5 + 1.0",
)  # fmt: skip


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda x: False)


def exact_finish(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    x64 = x.double()
    mean, variance, weight, bias = (None if v is None else v.double() for v in norm[:4])
    z = reference.normalize(
        x64,
        mean,
        variance,
        weight,
        bias,
        norm.eps,
        norm.activation,
        None if residual is None else residual.double(),
    )
    assert z.dtype == torch.float64
    return z


@built
@pytest.mark.parametrize("row", SHAPES, ids=IDS)
@pytest.mark.parametrize("how", [*LAYOUTS, "crop", "channels", "mixed"])
def test_statistics_of_any_strides(row, how):
    for dtype, mean in itertools.product(DTYPES, (0.0, 100.0)):
        x = strided(picture(row.shape, dtype, "contiguous", mean=mean), how)
        exact = torch.var_mean(x.double(), (2, 3), correction=0)
        got_mean, got_variance = kernels.statistics(x)
        assert float((got_mean - exact[1]).abs().max()) < 1e-7 * (1 + mean)
        assert relative_error(got_variance, exact[0]) < 3e-6
        assert got_mean.is_contiguous() and got_variance.dtype == torch.float32


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 32, 37, 53), (1, 3, 300, 501), (1, 1, 1, 1)])
def test_a_constant_picture_has_no_variance_and_its_own_mean(shape, layout):
    for value in (0.0, 0.1, -1234.567, 3e4):
        x = torch.full(shape, value).contiguous(memory_format=LAYOUTS[layout])
        mean, variance = kernels.statistics(x)
        assert torch.equal(mean, x[:, :, 0, 0]) and not variance.any()


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_do_not_depend_on_the_number_of_threads(layout):
    x = picture((2, 24, 65, 97), torch.float32, layout, mean=10.0)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.stack(kernels.statistics(x)))
            found.append(torch.stack(kernels.statistics(x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_finish_of_every_activation_is_the_references(layout, activation):
    for dtype, residual, per_image in itertools.product(DTYPES, (False, True), (False, True)):
        x = picture((2, 11, 7, 13), dtype, layout)
        other = picture(x.shape, dtype, layout) if residual else None
        norm = norm_of(x, per_image, activation)
        exact = exact_finish(x, norm, other)
        got, _ = kernels.finish(x, norm, other, layout == "channels_last")
        plain = reference.normalize(x, *norm, other)
        assert got.dtype == dtype and got.is_contiguous(memory_format=LAYOUTS[layout])
        assert relative_error(got, exact) <= 1.25 * relative_error(plain, exact) + 1e-7


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_are_pytorchs(activation):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 88.0, -88.0, 3.0]).view(1, 1, 3, 3)
    x = x.repeat(1, 9, 1, 1)
    norm = Norm(None, None, None, None, 0.0, activation)
    for layout in LAYOUTS:
        got, _ = kernels.finish(x, norm, None, layout == "channels_last")
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's gelu(inf) is NaN with AVX-512
            expected = reference.normalize(x, *norm, None)
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert str(parse(activation)) == activation


@built
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("how", [*LAYOUTS, "crop", "channels", "mixed"])
def test_upsampling_and_padding_move_finished_pixels(how, mode):
    for dtype, upsample, padding, last in itertools.product(
        DTYPES, (1, 2, 3), ([0, 0, 0, 0], [1, 1, 1, 1], [3, 0, 1, 4]), (False, True)
    ):
        for shape in ((2, 10, 5, 5), (1, 3, 6, 19), (3, 16, 5, 9)):
            x = strided(picture(shape, dtype, "contiguous"), how)
            residual = strided(picture(shape, dtype, "contiguous"), "mixed" if how == "crop" else how)
            norm = norm_of(x, True)
            z, _ = kernels.finish(x, norm, residual, last)
            got, kept = kernels.finish(
                x, norm, residual, last, upsample=upsample, padding=padding, padding_mode=mode, keep=True
            )
            assert torch.equal(got, reference.moved(z, upsample, padding, mode))
            assert kept is not None and torch.equal(kept, z) and kept.stride() == z.stride()
            assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@built
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_instance_norm_of_a_picture_far_from_zero(mean):
    for row, layout in itertools.product(SHAPES, LAYOUTS):
        x = picture(row.shape, torch.float32, layout, mean=mean)
        got = ops.instance_norm(x, None, None, 1e-5, "none", None, layout == "channels_last")
        if x.shape[2] * x.shape[3] > 1:
            exact = F.instance_norm(x.double())
            assert relative_error(got, exact) <= 1.25 * relative_error(F.instance_norm(x), exact) + 1e-7
        else:
            assert not got.any()


@built
def test_gradients_are_the_references(monkeypatch):
    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        x = picture((2, 8, 9, 7), torch.float32, "channels_last").requires_grad_()
        weight = torch.nn.Parameter(torch.randn(4, 8, 3, 3))
        vectors = [v.requires_grad_() for v in norm_of(x.detach(), True)[:4]]
        out = ops.conv2d(
            x,
            weight,
            None,
            *vectors,
            1e-5,
            "relu",
            None,
            2,
            [1] * 4,
            "reflect",
            [1, 1],
            "tanh",
            True,
            True,
            True,
        )
        return list(
            torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in out), [x, weight, *vectors])
        )

    ours = gradients()
    without_kernels(monkeypatch)
    for mine, theirs in zip(ours, gradients(), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_is_as_close_to_float64_as_eager(dtype):
    from sf_compile.backend import styleforge

    model = TransformerNet(width=16, blocks=2).eval().to(dtype)
    fused = torch.compile(model, backend=styleforge)
    with torch.no_grad():
        for shape in ((1, 3, 37, 53), (2, 3, 64, 48)):
            x = (torch.rand(shape) * 255).to(dtype)
            exact = TransformerNet(width=16, blocks=2).eval().double()
            exact.load_state_dict(model.state_dict())
            true = exact(x.double())
            eager, got = model(x), fused(x)
            assert (got.dtype, got.stride()) == (eager.dtype, eager.stride())
            assert relative_error(got, true) <= 1.25 * relative_error(eager, true)
            assert torch.equal(got, fused(x))


def test_other_dtypes_and_empty_pictures_are_the_references():
    for x in (torch.randn(1, 2, 3, 3).double(), torch.randn(1, 2, 3, 3).half(), torch.randn(0, 2, 3, 3)):
        assert not kernels.take(x)
