"""ReCoNet (Gao and others, 2018): the video network, which also returns its features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.row import Architecture


def conv_norm_relu(inputs, outputs, kernel, stride=1, relu=True):
    layers = [
        nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel, stride),
        nn.InstanceNorm2d(outputs, affine=True),
    ]  # fmt: skip
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Block(nn.Module):
    """The ReLU comes after the addition."""

    def __init__(self, channels):
        super().__init__()
        first = conv_norm_relu(channels, channels, 3)
        self.branch = nn.Sequential(first, conv_norm_relu(channels, channels, 3, relu=False))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.branch(x))


class Up(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.up = nn.UpsamplingNearest2d(scale_factor=2)
        self.layer = conv_norm_relu(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.up(x))


class ReCoNet(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        w1, w2, w4 = width, 2 * width, 4 * width
        down = (conv_norm_relu(3, w1, 9), conv_norm_relu(w1, w2, 3, 2), conv_norm_relu(w2, w4, 3, 2))
        self.encoder = nn.Sequential(*down, *(Block(w4) for _ in range(blocks)))
        last = nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(w1, 3, 9))
        self.decoder = nn.Sequential(Up(w4, w2), Up(w2, w1), last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return features, torch.tanh(self.decoder(features))


ROWS = (Architecture("ReCoNet", lambda: ReCoNet(8, 4), ((1, 3, 40, 32),), 14, 14, 13),)
