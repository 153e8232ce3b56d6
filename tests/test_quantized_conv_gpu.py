"""Convolutions of 8-bit integers on compute capability 9.0, against the exact reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from quantized_layers import CASES, IDS, PLAIN, SKIP, UP, integers, made, on_cpu

from sf_compile import ops
from sf_compile.backend import styleforge
from sf_compile.cuda import convolution, halo_conv, normalization, quantized_conv
from sf_compile.cuda.compiler import KernelKey, compile_kernel
from sf_compile.models import TransformerNet
from sf_compile.ops import quantization, reference
from sf_compile.runtime.calibration import psnr

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]


@pytest.fixture(scope="module")
def compiled(hopper_kernels):
    keys = []
    for layer, _, _ in CASES:
        constants = halo_conv._variant(finished(made(layer, (1, 16, 32), device="cuda"))[0]).constants()
        keys.append(KernelKey(halo_conv.SOURCE, tuple(constants.items()), "sm_90a"))
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, dict.fromkeys(keys)))


def finished(a):
    """What the convolution gets of ``a``, with random integers for its input; and these."""
    q = integers(a)
    precision = "fp16" if a.dtype == torch.float16 else "bf16"
    return quantized_conv._finished(a)._replace(input=q, precision=precision), q


def bits(x):
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def same(ours, others):
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(ours, others, strict=True))


def check(a):
    """The convolution of random integers, bit by bit, and its statistics."""
    given, q = finished(a)
    poison = [torch.full((2**k,), float("nan"), dtype=torch.float16, device="cuda") for k in range(9, 24)]
    del poison
    out, mean, variance, _ = halo_conv.conv2d(given)
    exact = quantization.convolved(on_cpu(a), q.cpu())
    assert out.dtype == a.dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(out.cpu()), bits(exact))
    true_variance, true_mean = torch.var_mean(exact.double(), (2, 3), correction=0)
    scale = true_variance.sqrt() + true_mean.abs()
    assert ((mean.cpu() - true_mean).abs() <= 1e-5 * scale).all()
    assert ((variance.cpu() - true_variance).abs() <= 1e-4 * scale.square()).all()
    return given, (out, mean, variance)


@pytest.mark.parametrize(("layer", "size", "why"), CASES, ids=IDS)
def test_integers_are_convolved_exactly(layer, size, why):
    check(made(layer, size, device="cuda"))


@pytest.mark.parametrize("layer", [PLAIN, SKIP, UP])
def test_bfloat16(layer):
    check(made(layer, (2, 19, 33), torch.bfloat16, "cuda"))


@pytest.mark.parametrize("layer", [PLAIN, UP])
def test_the_same_bits_twice(layer):
    given, first = check(made(layer, (2, 67, 130), device="cuda"))
    for _ in range(3):
        assert same(first, halo_conv.conv2d(given)[:3])


@pytest.mark.parametrize("layer", [PLAIN, SKIP, PLAIN._replace(keep=True), UP])
@pytest.mark.parametrize("size", [(1, 37, 53), (3, 8, 32)])
def test_the_pass_rounds_to_integers_and_keeps_the_input(layer, size):
    a = made(layer, size, device="cuda")
    kind = quantization.input_dtype(a.activation, layer.residual)
    asked = (a.input, a.norm, a.residual, 1, (0, 0, 0, 0), "zeros", True, layer.keep)
    q, kept = normalization.apply(*asked, dtype=kind, per_unit=1 / a.input_scale)
    z = reference.normalize(a.input, *a.norm, a.residual, dtype=torch.float32)
    off = (q.int() - quantization.quantized_input(z, a.input_scale, kind).int()).abs()
    assert q.dtype == kind and off.max() <= 1 and off.float().mean() < 1e-3
    assert q.max() == torch.iinfo(kind).max, "the scale is to cut something off"
    assert (kept is not None) == layer.keep
    if layer.keep:
        whole, _ = normalization.apply(*asked[:-1])
        assert same([kept], [whole])


@pytest.mark.parametrize(("layer", "size", "why"), CASES, ids=IDS)
def test_the_op_is_close_to_its_reference(layer, size, why):
    a = made(layer, size, device="cuda")
    assert convolution.quantized_refusal(a) is None
    out, _, _, kept = ops.conv2d(*a)
    exact, _, _, exact_kept = quantization.composed(on_cpu(a))
    # Numbers that lie between two integers may be rounded to the other one.
    assert (out.cpu().double() - exact.double()).norm() <= 2e-3 * exact.double().norm()
    assert (kept.numel() > 0) == layer.keep
    if layer.keep:
        assert (kept.cpu().double() - exact_kept.double()).abs().max() <= 2e-3 * exact_kept.abs().max()


def test_an_image_that_is_not_finite_stays_so():
    a = made(PLAIN, (3, 19, 33), device="cuda")
    for broken in (float("nan"), float("inf")):
        variance = a.variance.clone()
        variance[1, 5] = broken
        out, mean, variance, _ = ops.conv2d(*a._replace(variance=variance))
        assert out[1].isnan().all() and mean[1].isnan().all() and variance[1].isnan().all()
        assert out[[0, 2]].isfinite().all() and mean[[0, 2]].isfinite().all()


def test_what_no_kernel_takes_is_computed_in_float16():
    a = made(PLAIN._replace(channels=24), (1, 19, 33), device="cuda")
    assert "multiples of 16" in convolution.quantized_refusal(a)
    assert same(ops.conv2d(*a)[:1], ops.conv2d(*a._replace(input_scale=None))[:1])


@pytest.mark.parametrize("n", [1, 2], ids=["trunk in one launch", "trunk layer by layer"])
def test_a_network_by_plain_calls_recordings_and_graphs(n):
    model = TransformerNet(32, 2).cuda().half().eval()
    x = torch.rand(n, 3, 256, 320, device="cuda").half() * 255

    def compiled(precision, **options):
        torch.compiler.reset()
        options |= {"precision": precision}
        f = torch.compile(model, backend=styleforge, options=options)
        with torch.no_grad():
            return [f(x).clone() for _ in range(4)]

    first, *others = compiled("int8")
    (sixteen, *_) = compiled("fp16")
    assert same([first] * 3, others) and psnr(sixteen, first) > 38 and not torch.equal(sixteen, first)
    assert same([sixteen] * 4, compiled("int8", min_psnr=300))
    again, *others = compiled("int8", cuda_graphs=True)
    assert same([again] * 3, others) and same([again], [first])


def test_weights_that_change_are_rounded_anew():
    a = made(PLAIN, (1, 19, 33), device="cuda")
    weight = torch.nn.Parameter(a.weight, requires_grad=False)
    a = a._replace(weight=weight)
    before = ops.conv2d(*a)[0]
    with torch.no_grad():
        weight.mul_(2)
    after = ops.conv2d(*a)[0]
    assert same([after], ops.conv2d(*a._replace(weight=weight.clone()))[:1])
    # But for float16's smallest numbers, whose last bit weighs more.
    assert (after - before * 2).abs().max() <= 1e-6
