"""The transform network of Johnson, Alahi and Fei-Fei (2016), spelled in each of PyTorch's ways.

9x9 - down - down - residual blocks - up - up - 9x9; reflection pads, instance norms, nearest upsampling
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


class ConvLayer(nn.Module):
    """Nearest upsampling (``upsample`` is a factor, 1 or None), reflection pad of half the kernel, conv."""

    def __init__(self, inputs, outputs, kernel, stride=1, upsample=None, bias=True):
        super().__init__()
        self.upsample = upsample
        self.pad = nn.ReflectionPad2d(kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample is not None and self.upsample > 1:
            x = F.interpolate(x, mode="nearest", scale_factor=self.upsample)
        return self.conv(self.pad(x))


def affine_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


class ResidualBlock(nn.Module):
    def __init__(self, channels, norm=affine_norm):
        super().__init__()
        self.conv1, self.norm1 = ConvLayer(channels, channels, 3), norm(channels)
        self.conv2, self.norm2 = ConvLayer(channels, channels, 3), norm(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(out)) + residual


class ModuleNet(nn.Module):
    """One attribute a layer, and one ReLU module for all of them.

    ``one`` is what a layer stores that does not upsample: 1 or None. ``block(channels)`` makes a block.
    """

    def __init__(self, width, blocks, norm=affine_norm, one=None, block=None):
        super().__init__()
        w1, w2, w4 = width, 2 * width, 4 * width
        self.conv1, self.in1 = ConvLayer(3, w1, 9, upsample=one), norm(w1)
        self.conv2, self.in2 = ConvLayer(w1, w2, 3, stride=2, upsample=one), norm(w2)
        self.conv3, self.in3 = ConvLayer(w2, w4, 3, stride=2, upsample=one), norm(w4)
        make = block or (lambda channels: ResidualBlock(channels, norm))
        self.blocks = nn.Sequential(*(make(w4) for _ in range(blocks)))
        self.up1, self.in4 = ConvLayer(w4, w2, 3, upsample=2), norm(w2)
        self.up2, self.in5 = ConvLayer(w2, w1, 3, upsample=2), norm(w1)
        self.last = ConvLayer(w1, 3, 9, upsample=one)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.in1(self.conv1(x)))
        y = self.relu(self.in2(self.conv2(y)))
        y = self.relu(self.in3(self.conv3(y)))
        y = self.blocks(y)
        y = self.relu(self.in4(self.up1(y)))
        y = self.relu(self.in5(self.up2(y)))
        return self.last(y)


class FunctionalNet(nn.Module):
    """Parameters in lists, everything else by torch.nn.functional; upsampled to a size, ReLUs in place."""

    def __init__(self, width, blocks):
        super().__init__()
        w1, w2, w4 = width, 2 * width, 4 * width
        layers = [(3, w1, 9), (w1, w2, 3), (w2, w4, 3), *[(w4, w4, 3)] * (2 * blocks)]
        layers += [(w4, w2, 3), (w2, w1, 3), (w1, 3, 9)]
        self.blocks = blocks
        self.kernels = nn.ParameterList(torch.randn(o, i, k, k) / (k * i**0.5) for i, o, k in layers)
        self.biases = nn.ParameterList(torch.randn(o) for _, o, _ in layers)
        self.scales = nn.ParameterList(torch.rand(o) + 0.5 for _, o, _ in layers[:-1])
        self.shifts = nn.ParameterList(torch.randn(o) for _, o, _ in layers[:-1])

    def layer(self, x, i, stride=1, size=None):
        if size is not None:
            x = F.interpolate(x, size=size)
        half = self.kernels[i].shape[-1] // 2
        x = F.pad(x, (half, half, half, half), mode="reflect")
        return F.conv2d(x, self.kernels[i], self.biases[i], stride=stride)

    def normed(self, x, i, stride=1, size=None):
        out = self.layer(x, i, stride, size)
        return F.instance_norm(out, weight=self.scales[i], bias=self.shifts[i])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.normed(x, 0), inplace=True)
        y = F.relu(self.normed(y, 1, stride=2), inplace=True)
        y = F.relu(self.normed(y, 2, stride=2), inplace=True)
        i = 3
        for _ in range(self.blocks):
            branch = F.relu(self.normed(y, i))
            y = torch.add(y, self.normed(branch, i + 1))
            i += 2
        for _ in range(2):
            size = (y.shape[2] * 2, y.shape[3] * 2)
            y = F.relu(self.normed(y, i, size=size))
            i += 1
        return self.layer(y, i)


class MethodBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.norms = nn.ModuleList(nn.InstanceNorm2d(channels, affine=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norms[0](self.first(x)).relu_()
        out = self.norms[1](self.second(branch))
        out += x
        return out


class Method(nn.Module):
    """Calls the tensor method ``name``."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x, self.name)()


def method_net(width: int, blocks: int) -> nn.Sequential:
    """nn.Sequential of padding_mode="reflect" convolutions, nn.Upsample and tensor methods."""

    def layer(inputs, outputs, kernel, stride=1, relu="relu"):
        half = kernel // 2
        conv = nn.Conv2d(inputs, outputs, kernel, stride, half, padding_mode="reflect")
        return [conv, nn.InstanceNorm2d(outputs, affine=True), Method(relu)]

    w1, w2, w4 = width, 2 * width, 4 * width
    return nn.Sequential(
        *layer(3, w1, 9), *layer(w1, w2, 3, 2, "relu_"), *layer(w2, w4, 3, 2),
        *(MethodBlock(w4) for _ in range(blocks)),
        nn.Upsample(scale_factor=2), *layer(w4, w2, 3, relu="relu_"),
        nn.Upsample(scale_factor=2, mode="nearest"), *layer(w2, w1, 3),
        nn.Conv2d(w1, 3, 9, padding=4, padding_mode="reflect"),
    )  # fmt: skip


class ShavedBlock(nn.Module):
    """A block without padding, whose skip path is cropped by the two pixels that the branch loses."""

    def __init__(self, channels):
        super().__init__()
        norms = (nn.InstanceNorm2d(channels, affine=True) for _ in range(2))
        convs = (nn.Conv2d(channels, channels, 3) for _ in range(2))
        self.branch = nn.Sequential(next(convs), next(norms), nn.ReLU(True), next(convs), next(norms))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 2:-2, 2:-2] + self.branch(x)


class ShavedNet(nn.Module):
    """Pads the picture once, far enough for blocks without padding, as the first release did."""

    def __init__(self, width, blocks):
        super().__init__()
        self.pad = nn.ReflectionPad2d(8 * blocks)
        self.net = ModuleNet(width, blocks, block=ShavedBlock)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.pad(x))


PICTURE = ((1, 3, 32, 40),)
ROWS = (
    Architecture("Johnson, modules", lambda: ModuleNet(8, 5), PICTURE, 16, 16, 15, peak=255),
    Architecture("Johnson, functions", lambda: FunctionalNet(8, 3), PICTURE, 12, 12, 11, peak=255),
    Architecture("Johnson, methods", lambda: method_net(16, 3), ((2, 3, 36, 32),), 12, 12, 11, peak=255),
    Architecture("Johnson, 64 wide, upsample 1", lambda: ModuleNet(64, 3, one=1), PICTURE, 12, 12, 11),
    Architecture("Johnson, 9 blocks", lambda: ModuleNet(8, 9, one=1), PICTURE, 24, 24, 23),
    Architecture("Johnson, shaved blocks", lambda: ShavedNet(8, 2), PICTURE, 10, 10, 9),
)
