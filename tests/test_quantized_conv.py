"""``styleforge::conv2d`` with an ``input_scale`` on the CPU: the arithmetic that its kernels must match."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from quantized_layers import CASES, PLAIN, SKIP, UP, Layer, made

from sf_compile import ops
from sf_compile.cuda import halo_conv, halo_variant, hopper, normalization, quantized_conv
from sf_compile.ops import quantization, reference
from sf_compile.ops.conv2d_arguments import Arguments

LAYERS = {layer._replace(channels=16, out_channels=8): why for layer, _, why in CASES}
KINDS = [pytest.param(layer, id=why.replace(" ", "-")) for layer, why in LAYERS.items()]
WHOLE = [kind for kind in KINDS if kind.values[0].upsample == 1]
PADS = {"reflect": "reflect", "replicate": "replicate", "zeros": "constant"}


def small(layer: Layer, n: int = 2, dtype: torch.dtype = torch.float16) -> Arguments:
    """Arguments of 16 -> 8 channels, for exact sums are slow on a CPU."""
    return made(layer._replace(channels=16, out_channels=8), (n, 9, 11), dtype)


def by_hand(a: Arguments) -> torch.Tensor:
    """The same in whole numbers, one output channel at a time, of the picture enlarged and padded first."""
    kind = quantization.input_dtype(a.activation, a.residual is not None)
    z = reference.normalize(a.input, *a.norm, a.residual, dtype=torch.float32)
    limits = torch.iinfo(kind)
    q = torch.clamp((z * (1.0 / a.input_scale)).round(), limits.min, limits.max).long()
    q = F.interpolate(q.double(), scale_factor=a.upsample, mode="nearest")
    q = F.pad(q, a.padding, mode=PADS[a.padding_mode])
    rows = []
    for weight in a.weight.float():
        scale = weight.abs().max() / 127
        taps = (weight / scale).round().double()
        assert taps.abs().max() == 127
        sums = F.conv2d(q, taps[None], stride=a.stride)
        rows.append(sums.float() * (scale * a.input_scale))
    return torch.cat(rows, 1).to(a.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", WHOLE)
def test_sums_are_those_of_whole_numbers(layer, dtype):
    a = small(layer, dtype=dtype)
    out, mean, variance, kept = ops.conv2d(*a)
    assert out.dtype == dtype and torch.equal(out, by_hand(a))
    true_variance, true_mean = torch.var_mean(out.double(), (2, 3), correction=0)
    assert torch.allclose(mean.double(), true_mean, atol=1e-5)
    assert torch.allclose(variance.double(), true_variance, rtol=1e-4)
    if layer.keep:  # not of whole numbers: the skip path loses nothing
        assert torch.equal(kept, reference.normalize(a.input, *a.norm, a.residual))
    else:
        assert kept.numel() == 0


@pytest.mark.parametrize("mode", ["reflect", "replicate", "zeros"])
@pytest.mark.parametrize("tap", range(9))
def test_the_sub_pixel_form_is_the_enlarged_picture(mode, tap):
    """Of a single tap, nothing of which is summed and rounded: what is left to go wrong is where it lies."""
    a = small(UP._replace(mode=mode))
    weight = torch.zeros_like(a.weight)
    weight[:, :, tap // 3, tap % 3] = torch.randint(-127, 128, weight.shape[:2]).half()
    weight[:, 0, tap // 3, tap % 3] = 127  # so the scale is 1
    out = ops.conv2d(*a._replace(weight=weight))[0]
    assert torch.equal(out, by_hand(a._replace(weight=weight)))


@pytest.mark.parametrize("layer", KINDS)
def test_close_to_the_layer_without_integers(layer):
    a = small(layer)
    z = reference.normalize(a.input, *a.norm, a.residual, dtype=torch.float32)
    kind = quantization.input_dtype(a.activation, a.residual is not None)
    a = a._replace(input_scale=float(z.abs().max()) / quantization.bound(kind))
    plain = ops.conv2d(*a._replace(input_scale=None))
    out = ops.conv2d(*a)
    ratio = (out[0] - plain[0]).double().square().mean() / plain[0].double().square().mean()
    assert -10 * math.log10(ratio) > 34
    assert [x.shape for x in out] == [x.shape for x in plain]
    assert [x.stride() for x in out] == [x.stride() for x in plain]
    assert [x.dtype for x in out] == [x.dtype for x in plain]


@pytest.mark.parametrize("layer", [PLAIN, SKIP, UP], ids=["plain", "skip", "up"])
def test_opcheck(layer):
    a = small(layer, 1)
    torch.library.opcheck(
        torch.ops.styleforge.conv2d.default, tuple(a), test_utils=("test_schema", "test_faketensor")
    )


def test_behind_a_relu_there_are_twice_as_many_steps():
    assert quantization.input_dtype("relu", False) == torch.uint8
    assert quantization.input_dtype("relu", True) == quantization.input_dtype("none", False) == torch.int8
    assert (quantization.bound(torch.uint8), quantization.bound(torch.int8)) == (255, 127)


def test_rounding_of_inputs():
    z = torch.tensor([0.0, 0.25, 0.75, -0.25, 1e6, -1e6, math.nan, math.inf, -math.inf])
    signed = quantization.quantized_input(z, 0.5, torch.int8)
    assert signed.tolist() == [0, 0, 2, 0, 127, -128, 0, 127, -128]
    assert quantization.quantized_input(z, 0.5, torch.uint8).tolist() == [0, 0, 2, 0, 255, 0, 0, 255, 0]


def test_weights_of_an_output_channel_have_a_scale_of_their_own():
    taps = torch.randn(1, 4, 3, 3, 3)
    taps[0, 1] *= 1000
    taps[0, 2] = 0
    integers, scales = quantization.quantized_weights(taps)
    assert integers.dtype == torch.int8 and scales.shape == (1, 4)
    assert integers[0, [0, 1, 3]].abs().amax((1, 2, 3)).tolist() == [127] * 3
    assert not integers[0, 2].any()
    rounded = integers * scales[:, :, None, None, None]
    assert ((rounded - taps).abs() <= 0.5001 * scales[:, :, None, None, None]).all()


def test_weights_that_are_not_finite_make_nothing_finite():
    for broken in (math.nan, math.inf):
        a = small(PLAIN)
        a.weight[3, 2, 1, 1] = broken
        out = ops.conv2d(*a)[0]
        assert not out[:, 3].isfinite().any()
        assert out[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("which", ["mean", "variance"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_image_that_is_not_finite_stays_so(which, broken):
    a = small(PLAIN, 3)
    statistic = getattr(a, which).clone()
    statistic[1, 5] = broken
    out, mean, variance, _ = ops.conv2d(*a._replace(**{which: statistic}))
    assert out[1].isnan().all() and mean[1].isnan().all() and variance[1].isnan().all()
    assert out[[0, 2]].isfinite().all() and mean[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"input_scale": 0.0}, "positive number, got 0"),
        ({"input_scale": -1.0}, "positive number"),
        ({"input_scale": math.nan}, "positive number"),
        ({"input_scale": math.inf}, "positive number"),
        ({"statistics": False}, "between two instance norms"),
        ({"mean": None, "variance": None}, "between two instance norms"),
        ({"bias": torch.zeros(8).half()}, "a bias"),
        ({"output_activation": "relu"}, "an activation of the output"),
        ({"precision": "fp32"}, "float32"),
        ({"out_dtype": torch.float32}, "float32"),
        ({"upsample": 3}, "upsampling by 3"),
        ({"upsample": 2, "padding": [2, 2, 2, 2]}, "upsampling by 2"),
    ],
    ids=str,
)
def test_refused(changes, why):
    a = small(PLAIN)._replace(norm_weight=None, norm_bias=None)
    with pytest.raises(RuntimeError, match=why):
        ops.conv2d(*a._replace(**changes))


def test_gradients_are_those_without_integers():
    a = small(PLAIN, 1)

    def gradients(scale):
        x, weight = (t.detach().clone().requires_grad_() for t in (a.input, a.weight))
        out = ops.conv2d(*a._replace(input=x, weight=weight, input_scale=scale))[0]
        return torch.autograd.grad(out.float().sum(), (x, weight))

    for ours, plain in zip(gradients(a.input_scale), gradients(None), strict=True):
        assert torch.equal(ours, plain)


def test_a_trunk_is_the_calls_with_their_scales():
    a = small(PLAIN._replace(keep=True), 1)
    c = a.input.shape[1]
    weights = [(torch.randn(c, c, 3, 3) / 12).half() for _ in range(4)]
    norms = [(torch.rand(c).half() + 0.5, torch.randn(c).half()) for _ in range(3)]
    scales = [0.02, 0.0, 0.04, 0.03]

    def trunk(scales):
        finish = (a.input, *a.norm[:4], 1e-5, "relu")
        weight, bias = ([pair[i] for pair in norms] for i in (0, 1))
        return ops.residual_trunk(*finish, weights, weight, bias, 1e-5, "auto", scales)

    def layer(x, number, norm, activation, residual, keep):
        scale = scales[number] or None
        return ops.conv2d(
            x, weights[number], None, *norm, 1e-5, activation, residual, 1, [1] * 4, "reflect", [1, 1],
            "none", True, keep, True, False, "auto", None, scale,
        )  # fmt: skip

    raw, mean, variance, z = layer(a.input, 0, a.norm[:4], "relu", None, True)
    raw, mean, variance, _ = layer(raw, 1, (mean, variance, *norms[0]), "relu", None, False)
    raw, mean, variance, z = layer(raw, 2, (mean, variance, *norms[1]), "none", z, True)
    raw, mean, variance, _ = layer(raw, 3, (mean, variance, *norms[2]), "relu", None, False)
    found = trunk(scales)
    assert all(torch.equal(x, y) for x, y in zip(found, (raw, mean, variance, z), strict=True))
    assert not torch.equal(found[0], trunk([])[0])
    assert torch.equal(trunk([])[0], trunk([0.0] * 4)[0])
    with pytest.raises(RuntimeError, match="3 input_scales for 4 convolutions"):
        trunk(scales[:3])


def test_weights_are_packed_as_bytes_with_their_scales_behind():
    a = made(UP._replace(channels=64, out_channels=40), (1, 9, 11))
    variant = halo_conv._variant(a)
    integers, scales = quantization.quantized_weights(quantization.taps_of(a.weight, True))
    packed = halo_variant.pack_integers(variant, a.weight)
    assert packed.dtype == torch.int8 and packed.dim() == 1
    rows = 4 * variant.phase_rows
    tail = packed[-4 * rows :].view(torch.float32).reshape(4, variant.phase_rows)
    assert torch.equal(tail[:, :40], scales) and not tail[:, 40:].any()
    body = packed[: -4 * rows]
    assert body.long().abs().sum() == integers.long().abs().sum()
    assert body.numel() == variant.row_blocks * variant.depth * 4 * 64 * variant.slot_channels


@pytest.fixture
def on_hopper(monkeypatch):
    """CPU tensors are taken for a Hopper GPU's."""
    monkeypatch.setattr(hopper, "refusal", lambda a: None)
    monkeypatch.setattr(halo_conv, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(normalization, "usable_or_warn", lambda: True)


@pytest.mark.parametrize(("layer", "size", "why"), CASES, ids=[why for _, _, why in CASES])
def test_the_kernels_take_every_layer_that_is_tested_on_a_gpu(layer, size, why, on_hopper):
    assert quantized_conv.refusal(made(layer, (1, 16, 32))) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (lambda a: {"input": a.input.contiguous()}, "channels_last"),
        (lambda a: {"residual": a.residual.contiguous()}, "channels_last"),
        (lambda a: {"residual": a.residual.float()}, "channels_last pictures in torch.float16"),
        (lambda a: {"input": a.input.float(), "precision": "fp16"}, "reads torch.float16, not torch.float32"),
        (lambda a: {"stride": [3, 3]}, "stride"),
        (lambda a: {"padding": [4, 4, 4, 4]}, "wide"),
    ],
)
def test_what_the_kernels_refuse(changes, why, on_hopper):
    a = made(SKIP, (1, 16, 32))
    assert why in quantized_conv.refusal(a._replace(**changes(a)))
    few = made(PLAIN._replace(channels=24), (1, 16, 32))
    assert "multiples of 16" in quantized_conv.refusal(few)


def test_a_cpu_has_no_such_kernel():
    assert "compute capability 9.0" in quantized_conv.refusal(made(PLAIN, (1, 16, 32)))
