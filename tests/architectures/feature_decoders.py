"""Arbitrary style transfer by features: AdaIN, SANet, AdaAttN, LinearStyleTransfer, CCPL.

An encoder (as VGG-19's), a module that gives the content's features the style's statistics, and a decoder of
reflection pad + 3x3 convolution + ReLU without norms, with nearest upsampling between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def conv_relu(inputs, outputs):
    return [nn.ReflectionPad2d((1, 1, 1, 1)), nn.Conv2d(inputs, outputs, (3, 3)), nn.ReLU()]


class Encoder(nn.Module):
    """Two levels of features, at a half and a quarter of the picture's size."""

    def __init__(self, width):
        super().__init__()
        pool = nn.MaxPool2d((2, 2), (2, 2), (0, 0), ceil_mode=True)
        first = nn.Conv2d(3, 3, (1, 1))
        self.shallow = nn.Sequential(first, *conv_relu(3, width), *conv_relu(width, width), pool)
        self.deep = nn.Sequential(*conv_relu(width, 2 * width), pool, *conv_relu(2 * width, 2 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shallow = self.shallow(x)
        return shallow, self.deep(shallow)


ENCODER_CONVOLUTIONS = 4  # of each picture, and the 1x1 one in front of them


def decoder(width: int) -> nn.Sequential:
    """Five convolutions."""
    return nn.Sequential(
        *conv_relu(2 * width, 2 * width), nn.Upsample(scale_factor=2, mode="nearest"),
        *conv_relu(2 * width, width), *conv_relu(width, width), nn.Upsample(scale_factor=2, mode="nearest"),
        *conv_relu(width, width), nn.ReflectionPad2d((1, 1, 1, 1)), nn.Conv2d(width, 3, (3, 3)),
    )  # fmt: skip


def mean_std(features: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Of every plane, (N, C, 1, 1); the variance is unbiased."""
    n, c = features.size()[:2]
    variance = features.view(n, c, -1).var(dim=2) + eps
    return features.view(n, c, -1).mean(dim=2).view(n, c, 1, 1), variance.sqrt().view(n, c, 1, 1)


def normalized(features: Tensor) -> Tensor:
    mean, std = mean_std(features)
    return (features - mean.expand(features.size())) / std.expand(features.size())


class Transfer(nn.Module):
    """Encoder, ``match``, decoder."""

    def __init__(self, width, match):
        super().__init__()
        self.encoder, self.match, self.decoder = Encoder(width), match(2 * width), decoder(width)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        return self.decoder(self.match(self.encoder(content), self.encoder(style)))


class AdaIN(nn.Module):
    """The content normalised by its own statistics, then given the style's; mixed by ``alpha``."""

    def __init__(self, channels, alpha=0.75):
        super().__init__()
        self.alpha = alpha

    def forward(self, content, style):
        content, style = content[1], style[1]
        mean, std = mean_std(style)
        out = normalized(content) * std.expand(content.size()) + mean.expand(content.size())
        return out * self.alpha + content * (1 - self.alpha)


class Attention(nn.Module):
    """Every place of the content attends to the places of the style, by 1x1 convolutions of both."""

    def __init__(self, channels):
        super().__init__()
        self.f, self.g, self.h, self.out = (nn.Conv2d(channels, channels, (1, 1)) for _ in range(4))

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        n, c, h, w = content.size()
        query = self.f(normalized(content)).view(n, c, -1).permute(0, 2, 1)
        key = self.g(normalized(style)).view(n, c, -1)
        weights = torch.softmax(torch.bmm(query, key), dim=-1)
        value = self.h(style).view(n, c, -1)
        out = torch.bmm(value, weights.permute(0, 2, 1)).view(n, c, h, w)
        return self.out(out) + content


class SANet(nn.Module):
    """Attention at two levels, merged by a reflection-padded 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.low, self.high = Attention(channels // 2), Attention(channels)
        self.widen = nn.Conv2d(channels // 2, channels, 1)
        self.merge_pad, self.merge = nn.ReflectionPad2d((1, 1, 1, 1)), nn.Conv2d(channels, channels, (3, 3))

    def forward(self, content, style):
        low = F.max_pool2d(self.widen(self.low(content[0], style[0])), 2)
        return self.merge(self.merge_pad(self.high(content[1], style[1]) + low))


class AdaAttN(nn.Module):
    """The style's mean and deviation as the attention sees them, at every place of the content."""

    def __init__(self, channels):
        super().__init__()
        self.f, self.g, self.h = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def forward(self, content, style):
        content, style = content[1], style[1]
        n, _, h, w = content.size()
        key = self.g(F.instance_norm(style)).flatten(2)
        query = self.f(F.instance_norm(content)).flatten(2).permute(0, 2, 1)
        weights = torch.bmm(query, key).softmax(-1)
        value = self.h(style).flatten(2).transpose(1, 2).contiguous()
        mean = torch.bmm(weights, value)
        std = torch.sqrt(torch.relu(torch.bmm(weights, value**2) - mean**2))
        mean, std = (t.view(n, h, w, -1).permute(0, 3, 1, 2).contiguous() for t in (mean, std))
        return std * F.instance_norm(content) + mean


class Linear(nn.Module):
    """LinearStyleTransfer: compressed, centred features times a matrix made of both pictures."""

    def __init__(self, channels, size=8):
        super().__init__()
        self.size = size
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, 16, 3, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(16, size, 3, 1, 1)
            )
            for _ in range(2)
        )
        self.fcs = nn.ModuleList(nn.Linear(size * size, size * size) for _ in range(2))
        self.compress, self.unzip = nn.Conv2d(channels, size, 1, 1, 0), nn.Conv2d(size, channels, 1, 1, 0)

    def matrix(self, i: int, features: Tensor) -> Tensor:
        planes = self.branches[i](features).view(features.size(0), self.size, -1)
        product = torch.bmm(planes, planes.transpose(1, 2)).div(planes.size(2))
        return self.fcs[i](product.view(features.size(0), -1)).view(-1, self.size, self.size)

    def forward(self, content, style):
        content, style = content[1], style[1]
        centred = content - content.mean((2, 3), keepdim=True)
        target = style.mean((2, 3), keepdim=True)
        compressed = self.compress(centred)
        n, c, h, w = compressed.size()
        matrix = torch.bmm(self.matrix(1, style - target), self.matrix(0, centred))
        out = torch.bmm(matrix, compressed.view(n, c, -1)).view(n, c, h, w)
        return self.unzip(out) + target.expand_as(content)


class SCT(nn.Module):
    """CCPL: the content normalised, the style only centred, and a covariance between them."""

    def __init__(self, channels):
        super().__init__()
        self.cnet, self.snet = (
            nn.Sequential(nn.Conv2d(channels, 16, kernel), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1))
            for kernel in (1, 3)
        )
        self.uncompress = nn.Conv2d(8, channels, 1, 1, 0)

    def forward(self, content, style):
        content, style = content[1], style[1]
        mean = mean_std(style)[0]
        compressed, described = self.cnet(normalized(content)), self.snet(style - mean)
        planes = described.flatten(2, 3)
        covariance = torch.bmm(planes, planes.permute(0, 2, 1)) / planes.size(2)
        n, c, h, w = compressed.size()
        out = torch.bmm(covariance, compressed.flatten(2)).view(n, c, h, w)
        return self.uncompress(out) + mean.expand(content.size())


TWO = ((1, 3, 32, 40), (1, 3, 36, 32))
# In each: 4 convolutions of the encoder for both pictures, and the decoder's 5; the 1x1 ones stand alone
# except where they read a norm.
ENCODED = 2 * ENCODER_CONVOLUTIONS + 5
ALONE = ("nothing around it",)
ROWS = (
    Architecture("AdaIN", lambda: Transfer(8, AdaIN), TWO, ENCODED + 2, ENCODED, 1, ALONE),
    Architecture("SANet", lambda: Transfer(8, SANet), TWO, ENCODED + 12, ENCODED + 5, 4, ALONE),
    Architecture("AdaAttN", lambda: Transfer(8, AdaAttN), TWO, ENCODED + 5, ENCODED + 2, 3, ALONE),
    Architecture("LinearStyleTransfer", lambda: Transfer(8, Linear), TWO, ENCODED + 8, ENCODED, 0, ALONE),
    Architecture("CCPL", lambda: Transfer(8, SCT), TWO, ENCODED + 7, ENCODED + 1, 1, ALONE),
)
