"""The layers on which csrc/halo_conv.cu is tested, each with a reason, and what they compute in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import relative_error
from torch import Tensor

from sf_compile import ops, tf32
from sf_compile.cuda import convolution, halo_conv
from sf_compile.cuda.compiler import KernelKey, compile_kernel
from sf_compile.ops import reference
from sf_compile.ops.conv2d_arguments import Arguments


class Layer(NamedTuple):
    """One layer with everything that its kernel is compiled for, but the dtype."""

    channels: int
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    mode: str = "reflect"
    stride: int = 1
    upsample: int = 1
    norm: str = "instance"  # "running": mean and variance are (C,); "none"
    relu: bool = True
    residual: bool = False
    keep: bool = False
    bias: bool = False
    output_relu: bool = False
    statistics: bool = True
    parameter: torch.dtype | None = None  # of the norm's weight and bias; None: the picture's
    activation: str | None = None  # None: as ``relu`` says
    output: str = "none"
    transposed: bool = False


PLAIN = Layer(128, 128)
BARE = Layer(128, 128, norm="none", relu=False)
SKIP = Layer(64, 64, relu=False, residual=True, keep=True)
LARGE_SKIP = PLAIN._replace(relu=False, residual=True, keep=True)
KEEP = PLAIN._replace(keep=True)
HALVING = Layer(32, 64, stride=2)
DOUBLING = Layer(64, 32, upsample=2)
SMALL_DOUBLING = Layer(16, 8, upsample=2, mode="replicate", keep=True)
GENERAL = Layer(
    24, 40, (5, 5), (2, 1, 0, 2), "zeros", norm="running", bias=True, output_relu=True, statistics=False
)
LEAKY = Layer(64, 64, activation="leaky_relu(0.2)")
ENDING = Layer(64, 64, norm="none", relu=False, bias=True, statistics=False)

CASES = (
    (PLAIN, (1, 37, 53), "height and width odd"),
    (PLAIN, (1, 5, 6), "a picture smaller than a tile"),
    (PLAIN, (2, 8, 32), "exactly a tile"),
    (PLAIN, (1, 9, 33), "a pixel more than a tile each way"),
    (PLAIN, (1, 7, 31), "a pixel less than a tile each way"),
    (PLAIN, (1, 135, 241), "several tiles a block, ragged at both ends"),
    (PLAIN, (3, 16, 64), "three images of whole tiles: stores through shared memory alone"),
    (BARE, (2, 41, 72), "no norm at all: the input is not touched"),
    (LARGE_SKIP, (3, 40, 70), "a residual: a pass before the kernel"),
    (KEEP, (1, 41, 72), "z is kept"),
    (SKIP, (2, 37, 53), "an input that is finished, of few channels"),
    (PLAIN, (8, 8, 32), "an image a tile: the norm changes with every tile"),
    (PLAIN, (70, 5, 40), "images whose statistics several blocks complete"),
    (HALVING, (1, 37, 53), "stride 2, odd"),
    (HALVING, (2, 41, 72), "stride 2, odd and even"),
    (HALVING, (1, 16, 64), "stride 2, one whole tile"),
    (Layer(64, 128, stride=2, mode="zeros", norm="none", relu=False), (1, 33, 130), "slots of 16 channels"),
    (Layer(128, 64, upsample=2, relu=False, residual=True), (1, 19, 27), "a row block for each parity"),
    (DOUBLING, (2, 19, 40), "row blocks shared by two parities"),
    (DOUBLING, (1, 8, 32), "their windows are one more than a tile"),
    (DOUBLING, (2, 1, 9), "a single row, mirrored into itself"),
    (Layer(32, 16, upsample=2, mode="zeros"), (1, 17, 33), "a row block shared by four parities"),
    (SMALL_DOUBLING, (1, 9, 9), "8 output channels: half a row block is padding"),
    (Layer(256, 256), (1, 24, 40), "weights that come with the slots"),
    (Layer(64, 256, (1, 1), (0, 0, 0, 0)), (2, 21, 40), "1x1"),
    (GENERAL, (1, 30, 50), "5x5, 24 -> 40, every side its own padding, running statistics, bias, ReLU"),
    (Layer(48, 48, mode="replicate", padding=(0, 1, 2, 1), residual=True, keep=True), (2, 20, 33), "uneven"),
    (Layer(16, 24, (7, 7), (3, 2, 1, 3)), (1, 20, 45), "7x7, uneven reflection"),
    (Layer(8, 16, stride=2, mode="zeros", norm="running", relu=False), (8, 21, 35), "8 channels, 8 images"),
    (Layer(32, 32, (3, 5), (2, 2, 1, 1), "zeros", parameter=torch.float32), (1, 13, 37), "3x5, fp32 norm"),
    (Layer(16, 32, (4, 4), stride=2), (1, 22, 70), "4x4, stride 2"),
    (LEAKY, (2, 19, 43), "a leaky ReLU on the way in"),
    (LEAKY._replace(norm="none", stride=2), (1, 37, 53), "a leaky ReLU without a norm"),
    (SKIP._replace(activation="clamp(0.0, 1.5)"), (1, 19, 43), "clamped, and a residual"),
    (ENDING._replace(output="leaky_relu(0.2)"), (2, 37, 53), "a network without norms"),
    (ENDING._replace(output="silu"), (1, 16, 64), "SiLU behind the convolution, whole tiles"),
    (ENDING._replace(output="tanh * 150.0 + 127.5", upsample=2), (1, 19, 27), "scaled, enlarged"),
    (LARGE_SKIP._replace(activation="gelu"), (1, 20, 33), "GELU: in a pass before the kernel"),
)
BFLOAT16 = (PLAIN, SKIP, HALVING, DOUBLING)  # the others' dtype is float16, to compile less
FLOAT32 = (*BFLOAT16, BARE, LARGE_SKIP, SMALL_DOUBLING, GENERAL, LEAKY, Layer(8, 24, (7, 7), (3, 2, 1, 3)))
IDS = [f"{why} {'x'.join(map(str, size))}".replace(":", "").replace(" ", "-") for _, size, why in CASES]


def norm_operands(layer: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    """Mean, variance, weight and bias of the norm that ``layer`` applies to its input; None without one."""
    if layer.norm == "none":
        return (None,) * 4
    c, device = x.shape[1], x.device
    if layer.norm == "instance":
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    else:
        mean, variance = torch.randn(c, device=device) * 0.3, torch.rand(c, device=device) + 0.5
    gamma = (torch.rand(c, device=device) + 0.5).to(layer.parameter or x.dtype)
    beta = (torch.randn(c, device=device) * 0.3).to(layer.parameter or x.dtype)
    return mean, variance, gamma, beta


def far_from_zero(a: Arguments) -> Arguments:
    """``a`` averaging pixels of 0 to 255, less their noise's tails: a mean of many deviations."""
    x = (100 + 24 * torch.randn(a.input.shape, device=a.input.device)).half()
    weight = (torch.ones_like(a.weight) / a.weight[0].numel()).contiguous()
    return a._replace(input=x.contiguous(memory_format=torch.channels_last), weight=weight)


def check_margins(a: Arguments, expected: Sequence[Tensor], monkeypatch: Any) -> None:
    """``halo_conv`` gives ``expected`` and writes its outputs alone, of memory that has NaN around them."""
    margin, buffers = 65536, []

    def amid_nan(shape: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
        n, c, h, w = shape
        elements = margin + n * c * h * w + margin
        buffers.append(torch.full((elements,), float("nan"), dtype=dtype, device="cuda"))
        return buffers[-1][margin:-margin].view(n, h, w, c).permute(0, 3, 1, 2)

    monkeypatch.setattr(halo_conv, "empty_image", amid_nan)
    assert equal(halo_conv.conv2d(a), expected) and len(buffers) == 1
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()
        assert buffer[margin:-margin].isfinite().all()


def made(
    layer: Layer, size: tuple[int, int, int], dtype: torch.dtype = torch.float16, device: str = "cuda"
) -> Arguments:
    """Arguments for pictures of ``size`` (N, H, W), with images of NaN before and after them in memory."""
    n, h, w = size
    c, o = layer.channels, layer.out_channels

    def amid_nan() -> Tensor:
        around = torch.full((n + 2, c, h, w), float("nan"), dtype=dtype, device=device)
        around = around.contiguous(memory_format=torch.channels_last)
        around[1:-1] = torch.randn(n, c, h, w, device=device).to(dtype)
        return around[1:-1]

    x = amid_nan()
    channels = (c, o) if layer.transposed else (o, c)
    weight = torch.randn(*channels, *layer.kernel, device=device)
    weight /= (c * layer.kernel[0] * layer.kernel[1]) ** 0.5
    norm = norm_operands(layer, x)
    return Arguments(
        x, weight.to(dtype), torch.randn(o, device=device).to(dtype) if layer.bias else None, *norm,
        1e-5, layer.activation or ("relu" if layer.relu else "none"),
        amid_nan() if layer.residual else None,
        layer.upsample, list(layer.padding), layer.mode, [layer.stride] * 2,
        "relu" if layer.output_relu else layer.output, layer.statistics, layer.keep, True,
        layer.transposed,
    )  # fmt: skip


def fused(a: Arguments) -> Arguments:
    """What this kernel gets of ``a``: everything, or what is left after a pass for the residual."""
    return a if halo_conv.refusal(a) is None else convolution._finished(a, a.input)


def run(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs; every layer here has to come from this kernel."""
    assert halo_conv.refusal(fused(a)) is None
    results = ops.conv2d(*a)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    return results


def steps(a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and z, one PyTorch step after the other, all in ``dtype``: eager's, or the exact ones."""
    z = a.input.to(dtype)
    if a.mean is not None:
        if dtype == torch.float64:
            mean, variance, gamma, beta = (v.double().reshape(-1, z.shape[1], 1, 1) for v in a.norm[:4])
            z = (z - mean) / torch.sqrt(variance + a.eps) * gamma + beta
        elif a.mean.dim() == 2 and z.shape[2:].numel() > 1:
            z = F.instance_norm(z, weight=a.norm_weight.to(dtype), bias=a.norm_bias.to(dtype), eps=a.eps)
        else:
            z = ops.normalize(a.input, *a.norm[:4], a.eps, "none", None, True)
    z = reference.activate_(z.clone(), a.activation)
    z = z if a.residual is None else z + a.residual.to(dtype)
    weight, bias = a.weight.to(dtype), None if a.bias is None else a.bias.to(dtype)
    if a.transposed:
        left, right, top, bottom = a.padding
        whole = F.conv_transpose2d(z, weight, bias, a.stride)
        out = whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
        return out.relu() if a.output_activation == "relu" else out, z
    padded = F.interpolate(z, scale_factor=float(a.upsample)) if a.upsample > 1 else z
    if any(a.padding):
        padded = F.pad(padded, a.padding, mode={"zeros": "constant"}.get(a.padding_mode, a.padding_mode))
    out = F.conv2d(padded, weight, bias, a.stride)
    return reference.activate_(out, a.output_activation), z


def in_tf32(a: Arguments, z: Tensor) -> Tensor:
    """The output for an exact finished input, its operands rounded to TF32 and nothing else."""
    operands = convolution._finished(a, tf32.rounded(z.float()))._replace(weight=tf32.rounded(a.weight))
    return steps(operands, torch.float64)[0]


def unit(dtype: torch.dtype) -> float:
    """The distance of 1 to the next larger number that an operand can be; of float32 in TF32."""
    return 2.0**-10 if dtype == torch.float32 else torch.finfo(dtype).eps


def check_picture(ours: Tensor, eager: Tensor, exact: Tensor, eps: float) -> None:
    """As close to float64 as eager is on the whole, and no single pixel far off."""
    assert ours.shape == exact.shape
    assert relative_error(ours, exact) <= 1.25 * relative_error(eager, exact) + eps / 8
    assert (ours.double() - exact).abs().max() <= 8 * eps * exact.abs().max()


def check_statistics(out: Tensor, mean: Tensor, variance: Tensor, exact: Tensor) -> None:
    """Those of what was written, but for its rounding, and of the exact output."""
    eps = unit(out.dtype)
    for picture, tolerance in ((out.double(), eps), (exact, 6 * eps)):
        true_variance, true_mean = torch.var_mean(picture, (2, 3), correction=0)
        scale = true_variance.sqrt() + true_mean.abs()
        assert mean.shape == variance.shape == true_mean.shape and (variance >= 0).all()
        assert ((mean - true_mean).abs() <= tolerance * scale).all()
        assert ((variance - true_variance).abs() <= tolerance * scale.square()).all()


def check(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``a``, its outputs in memory that held NaN, and compare all of them; returns them."""
    poison = [torch.full((2**k,), float("nan"), dtype=torch.float16, device="cuda") for k in range(9, 25)]
    del poison
    results = out, mean, variance, kept = run(a)
    exact, exact_z = steps(a, torch.float64)
    eager, eager_z = steps(a, a.input.dtype)
    if a.input.dtype == torch.float32:  # cuDNN uses TF32 or does not
        eager = in_tf32(a, exact_z)
    assert out.dtype == kept.dtype == a.input.dtype
    check_picture(out, eager, exact, unit(out.dtype))
    if a.statistics:
        check_statistics(out, mean, variance, exact)
    else:
        assert mean.numel() == variance.numel() == 0
    if a.keep_input:
        check_picture(kept, eager_z, exact_z, torch.finfo(kept.dtype).eps)
    else:
        assert kept.numel() == 0
    return results


def equal(ours: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """The same bits, of NaN too."""
    bits = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.view(bits[a.element_size()]), b.view(bits[b.element_size()]))
        for a, b in zip(ours, others, strict=True)
    )


def compile_all(layers: Iterable[tuple[Layer, torch.dtype]]) -> None:
    """Compile the kernels of ``layers`` side by side, so that the tests find them in the cache."""
    keys = []
    for layer, dtype in layers:
        a = made(layer, (1, 16, 32), dtype)
        variant = halo_conv._variant(fused(a))
        keys.append(KernelKey(halo_conv.SOURCE, tuple(variant.constants().items()), "sm_90a"))
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, dict.fromkeys(keys)))
