"""The transform network with an instance norm written out, in the ways of the public repositories."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.row import Architecture
from architectures.transformer_net import ModuleNet


class HandNorm(nn.Module):
    """An affine instance norm; the parameters are (C, 1, 1)."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(channels, 1, 1) * 0.3)


class Flattened(HandNorm):
    """Statistics of view(N, C, -1), the biased variance, expanded to the picture's shape."""

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.size()[:2]
        planes = x.view(n, c, -1)
        mean = planes.mean(2).view(n, c, 1, 1).expand_as(x)
        variance = planes.var(2, unbiased=False).view(n, c, 1, 1).expand_as(x)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.scale + self.shift


class FlattenedScaled(HandNorm):
    """As above with the unbiased variance of the flattened planes, put right by (n - 1) / n."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(2) * x.size(3)
        planes = x.view(x.size(0), x.size(1), n)
        mean = planes.mean(2).unsqueeze(2).unsqueeze(3).expand_as(x)
        variance = planes.var(2).unsqueeze(2).unsqueeze(3).expand_as(x) * ((n - 1) / float(n))
        out = (x - mean) / torch.sqrt(variance + self.eps)
        return self.scale * out + self.shift


class Unbiased(HandNorm):
    """The unbiased variance of dims (2, 3), broadcast; eps inside the root."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        variance = x.var((2, 3), keepdim=True)
        return self.scale * ((x - mean) / (variance + self.eps).sqrt()) + self.shift


class EpsOutside(HandNorm):
    """The standard deviation, and eps added to it rather than to the variance."""

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, dim=[2, 3], keepdim=True)
        deviation = torch.std(x, dim=[2, 3], keepdim=True)
        return (x - mean) / (deviation + self.eps) * self.scale + self.shift


class Squares(HandNorm):
    """The mean of squares less the square of the mean; times the reciprocal root."""

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, (2, 3), True)
        variance = torch.mean(x**2, (2, 3), True) - mean**2
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.scale + self.shift


class Centred(HandNorm):
    """Centres first; the variance is the mean of the centred squares, and there is no affine part."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - torch.mean(x, (2, 3), True)
        square = torch.mul(x, x)
        return x * torch.rsqrt(torch.mean(square, (2, 3), True) + self.eps)


class VarMean(HandNorm):
    """torch.var_mean, biased."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, unbiased=False)
        return (x - mean).div(torch.sqrt(variance.add(self.eps))).mul(self.scale).add(self.shift)


def _row(name: str, norm: type[HandNorm], eps: float) -> Architecture:
    def factory() -> nn.Module:
        return ModuleNet(8, 2, norm=lambda channels: norm(channels, eps))

    return Architecture(f"Johnson by hand, {name}", factory, ((1, 3, 32, 40),), 10, 10, 9)


ROWS = (
    _row("view, biased, eps 1e-9", Flattened, 1e-9),
    _row("view, unbiased put right, eps 1e-5", FlattenedScaled, 1e-5),
    _row("dims, unbiased, eps 1e-5", Unbiased, 1e-5),
    _row("eps 1e-3 outside the root", EpsOutside, 1e-3),
    _row("mean of squares, eps 1e-3", Squares, 1e-3),
    _row("centred first, eps 1e-8", Centred, 1e-8),
    _row("var_mean, eps 1e-5", VarMean, 1e-5),
)
