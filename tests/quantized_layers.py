"""The layers on which convolutions of 8-bit integers are tested, each with a reason, and their operands."""

from __future__ import annotations

import torch
from halo_layers import PLAIN, Layer
from torch import Tensor

from sf_compile.ops import quantization
from sf_compile.ops.conv2d_arguments import Arguments

SKIP = PLAIN._replace(relu=False, residual=True, keep=True)
UP = Layer(128, 64, upsample=2, relu=False, residual=True)

CASES = (
    (PLAIN, (1, 37, 53), "height and width odd"),
    (PLAIN, (1, 5, 6), "a picture smaller than a tile"),
    (PLAIN, (2, 8, 32), "exactly a tile"),
    (PLAIN, (1, 9, 33), "a pixel more than a tile each way"),
    (PLAIN, (1, 135, 241), "several tiles a block, ragged at both ends"),
    (PLAIN, (3, 16, 64), "three images of whole tiles"),
    (PLAIN, (9, 8, 32), "an image a tile: the unit changes with every tile"),
    (SKIP, (1, 37, 53), "signed, of a residual, and kept"),
    (SKIP, (3, 40, 70), "three images, ragged"),
    (SKIP._replace(mode="zeros"), (2, 19, 33), "zeros outside, which are exact"),
    (Layer(64, 64), (1, 41, 72), "one slot a tile"),
    (Layer(64, 64, relu=False, residual=True, keep=True), (2, 19, 43), "64 channels, signed"),
    (Layer(256, 256), (1, 24, 40), "four slots a tile, weights of 147 KB"),
    (Layer(48, 40, (5, 5), (2, 1, 0, 2), "replicate"), (1, 30, 50), "5x5, uneven padding"),
    (Layer(16, 24, (7, 7), (3, 2, 1, 3)), (1, 20, 45), "7x7, slots of 32 bytes"),
    (Layer(64, 128, stride=2), (1, 37, 53), "stride 2"),
    (Layer(64, 256, (1, 1), (0, 0, 0, 0)), (2, 21, 40), "1x1"),
    (UP, (1, 19, 27), "sub-pixel, a row block for each parity"),
    (UP._replace(relu=True, residual=False), (2, 16, 64), "sub-pixel, unsigned, whole tiles"),
    (Layer(64, 32, upsample=2), (2, 19, 40), "sub-pixel, row blocks shared by two parities"),
    (Layer(32, 16, upsample=2, mode="zeros"), (1, 17, 33), "sub-pixel, a row block shared by four parities"),
)
IDS = [f"{why} {'x'.join(map(str, size))}".replace(":", "").replace(" ", "-") for _, size, why in CASES]


def made(
    layer: Layer, size: tuple[int, int, int], dtype: torch.dtype = torch.float16, device: str = "cpu"
) -> Arguments:
    """Arguments for pictures of ``size`` (N, H, W); the scale cuts off the largest of their numbers."""
    n, h, w = size
    c, o = layer.channels, layer.out_channels

    def picture() -> Tensor:
        x = torch.randn(n, c, h, w, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    x = picture()
    weight = torch.randn(o, c, *layer.kernel, device=device) / (c * layer.kernel[0] * layer.kernel[1]) ** 0.5
    variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    gamma = (torch.rand(c, device=device) + 0.5).to(dtype)
    beta = (torch.randn(c, device=device) * 0.3).to(dtype)
    activation = "relu" if layer.relu else "none"
    integers = quantization.input_dtype(activation, layer.residual)
    return Arguments(
        x, weight.to(dtype), None, mean, variance, gamma, beta, 1e-5, activation,
        picture() if layer.residual else None, layer.upsample, list(layer.padding), layer.mode,
        [layer.stride] * 2, "none", True, layer.keep, True, False, "auto", None,
        4.0 / quantization.bound(integers),
    )  # fmt: skip


def integers(a: Arguments) -> Tensor:
    """Random 8-bit integers of the kind that ``a`` rounds its input to, both bounds among them."""
    dtype = quantization.input_dtype(a.activation, a.residual is not None)
    limits = torch.iinfo(dtype)
    q = torch.randint(limits.min, limits.max + 1, a.input.shape, device=a.input.device, dtype=dtype)
    return q.contiguous(memory_format=torch.channels_last)


def on_cpu(a: Arguments) -> Arguments:
    """``a`` on the CPU."""
    return Arguments(*(v.cpu() if isinstance(v, Tensor) else v for v in a))
