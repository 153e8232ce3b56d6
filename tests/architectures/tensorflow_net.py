"""Ports of the TensorFlow transform network: SAME pads of zeros, no biases, eps 1e-3, scaled tanh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture

EPS = 1e-3


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pads x as TensorFlow's SAME: an odd zero goes to the right and to the bottom."""
    sides = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class SameConv(nn.Conv2d):
    """A SAME convolution without a bias."""

    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, self.weight, None, self.stride)


class CroppedTransposed(nn.Module):
    """A transposed convolution of stride 2 whose last row and column are cut off."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, 3, 3) / (3 * inputs**0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv_transpose2d(x, self.weight, stride=2)
        return out[:, :, : 2 * x.shape[2], : 2 * x.shape[3]]


class HandNorm(nn.Module):
    """As TensorFlow's moments: biased, over dims (2, 3), eps inside the root."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.3)
        self.scale = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        variance = x.var(dim=(2, 3), keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / (variance + EPS) ** 0.5) + self.shift


def module_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, eps=EPS, affine=True)


class Block(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.a, self.norm_a = SameConv(channels, channels, 3), norm(channels)
        self.b, self.norm_b = SameConv(channels, channels, 3), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x)))))


class TensorFlowNet(nn.Module):
    def __init__(self, width, blocks, norm):
        super().__init__()
        w1, w2, w4 = width, 2 * width, 4 * width
        down = ((3, w1, 9, 1), (w1, w2, 3, 2), (w2, w4, 3, 2))
        self.down = nn.ModuleList(SameConv(*sizes) for sizes in down)
        self.up = nn.ModuleList([CroppedTransposed(w4, w2), CroppedTransposed(w2, w1)])
        self.norms = nn.ModuleList(norm(channels) for channels in (w1, w2, w4, w2, w1, 3))
        self.blocks = nn.ModuleList(Block(w4, norm) for _ in range(blocks))
        self.last = SameConv(w1, 3, 9)

    def forward(self, x: Tensor) -> Tensor:
        norms = list(self.norms)
        for layer, norm in zip(self.down, norms[:3], strict=True):
            x = F.relu(norm(layer(x)))
        for block in self.blocks:
            x = block(x)
        for layer, norm in zip(self.up, norms[3:5], strict=True):
            x = F.relu(norm(layer(x)))
        return torch.tanh(norms[5](self.last(x))) * 150 + 255.0 / 2


ROWS = (
    Architecture(
        "TensorFlow, modules",
        lambda: TensorFlowNet(8, 5, module_norm),
        ((1, 3, 32, 40),),
        16,
        16,
        16,
        peak=255,
    ),
    Architecture(
        "TensorFlow, by hand", lambda: TensorFlowNet(8, 2, HandNorm), ((2, 3, 33, 38),), 10, 10, 10, peak=255
    ),
)
