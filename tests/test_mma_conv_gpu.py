"""What csrc/mma_conv.cu computes on a GPU, against float64 and eager PyTorch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from halo_layers import equal, far_from_zero
from mma_layers import (
    BARE,
    BFLOAT16,
    CASES,
    DOUBLING,
    FIRST,
    FLOAT32,
    HALVING,
    IDS,
    LAST,
    PLAIN,
    PLANAR,
    SKIP,
    Layer,
    check,
    made,
)

from sf_compile import ops, tf32
from sf_compile.cuda import convolution, mma_conv
from sf_compile.cuda.compiler import KernelKey, architecture, compile_kernel
from sf_compile.cuda.layout import shared_bytes
from sf_compile.cuda.loader import loaded
from sf_compile.cuda.mma_tiling import Tiling
from sf_compile.cuda.recorder import Recorder

NAN = float("nan")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]


@pytest.fixture(scope="module")
def compiled():
    """Compile the kernels of the table side by side, so that the tests find them in the cache."""
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        pytest.skip("mma_conv.cu is for compute capability 8.0 and later")
    layers = [(layer, size, torch.float16) for layer, size, _ in CASES]
    layers += [(layer, (2, 37, 53), torch.bfloat16) for layer in BFLOAT16]
    layers += [(layer, (2, 37, 53), torch.float32) for layer in FLOAT32]
    keys = []
    for layer, size, dtype in layers:
        a = made(layer, size, dtype)
        variant = mma_conv._variant(a)
        constants = variant.constants(mma_conv._tiling(a, variant))
        keys.append(KernelKey(mma_conv.SOURCE, tuple(constants.items()), architecture(capability)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, dict.fromkeys(keys)))


def checked(a):
    """``check`` of what is not refused, its outputs in memory that held NaN."""
    assert mma_conv.refusal(a) is None
    poison = [torch.full((2**k,), NAN, dtype=torch.float16, device="cuda") for k in range(9, 24)]
    del poison
    return check(a)


@pytest.mark.parametrize(("layer", "size", "why"), CASES, ids=IDS)
def test_against_float64(layer, size, why):
    a = made(layer, size)
    results = checked(a)
    assert equal(mma_conv.conv2d(a), results), "the same bits twice"


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(32, 4, 4, 2, 8, 3, 2),
        Tiling(32, 4, 4, 1, 8, 1, 3, 2),
        Tiling(64, 4, 4, 2, 6, 3, 2),
        Tiling(32, 2, 4, 2, 6, 3, 0),
    ],
)
@pytest.mark.parametrize("layer", [Layer(64, 136), Layer(48, 88, residual=True, keep=True, output=False)])
def test_many_products_side_by_side(layer, tiling, monkeypatch):
    if tiling.shared_bytes(mma_conv._variant(made(layer, (2, 37, 53))).layer) > shared_bytes(0):
        pytest.skip("does not fit into this GPU's shared memory")
    monkeypatch.setattr(mma_conv, "fastest", lambda *_: tiling)
    checked(made(layer, (2, 37, 53)))


@pytest.mark.parametrize("layer", BFLOAT16)
def test_bfloat16(layer):
    checked(made(layer, (2, 37, 53), torch.bfloat16))


@pytest.mark.parametrize("layer", FLOAT32)
def test_float32_in_tf32(layer, monkeypatch):
    monkeypatch.setattr(tf32, "_switch", lambda: True)
    a = made(layer, (2, 37, 53), torch.float32)
    results = checked(a)
    assert equal(mma_conv.conv2d(a), results), "the same bits twice"


def test_float32_without_tf32_is_left_to_another_convolution(monkeypatch):
    a = made(PLAIN, (2, 37, 53), torch.float32)
    assert mma_conv.refusal(a._replace(precision="tf32")) is None
    assert mma_conv.refusal(a._replace(precision="fp32")) == "TF32 is not allowed"
    monkeypatch.setattr(tf32, "_switch", lambda: False)
    assert mma_conv.refusal(a) == "TF32 is not allowed"


@pytest.mark.parametrize("layer", [PLAIN, BARE, PLANAR, FIRST])
def test_the_op_runs_this_kernel_where_it_is_the_only_one(layer, monkeypatch):
    monkeypatch.setattr(convolution, "_KERNELS", (mma_conv,))
    monkeypatch.setattr(convolution, "_choices", {})
    a = made(layer, (1, 37, 53))
    a = a._replace(weight=torch.nn.Parameter(a.weight, requires_grad=False))
    assert convolution.choice(a) == (mma_conv, False, False)
    expected = ops.conv2d(*a)
    with Recorder() as recorder:  # which an op tells of itself where a region calls it
        results = convolution.conv2d(a)
    assert equal(results, expected)
    assert recorder.foreign is None and len(recorder.launches) == 1
    assert recorder.launches[0].kernel in loaded()


def test_a_kept_input_before_a_stride_takes_a_pass_of_its_own(monkeypatch):
    monkeypatch.setattr(convolution, "_KERNELS", (mma_conv,))
    monkeypatch.setattr(convolution, "_choices", {})
    a = made(HALVING, (2, 37, 53))._replace(keep_input=True)
    assert convolution.choice(a) == (mma_conv, True, False)
    out, mean, variance, kept = ops.conv2d(*a)
    plain = mma_conv.conv2d(a._replace(keep_input=False))
    assert equal((out, mean, variance), plain[:3])
    assert equal((kept,), (ops.normalize(a.input, *a.norm, None, True),))


@pytest.mark.parametrize("layer", [SKIP, PLANAR, LAST, HALVING, DOUBLING])
@pytest.mark.parametrize("size", [(1, 5, 6), (2, 37, 53)])
def test_writes_nothing_beside_its_outputs(layer, size, monkeypatch):
    margin, buffers = 65536, []

    def amid_nan(shape, like, channels_last):
        n, c, h, w = shape
        elements = margin + n * c * h * w + margin
        buffers.append(torch.full((elements,), NAN, dtype=like.dtype, device="cuda"))
        inner = buffers[-1][margin:-margin]
        return inner.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else inner.view(n, c, h, w)

    a = made(layer, size)
    expected = mma_conv.conv2d(a)
    monkeypatch.setattr(mma_conv, "empty_image", amid_nan)
    assert equal(mma_conv.conv2d(a), expected) and len(buffers) == 1 + layer.keep
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()
        assert buffer[margin:-margin].isfinite().all()


# ---- statistics that are hard to take, and numbers that are not finite ------------------------------------


def test_mean_of_100_deviations():
    a = far_from_zero(made(BARE, (2, 64, 96)))
    out, mean, variance, _ = mma_conv.conv2d(a)
    exact_variance, exact_mean = torch.var_mean(out.double(), (2, 3), correction=0)
    assert (exact_mean > 40 * exact_variance.sqrt()).all()
    assert ((mean - exact_mean).abs() <= 1e-3 * exact_variance.sqrt()).all()
    assert ((variance / exact_variance - 1).abs() <= 1e-3).all()


@pytest.mark.parametrize("layer", [PLAIN, PLANAR, DOUBLING])
def test_input_of_a_mean_of_100_deviations(layer):
    a = made(layer, (2, 37, 53))
    x = (128 + torch.randn(a.input.shape, device="cuda") * 1.28).half()
    variance, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    x = torch.empty_like(a.input).copy_(x)
    checked(a._replace(input=x, mean=mean.float(), variance=variance.float()))


def test_no_variance():
    a = made(BARE, (2, 64, 96))
    a.input.fill_(0.7)
    out, mean, variance, _ = mma_conv.conv2d(a)
    assert (out == out[:, :, :1, :1]).all()
    assert (variance >= 0).all() and (variance <= 1e-7 * (1 + mean.square())).all()
    a = made(PLAIN, (2, 37, 53))
    a.variance.zero_()
    checked(a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_weights(dtype):
    a = made(PLAIN, (2, 37, 53), dtype)
    a.weight.mul_(100)
    checked(a)


def test_nan_passes_both_relus_and_stays_in_its_image():
    a = made(PLAIN._replace(output_relu=True), (2, 37, 53))
    clean = mma_conv.conv2d(a)
    a.input[1, 3, 20, 30] = NAN
    out, mean, variance, _ = mma_conv.conv2d(a)
    assert out[1, :, 19:22, 29:32].isnan().all() and out.isnan().sum() == 9 * out.shape[1]
    assert mean[1].isnan().all() and variance[1].isnan().all()
    assert equal((out[0], mean[0], variance[0]), (clean[0][0], clean[1][0], clean[2][0]))
    a.input[1, 3, 20, 30] = 0
    assert mma_conv.conv2d(a)[1].isfinite().all(), "the workspace is clean again"


def test_more_images_than_blocks():
    checked(made(PLAIN, (64, 21, 17)))


def test_a_picture_that_keeps_every_multiprocessor_busy():
    checked(made(Layer(48, 72, (3, 3), (1, 1, 1, 1), "zeros", (2, 1)), (1, 400, 300)))


@pytest.mark.parametrize("layer", [PLAIN, PLANAR, HALVING, DOUBLING])
def test_the_fake_kernel_describes_what_is_returned(layer, monkeypatch):
    monkeypatch.setattr(convolution, "_KERNELS", (mma_conv,))
    monkeypatch.setattr(convolution, "_choices", {})
    results = torch.library.opcheck(
        torch.ops.styleforge.conv2d.default,
        tuple(made(layer, (2, 37, 53))),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}
