"""The transform network with the residual blocks of classifiers: bottleneck, ResNeXt, Fire, MobileNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.row import Architecture
from architectures.transformer_net import ConvLayer, ModuleNet


def norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


class GroupedLayer(nn.Module):
    """A reflection pad and a grouped 3x3 convolution."""

    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(inputs, outputs, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


class Bottleneck(nn.Module):
    """1x1 - 3x3 - 1x1 and a projected skip; the 1x1 layers reflect by no pixel. ``groups``: ResNeXt's."""

    def __init__(self, channels, groups=1):
        super().__init__()
        inner = channels // 2
        middle = ConvLayer(inner, inner, 3) if groups == 1 else GroupedLayer(inner, inner, groups)
        self.convs = nn.ModuleList([ConvLayer(channels, inner, 1), middle, ConvLayer(inner, channels, 1)])
        self.norms = nn.ModuleList(norm(c) for c in (inner, inner, channels))
        self.project, self.project_norm = ConvLayer(channels, channels, 1), norm(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norms[0](self.convs[0](x)))
        out = self.relu(self.norms[1](self.convs[1](out)))
        out = self.norms[2](self.convs[2](out))
        return out + self.project_norm(self.project(x))


class Fire(nn.Module):
    """Squeeze by 1x1, expand by 1x1 and 3x3 side by side, concatenate."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze, self.squeeze_norm = ConvLayer(channels, channels // 4, 1), norm(channels // 4)
        self.expand1, self.norm1 = ConvLayer(channels // 4, channels // 2, 1), norm(channels // 2)
        self.expand3, self.norm3 = ConvLayer(channels // 4, channels // 2, 3), norm(channels // 2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        small = self.relu(self.squeeze_norm(self.squeeze(x)))
        sides = [self.norm1(self.expand1(small)), self.norm3(self.expand3(small))]
        return torch.cat(sides, 1) + x


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by itself, project by 1x1; ReLU6."""

    def __init__(self, channels):
        super().__init__()
        wide = 2 * channels
        self.branch = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), norm(wide), nn.ReLU6(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(wide, wide, 3, groups=wide, bias=False), norm(wide),
            nn.ReLU6(inplace=True), nn.Conv2d(wide, channels, 1, bias=False), norm(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Separable(nn.Module):
    """Twice a depthwise 3x3 and a pointwise convolution, one norm after each pair."""

    def __init__(self, channels):
        super().__init__()
        self.depth = nn.ModuleList(GroupedLayer(channels, channels, channels) for _ in range(2))
        self.point = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norms[0](self.point[0](self.depth[0](x))))
        return self.norms[1](self.point[1](self.depth[1](out))) + x


def _row(name, block, dense, norms, declined=()):
    return Architecture(
        name, lambda: ModuleNet(8, 2, block=block), ((1, 3, 32, 40),), dense, dense, norms, declined
    )


GROUPED = ("grouped convolution",)
ROWS = (
    _row("bottleneck", Bottleneck, 14, 13),
    _row("ResNeXt", lambda channels: Bottleneck(channels, groups=4), 12, 13, GROUPED),
    _row("Fire", Fire, 12, 11),
    _row("MobileNet, inverted residuals", InvertedResidual, 10, 11, GROUPED),
    _row("MobileNet, separable", Separable, 10, 9, GROUPED),
)
