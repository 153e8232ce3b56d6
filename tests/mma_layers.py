"""The layers on which csrc/mma_conv.cu is tested, each with a reason: any kernel, stride and channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from halo_layers import check_picture, check_statistics, in_tf32, norm_operands, steps, unit
from torch import Tensor

from sf_compile.cuda import mma_conv
from sf_compile.ops.conv2d_arguments import Arguments

LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}


class Layer(NamedTuple):
    """One layer with everything that its kernel is compiled for, but the dtype.

    ``input``, ``residual`` and ``output`` say whether that picture is channels_last; no residual where None.
    """

    channels: int
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    mode: str = "reflect"
    stride: tuple[int, int] = (1, 1)
    upsample: int = 1
    norm: str = "instance"  # "running": mean and variance are (C,); "none"
    relu: bool = True
    residual: bool | None = None
    keep: bool = False
    bias: bool = False
    output_relu: bool = False
    statistics: bool = True
    input: bool = True
    output: bool = True
    parameter: torch.dtype | None = None  # of the norm's weight and bias; None: the picture's


PLAIN = Layer(20, 20)
BARE = Layer(32, 48, norm="none", relu=False)
SKIP = Layer(33, 24, relu=False, residual=True, keep=True)
PLANAR = Layer(12, 24, residual=True, keep=True, input=False, output=False)
FIRST = Layer(3, 32, (9, 9), (4, 4, 4, 4), norm="none", relu=False, bias=True, output_relu=True, input=False)
LAST = Layer(32, 3, (9, 9), (4, 4, 4, 4), bias=True, statistics=False, output=False)
HALVING = Layer(16, 24, stride=(2, 2))
DOUBLING = Layer(16, 8, upsample=2, keep=True)
WIDE_DOUBLING = Layer(24, 64, upsample=2, relu=False, residual=True)

CASES = (
    (PLAIN, (1, 37, 53), "loads of 4 channels, height and width odd"),
    (PLAIN, (1, 5, 5), "a picture smaller than a tile"),
    (PLAIN, (2, 16, 16), "exactly a tile"),
    (PLAIN, (8, 17, 18), "an image or two a block, a pixel more than a tile"),
    (SKIP, (2, 37, 53), "single channels, a residual, z kept"),
    (PLANAR, (3, 19, 22), "contiguous in and out, the residual channels_last"),
    (FIRST, (1, 29, 45), "three channels: four taps a product, contiguous input"),
    (LAST, (1, 29, 43), "three channels out, contiguous output of odd width"),
    (HALVING, (2, 37, 53), "stride 2"),
    (DOUBLING, (1, 19, 27), "enlarged by 2, z kept once"),
    (WIDE_DOUBLING, (2, 15, 16), "enlarged by 2, a window more than a tile"),
    (WIDE_DOUBLING, (2, 16, 15), "enlarged by 2, whole tiles of windows across"),
    (Layer(64, 32, upsample=2, mode="replicate"), (1, 37, 53), "enlarged by 2, 64 channels to 32"),
    (Layer(32, 24, upsample=2, mode="zeros", bias=True), (2, 1, 9), "enlarged by 2, a single row"),
    (DOUBLING._replace(out_channels=20), (1, 19, 27), "enlarged by 2, 20 channels: no form of parities"),
    (DOUBLING._replace(output=False), (1, 19, 27), "enlarged by 2, contiguous output"),
    (Layer(33, 5, (4, 2), (3, 0, 2, 1), "zeros", (1, 2), residual=False), (3, 22, 35), "even, uneven, odd"),
    (Layer(8, 24, (2, 6), (2, 3, 1, 0), "replicate", bias=True), (1, 20, 33), "8 channels: two taps at once"),
    (Layer(5, 12, (7, 7), (3, 3, 3, 3), stride=(2, 2)), (1, 37, 53), "5 channels before a stride"),
    (Layer(4, 16, (5, 5), (2, 2, 2, 2), stride=(3, 3), norm="running"), (2, 31, 40), "4 channels, stride 3"),
    (Layer(16, 16, (11, 11), (9, 10, 8, 9), keep=True), (1, 25, 30), "reflected by nearly a kernel"),
    (Layer(8, 8, (3, 3), (9, 7, 8, 6)), (1, 10, 10), "reflected by far more than a kernel"),
    (Layer(8, 8, (3, 3), (19, 0, 0, 21), "replicate"), (1, 7, 9), "tiles that see nothing but padding"),
    (Layer(16, 8, (1, 1), (2, 0, 0, 3), "zeros", (3, 3)), (1, 40, 50), "pixels that nobody reads"),
    (Layer(130, 70, (1, 1), (0, 0, 0, 0)), (1, 21, 35), "1x1, several blocks of channels, the last not full"),
    (Layer(48, 48, stride=(3, 3), upsample=3), (1, 21, 20), "enlarged by 3, stride 3"),
    (Layer(24, 40, (5, 5), (2, 1, 0, 2), "zeros", (2, 1), norm="running"), (1, 30, 50), "strides of its own"),
    (Layer(12, 20, (3, 5), (1, 2, 1, 2), upsample=5, keep=True, output=False), (1, 5, 7), "enlarged by 5"),
    (Layer(128, 128, residual=True, keep=True), (1, 40, 70), "8 chunks, weights through the ring"),
    (Layer(128, 130, (7, 7), (3, 3, 3, 3), output=False), (1, 24, 24), "a column of taps a stage"),
    (Layer(20, 3, (10, 10), (5, 4, 4, 5), output=False, output_relu=True), (2, 24, 32), "10x10, wide stores"),
    (Layer(40, 24, (6, 6), (2, 3, 2, 3), "replicate", (2, 2), bias=True), (1, 33, 47), "6x6, stride 2"),
    (Layer(64, 64, (8, 8), (0, 0, 0, 0), parameter=torch.float32), (1, 30, 44), "8x8, the norm in float32"),
    (Layer(1, 1, (3, 3), input=False, output=False), (2, 33, 50), "one channel in and out"),
    (Layer(256, 16, statistics=False, bias=True), (1, 20, 20), "many chunks, few channels out"),
)  # fmt: skip
BFLOAT16 = (PLAIN, SKIP, PLANAR, FIRST, HALVING, DOUBLING, WIDE_DOUBLING)
FLOAT32 = (
    *BFLOAT16, LAST, BARE, Layer(2, 24, (5, 5), (2, 2, 2, 2), "zeros", bias=True, keep=True),
    Layer(6, 8, norm="none", relu=False, output_relu=True, output=False),
    Layer(40, 24, (6, 6), (2, 3, 2, 3), "replicate", (2, 2), bias=True),
    Layer(128, 128, residual=True, keep=True),
)  # fmt: skip
IDS = [f"{why} {'x'.join(map(str, size))}".replace(":", "").replace(" ", "-") for _, size, why in CASES]


def made(
    layer: Layer, size: tuple[int, int, int], dtype: torch.dtype = torch.float16, device: str = "cuda"
) -> Arguments:
    """Arguments for pictures of ``size`` (N, H, W), with images of NaN before and after them in memory."""
    n, h, w = size
    c, o = layer.channels, layer.out_channels

    def amid_nan(channels_last: bool) -> Tensor:
        around = torch.full((n + 2, c, h, w), float("nan"), dtype=dtype, device=device)
        around = around.contiguous(memory_format=LAYOUTS[channels_last])
        around[1:-1] = torch.randn(n, c, h, w, device=device).to(dtype)
        return around[1:-1]

    x = amid_nan(layer.input)
    weight = torch.randn(o, c, *layer.kernel, device=device) / (c * layer.kernel[0] * layer.kernel[1]) ** 0.5
    norm = norm_operands(layer, x)
    return Arguments(
        x, weight.to(dtype), torch.randn(o, device=device).to(dtype) if layer.bias else None, *norm,
        1e-5, "relu" if layer.relu else "none",
        None if layer.residual is None else amid_nan(layer.residual), layer.upsample, list(layer.padding),
        layer.mode, list(layer.stride), "relu" if layer.output_relu else "none", layer.statistics, layer.keep,
        layer.output,
    )  # fmt: skip


def check(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``a`` by this kernel and compare all outputs with float64 and eager's; returns them."""
    results = out, mean, variance, kept = mma_conv.conv2d(a)
    exact, exact_z = steps(a, torch.float64)
    eager, eager_z = steps(a, a.input.dtype)
    if a.input.dtype == torch.float32:  # PyTorch uses TF32 or does not
        eager = in_tf32(a, exact_z)
    assert out.is_contiguous(memory_format=LAYOUTS[a.channels_last])
    check_picture(out, eager, exact, unit(out.dtype))
    if a.statistics:
        check_statistics(out, mean, variance, exact)
    else:
        assert mean.numel() == variance.numel() == 0
    if a.keep_input:
        assert kept.is_contiguous(memory_format=LAYOUTS[a.channels_last])
        check_picture(kept, eager_z, exact_z, torch.finfo(kept.dtype).eps)
    else:
        assert kept.numel() == 0
    return results
