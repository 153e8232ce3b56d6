"""CartoonGAN (Chen and others, 2018): zero pads of the convolutions themselves, and pairs of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.row import Architecture


class HandNorm(nn.Module):
    """Unbiased variance of the flattened planes, put right, expanded; parameters named as in the port."""

    def __init__(self, channels, eps=1e-9):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)
        self.shift = nn.Parameter(torch.randn(channels) * 0.3)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(2) * x.size(3)
        planes = x.view(x.size(0), x.size(1), n)
        mean = planes.mean(2).unsqueeze(2).unsqueeze(3).expand_as(x)
        var = planes.var(2).unsqueeze(2).unsqueeze(3).expand_as(x) * ((n - 1) / float(n))
        scale = self.scale.unsqueeze(1).unsqueeze(1).unsqueeze(0).expand_as(x)
        shift = self.shift.unsqueeze(1).unsqueeze(1).unsqueeze(0).expand_as(x)
        return (x - mean) / torch.sqrt(var + self.eps) * scale + shift


def module_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels)


class Block(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, 1, 1), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(out)) + x


def cartoon_gan(width: int, blocks: int, norm=module_norm) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 7, 1, 3), norm(width), nn.ReLU(True)]
    for a, b in ((width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, b, 3, 1, 1), norm(b), nn.ReLU(True)]
    layers += [Block(4 * width, norm) for _ in range(blocks)]
    for a, b in ((4 * width, 2 * width), (2 * width, width)):
        layers += [nn.ConvTranspose2d(a, b, 3, 2, 1, 1), nn.Conv2d(b, b, 3, 1, 1), norm(b), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 7, 1, 3), nn.Tanh())


ROWS = (
    Architecture("CartoonGAN", lambda: cartoon_gan(8, 3), ((1, 3, 32, 40),), 16, 16, 11),
    Architecture("CartoonGAN, by hand", lambda: cartoon_gan(8, 2, HandNorm), ((2, 3, 36, 32),), 14, 14, 9),
)
