"""AnimeGANv2 (Chen and others, 2020): group norms of one group, inverted residuals, bilinear upsampling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def layer(inputs, outputs, kernel=3, stride=1, padding=1, groups=1):
    """Reflection pad (on two sides only before a stride), conv, GroupNorm(1), LeakyReLU."""
    sides = (0, padding, 0, padding) if stride == 2 else padding
    return nn.Sequential(
        nn.ReflectionPad2d(sides), nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.GroupNorm(1, outputs, affine=True), nn.LeakyReLU(0.2, inplace=True),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, ratio=2):
        super().__init__()
        wide = inputs * ratio
        self.same = inputs == outputs
        self.layers = nn.Sequential(
            layer(inputs, wide, 1, 1, 0), layer(wide, wide, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.GroupNorm(1, outputs, affine=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.same else out


class AnimeGAN(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        w1, w2, w4, w8 = width, 2 * width, 4 * width, 8 * width
        self.a = nn.Sequential(layer(3, w1, 7, padding=3), layer(w1, w2, stride=2), layer(w2, w2))
        self.b = nn.Sequential(layer(w2, w4, stride=2), layer(w4, w4))
        inner = [InvertedResidual(w8, w8) for _ in range(blocks)]
        self.c = nn.Sequential(layer(w4, w4), InvertedResidual(w4, w8), *inner, layer(w8, w4))
        self.d = nn.Sequential(layer(w4, w4), layer(w4, w4))
        self.e = nn.Sequential(layer(w4, w2), layer(w2, w2), layer(w2, w1, 7, padding=3))
        self.out = nn.Sequential(nn.Conv2d(w1, 3, 1, bias=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        half = [size // 2 for size in x.size()[-2:]]
        out = self.c(self.b(self.a(x)))
        out = self.d(F.interpolate(out, half, mode="bilinear", align_corners=True))
        out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.e(out))


ROWS = (
    Architecture(
        "AnimeGANv2",
        lambda: AnimeGAN(8, 2),
        ((1, 3, 32, 40),),
        19,
        19,
        21,
        ("grouped convolution", "bilinear"),
    ),
)
