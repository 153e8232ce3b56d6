"""Networks with concatenations between a norm and the next convolution: DenseNet and U-Net variants."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture
from architectures.transformer_net import ConvLayer, ModuleNet


class DenseBlock(nn.Module):
    """norm - ReLU - conv, concatenated with what entered; a 1x1 transition back to ``channels``."""

    def __init__(self, channels, growth=8, layers=3):
        super().__init__()
        widths = [channels + i * growth for i in range(layers + 1)]
        self.norms = nn.ModuleList(nn.InstanceNorm2d(width, affine=True) for width in widths)
        self.convs = nn.ModuleList(ConvLayer(width, growth, 3) for width in widths[:-1])
        self.transition = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs):  # noqa: B905  the last norm is the transition's
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return self.transition(F.relu(self.norms[-1](x)))


class UNet(nn.Module):
    """Reflection pads, nearest upsampling, and the encoder's pictures concatenated in the decoder."""

    def __init__(self, width):
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.first = self.stage(3, widths[0])
        self.downs = nn.ModuleList(self.stage(a, b, stride=2) for a, b in pairwise(widths))
        self.ups = nn.ModuleList([self.stage(widths[2] + widths[1], widths[1])])
        self.ups.append(self.stage(widths[1] + widths[0], widths[0]))
        self.last = ConvLayer(widths[0], 3, 9)

    @staticmethod
    def stage(inputs, outputs, stride=1):
        norm = nn.InstanceNorm2d(outputs, affine=True)
        return nn.Sequential(ConvLayer(inputs, outputs, 3, stride), norm, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.first(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        y = skips.pop()
        for up in self.ups:
            y = up(torch.cat((F.interpolate(y, scale_factor=2, mode="nearest"), skips.pop()), 1))
        return torch.sigmoid(self.last(y))


class SkipLevel(nn.Module):
    """One level of the pix2pix U-Net: its LeakyReLU writes into the tensor that is concatenated later."""

    def __init__(self, outer, inner, inside=None, inputs=None):
        super().__init__()
        outermost, inputs = inputs is not None, inputs or outer
        down = [nn.Conv2d(inputs, inner, 4, 2, 1, bias=outermost)]
        up = [nn.ReLU(True)]
        if not outermost:
            down = [nn.LeakyReLU(0.2, True), *down]
        if inside is not None and not outermost:
            down.append(nn.InstanceNorm2d(inner))
        up.append(nn.ConvTranspose2d(inner if inside is None else 2 * inner, outer, 4, 2, 1, bias=outermost))
        up += [nn.Tanh()] if outermost else [nn.InstanceNorm2d(outer), nn.Dropout(0.5)]
        self.model = nn.Sequential(*down, *([inside] if inside is not None else []), *up)
        self.outermost = outermost

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out if self.outermost else torch.cat([x, out], 1)


def pix2pix(width: int) -> nn.Module:
    inside = SkipLevel(4 * width, 4 * width)
    for outer, inner in ((2 * width, 4 * width), (width, 2 * width)):
        inside = SkipLevel(outer, inner, inside)
    return SkipLevel(3, width, inside, inputs=3)


ROWS = (
    Architecture("DenseNet", lambda: ModuleNet(8, 2, block=DenseBlock), ((1, 3, 32, 40),), 14, 14, 13),
    Architecture("U-Net", lambda: UNet(8), ((1, 3, 32, 40),), 6, 6, 5),
    # Of the pix2pix U-Net two convolutions have a norm, and three transposed ones; the others stand alone.
    Architecture("U-Net, pix2pix", lambda: pix2pix(8), ((2, 3, 48, 32),), 8, 5, 5, ("nothing around it",)),
)
