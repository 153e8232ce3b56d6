"""MSG-Net (Zhang and Dana, 2017): pre-activation blocks, and a layer that matches Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.row import Architecture
from architectures.transformer_net import ConvLayer

EXPANSION = 4


def gram(features: Tensor) -> Tensor:
    """(N, C, C) of (N, C, H, W)."""
    n, c, h, w = features.size()
    planes = features.view(n, c, h * w)
    return planes.bmm(planes.transpose(1, 2)) / (c * h * w)


class Inspiration(nn.Module):
    """Multiplies the channels by a learned matrix times the style's Gram matrix."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, channels) * 0.02)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        matrix = torch.bmm(self.weight.expand_as(target), target)
        planes = x.view(x.size(0), x.size(1), -1)
        return torch.bmm(matrix.transpose(1, 2).expand(x.size(0), -1, -1), planes).view_as(x)


def pre(channels):
    return [nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]


class Bottleneck(nn.Module):
    """(norm - ReLU - conv) three times; a projected skip where the shape changes."""

    def __init__(self, inputs, planes, stride=1, project=False):
        super().__init__()
        outputs = planes * EXPANSION
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if project else None
        self.branch = nn.Sequential(
            *pre(inputs), nn.Conv2d(inputs, planes, 1), *pre(planes), ConvLayer(planes, planes, 3, stride),
            *pre(planes), nn.Conv2d(planes, outputs, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.project is None else self.project(x)
        return residual + self.branch(x)


class UpBottleneck(nn.Module):
    def __init__(self, inputs, planes):
        super().__init__()
        self.skip = ConvLayer(inputs, planes * EXPANSION, 1, upsample=2)
        self.branch = nn.Sequential(
            *pre(inputs), nn.Conv2d(inputs, planes, 1),
            *pre(planes), ConvLayer(planes, planes, 3, upsample=2),
            *pre(planes), nn.Conv2d(planes, planes * EXPANSION, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class MSGNet(nn.Module):
    """A picture and a style picture, to the picture in that style."""

    def __init__(self, width=4, blocks=2):
        super().__init__()
        wide, widest = width * EXPANSION, 2 * width * EXPANSION
        self.encoder = nn.Sequential(
            ConvLayer(3, 2 * width, 7), *pre(2 * width), Bottleneck(2 * width, width, 2, True),
            Bottleneck(wide, 2 * width, 2, True),
        )  # fmt: skip
        self.inspiration = Inspiration(widest)
        self.blocks = nn.Sequential(*(Bottleneck(widest, 2 * width) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            UpBottleneck(widest, width), UpBottleneck(wide, width // 2), *pre(2 * width),
            ConvLayer(2 * width, 3, 7),
        )  # fmt: skip

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        target = gram(self.encoder(style))
        features = self.inspiration(self.encoder(x), target)
        return self.decoder(self.blocks(features))


ROWS = (Architecture("MSG-Net", MSGNet, ((1, 3, 32, 40), (1, 3, 36, 32)), 33, 33, 27, peak=255),)
