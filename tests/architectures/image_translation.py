"""Generators of unpaired translation and deblurring: CycleGAN, CUT, DeblurGAN, GANILLA, pix2pixHD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def plain_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=False, track_running_stats=False)


def tracked_norm(channels: int) -> nn.Module:
    """As in old releases: in eval it normalises by what it saw in training."""
    return nn.InstanceNorm2d(channels, affine=False, track_running_stats=True)


class ResnetBlock(nn.Module):
    def __init__(self, channels, norm, dropout):
        super().__init__()
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norm(channels), nn.ReLU(True)]
        layers += [nn.Dropout(0.5)] if dropout else []
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norm(channels)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def binomial(size: int) -> Tensor:
    row = torch.tensor([1.0, 2.0, 1.0] if size == 3 else [1.0, 3.0, 3.0, 1.0])
    return row[:, None] * row[None, :] / row.sum() ** 2


class BlurDown(nn.Module):
    """Halves the picture by a fixed binomial filter, each channel by itself."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.register_buffer("filter", binomial(3).repeat(channels, 1, 1, 1))
        self.pad = nn.ReflectionPad2d([1, 1, 1, 1])

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filter, stride=2, groups=x.shape[1])


class BlurUp(nn.Module):
    """Doubles it by a transposed binomial filter, and crops."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("filter", 4 * binomial(4).repeat(channels, 1, 1, 1))
        self.pad = nn.ReplicationPad2d([1, 1, 1, 1])

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv_transpose2d(self.pad(x), self.filter, stride=2, padding=2, groups=x.shape[1])
        return out[:, :, 1:, 1:][:, :, :-1, :-1]


class ResnetGenerator(nn.Module):
    """7x7 - down - down - blocks - up - up - 7x7 - tanh.

    ``blur``: CUT's filters instead of strides. ``residual``: the picture is added, and the sum clamped.
    """

    def __init__(self, width, blocks, norm=plain_norm, dropout=False, blur=False, residual=False):
        super().__init__()
        self.residual = residual
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width), nn.ReLU(True)]
        for a, b in ((width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if blur else 2, padding=1), norm(b), nn.ReLU(True)]
            layers += [BlurDown(b)] if blur else []
        layers += [ResnetBlock(4 * width, norm, dropout) for _ in range(blocks)]
        for a, b in ((4 * width, 2 * width), (2 * width, width)):
            if blur:
                layers += [BlurUp(a), nn.Conv2d(a, b, 3, padding=1)]
            else:
                layers.append(nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1))
            layers += [norm(b), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return torch.clamp(x + out, min=-1, max=1) if self.residual else out


class GanillaBlock(nn.Module):
    """A basic block whose skip is concatenated, and merged by a third convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1, self.in1 = nn.Conv2d(inputs, outputs, 3, stride, bias=False), plain_norm(outputs)
        self.conv2, self.in2 = nn.Conv2d(outputs, outputs, 3, bias=False), plain_norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), plain_norm(outputs)
            )
        self.conv3, self.in3 = nn.Conv2d(2 * outputs, outputs, 3, bias=False), plain_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.in1(self.conv1(self.pad(x))))
        out = self.in2(self.conv2(self.pad(out)))
        out = torch.cat((out, self.shortcut(x)), 1)
        return F.relu(self.in3(self.conv3(self.pad(out))))


class Ganilla(nn.Module):
    """A ResNet whose stages are projected by 1x1, enlarged and added up."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), plain_norm(width), nn.ReLU(True)
        )
        self.stages = nn.ModuleList(
            [
                GanillaBlock(width, width, 1),
                GanillaBlock(width, 2 * width, 2),
                GanillaBlock(2 * width, 4 * width, 2),
            ]
        )
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (width, 2 * width, 4 * width))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.last = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pictures = []
        for stage in self.stages:
            x = stage(x)
            pictures.append(x)
        y = self.laterals[2](pictures[2])
        for i in (1, 0):
            y = self.laterals[i](pictures[i]) + self.up(y)
        return self.last(y)


class LocalEnhancer(nn.Module):
    """pix2pixHD: a global generator of the halved picture, added into a local one of the picture."""

    def __init__(self, width, blocks):
        super().__init__()
        wide = ResnetGenerator(2 * width, blocks).model
        self.coarse = wide[:-3]
        self.shrink = nn.AvgPool2d(3, stride=2, padding=[1, 1], count_include_pad=False)
        self.down = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), plain_norm(width), nn.ReLU(True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), plain_norm(2 * width), nn.ReLU(True),
        )  # fmt: skip
        self.up = nn.Sequential(
            ResnetBlock(2 * width, plain_norm, False),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1), plain_norm(width),
            nn.ReLU(True), nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x) + self.coarse(self.shrink(x)))


PICTURE = ((1, 3, 32, 40),)
ROWS = (
    Architecture("CycleGAN", lambda: ResnetGenerator(8, 3), PICTURE, 12, 12, 11),
    Architecture("CycleGAN, dropout", lambda: ResnetGenerator(8, 2, dropout=True), PICTURE, 10, 10, 9),
    Architecture("CycleGAN, tracked", lambda: ResnetGenerator(8, 2, tracked_norm), PICTURE, 10, 10, 9),
    Architecture(
        "CUT", lambda: ResnetGenerator(8, 2, blur=True), PICTURE, 10, 10, 9, ("grouped convolution",)
    ),
    Architecture(
        "DeblurGAN", lambda: ResnetGenerator(8, 2, dropout=True, residual=True), ((2, 3, 40, 32),), 10, 10, 9
    ),
    Architecture("GANILLA", lambda: Ganilla(8), PICTURE, 16, 16, 12),
    Architecture("pix2pixHD", lambda: LocalEnhancer(8, 2), ((1, 3, 48, 32),), 15, 15, 14),
)
