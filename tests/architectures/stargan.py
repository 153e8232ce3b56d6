"""StarGAN and StarGAN v2 (Choi and others), and SPADE (Park and others, 2019)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def tracked(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


def affine(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


class StarGANBlock(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class StarGAN(nn.Module):
    """A picture with one plane for each label."""

    def __init__(self, width, labels, blocks, norm):
        super().__init__()
        layers = [nn.Conv2d(3 + labels, width, 7, 1, 3, bias=False), norm(width), nn.ReLU(inplace=True)]
        for a in (width, 2 * width):
            layers += [nn.Conv2d(a, 2 * a, 4, 2, 1, bias=False), norm(2 * a), nn.ReLU(inplace=True)]
        layers += [StarGANBlock(4 * width, norm) for _ in range(blocks)]
        for a in (4 * width, 2 * width):
            layers += [
                nn.ConvTranspose2d(a, a // 2, 4, 2, 1, bias=False),
                norm(a // 2),
                nn.ReLU(inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 3, 7, 1, 3, bias=False), nn.Tanh())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        planes = labels.view(labels.size(0), labels.size(1), 1, 1)
        planes = planes.repeat(1, 1, x.size(2), x.size(3))
        return self.main(torch.cat([x, planes], dim=1))


class DownBlock(nn.Module):
    """norm - LeakyReLU - conv, twice, average pooling between; the skip is projected by 1x1."""

    def __init__(self, inputs, outputs, down):
        super().__init__()
        self.actv, self.down = nn.LeakyReLU(0.2), down
        self.conv1, self.conv2 = nn.Conv2d(inputs, inputs, 3, 1, 1), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm1, self.norm2 = affine(inputs), affine(inputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def shrink(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.down else x

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shrink(x if self.skip is None else self.skip(x))
        out = self.shrink(self.conv1(self.actv(self.norm1(x))))
        out = self.conv2(self.actv(self.norm2(out)))
        return (skip + out) / math.sqrt(2)


class AdaIN(nn.Module):
    def __init__(self, style_dim, channels):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels, affine=False)
        self.fc = nn.Linear(style_dim, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        h = self.fc(style)
        gamma, beta = torch.chunk(h.view(h.size(0), h.size(1), 1, 1), chunks=2, dim=1)
        return (1 + gamma) * self.norm(x) + beta


class UpBlock(nn.Module):
    """AdaIN - LeakyReLU - (enlarged) conv, twice."""

    def __init__(self, inputs, outputs, style_dim, up):
        super().__init__()
        self.actv, self.up = nn.LeakyReLU(0.2), up
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm1, self.norm2 = AdaIN(style_dim, inputs), AdaIN(style_dim, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        skip = self.enlarge(x)
        if self.skip is not None:
            skip = self.skip(skip)
        out = self.conv1(self.enlarge(self.actv(self.norm1(x, style))))
        out = self.conv2(self.actv(self.norm2(out, style)))
        return (out + skip) / math.sqrt(2)


class StarGANv2(nn.Module):
    def __init__(self, width, style_dim):
        super().__init__()
        w1, w2 = width, 2 * width
        self.from_rgb = nn.Conv2d(3, w1, 3, 1, 1)
        self.encode = nn.Sequential(
            DownBlock(w1, w2, True), DownBlock(w2, w2, True), DownBlock(w2, w2, False)
        )
        self.decode = nn.ModuleList(
            [
                UpBlock(w2, w2, style_dim, False),
                UpBlock(w2, w2, style_dim, True),
                UpBlock(w2, w1, style_dim, True),
            ]
        )
        self.to_rgb = nn.Sequential(affine(w1), nn.LeakyReLU(0.2), nn.Conv2d(w1, 3, 1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.encode(self.from_rgb(x))
        for block in self.decode:
            x = block(x, style)
        return self.to_rgb(x)


class SPADE(nn.Module):
    """An instance norm whose scale and shift are pictures, made of the segmentation."""

    def __init__(self, channels, labels, hidden):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels, affine=False)
        self.shared = nn.Sequential(nn.Conv2d(labels, hidden, 3, padding=1), nn.ReLU())
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, segmentation: Tensor) -> Tensor:
        normalized = self.norm(x)
        hidden = self.shared(F.interpolate(segmentation, size=x.size()[2:], mode="nearest"))
        return normalized * (1 + self.gamma(hidden)) + self.beta(hidden)


class SPADEBlock(nn.Module):
    def __init__(self, inputs, outputs, labels):
        super().__init__()
        middle = min(inputs, outputs)
        self.conv_0, self.norm_0 = nn.Conv2d(inputs, middle, 3, padding=1), SPADE(inputs, labels, 8)
        self.conv_1, self.norm_1 = nn.Conv2d(middle, outputs, 3, padding=1), SPADE(middle, labels, 8)

    def forward(self, x: Tensor, segmentation: Tensor) -> Tensor:
        out = self.conv_0(F.leaky_relu(self.norm_0(x, segmentation), 2e-1))
        out = self.conv_1(F.leaky_relu(self.norm_1(out, segmentation), 2e-1))
        return x + out if x.shape == out.shape else out


class SPADEGenerator(nn.Module):
    """Starts from the shrunk segmentation."""

    def __init__(self, width, labels):
        super().__init__()
        self.head = nn.Conv2d(labels, 2 * width, 3, padding=1)
        widths = ((2 * width, 2 * width), (2 * width, width))
        self.blocks = nn.ModuleList(SPADEBlock(a, b, labels) for a, b in widths)
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, segmentation: Tensor) -> Tensor:
        h, w = segmentation.shape[2] // 4, segmentation.shape[3] // 4
        x = self.head(F.interpolate(segmentation, size=(h, w)))
        for block in self.blocks:
            x = self.up(block(x, segmentation))
        return torch.tanh(self.last(F.leaky_relu(x, 2e-1)))


ALONE = ("nothing around it",)
LABELLED = ((2, 3, 32, 40), (2, 5))
ROWS = (
    Architecture("StarGAN", lambda: StarGAN(8, 5, 2, affine), LABELLED, 10, 10, 9),
    Architecture("StarGAN, tracked", lambda: StarGAN(8, 5, 2, tracked), LABELLED, 10, 10, 9),
    # The first convolution stands alone, as does the 1x1 one of the only skip path that is not enlarged.
    Architecture("StarGAN v2", lambda: StarGANv2(8, 6), ((2, 3, 32, 40), (2, 6)), 16, 14, 13, ALONE),
    Architecture("SPADE", lambda: SPADEGenerator(8, 6), ((1, 6, 32, 40),), 18, 0, 4, ALONE),
)
