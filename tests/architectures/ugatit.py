"""U-GAT-IT (Kim and others, 2020): attention from two pools, and a learned mix of instance and layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def conv_norm(inputs, outputs, kernel, stride=1):
    pad, conv = nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
    return [pad, conv, nn.InstanceNorm2d(outputs)]


class EncoderBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        first, second = conv_norm(channels, channels, 3), conv_norm(channels, channels, 3)
        self.block = nn.Sequential(*first, nn.ReLU(True), *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Mixed(nn.Module):
    """rho * instance norm + (1 - rho) * layer norm; scale and shift are parameters, or given."""

    def __init__(self, channels, own):
        super().__init__()
        self.eps = 1e-5
        self.rho = nn.Parameter(torch.rand(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5) if own else None
        self.beta = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.3) if own else None

    def forward(self, x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        mean, var = torch.mean(x, dim=[2, 3], keepdim=True), torch.var(x, dim=[2, 3], keepdim=True)
        by_plane = (x - mean) / torch.sqrt(var + self.eps)
        mean, var = torch.mean(x, dim=[1, 2, 3], keepdim=True), torch.var(x, dim=[1, 2, 3], keepdim=True)
        by_picture = (x - mean) / torch.sqrt(var + self.eps)
        n = x.shape[0]
        out = self.rho.expand(n, -1, -1, -1) * by_plane + (1 - self.rho.expand(n, -1, -1, -1)) * by_picture
        if self.gamma is not None and self.beta is not None:
            return out * self.gamma.expand(n, -1, -1, -1) + self.beta.expand(n, -1, -1, -1)
        assert gamma is not None and beta is not None
        return out * gamma.unsqueeze(2).unsqueeze(3) + beta.unsqueeze(2).unsqueeze(3)


class DecoderBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(Mixed(channels, own=False) for _ in range(2))
        self.relu = nn.ReLU(True)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        out = self.relu(self.norms[0](self.convs[0](self.pad(x)), gamma, beta))
        return self.norms[1](self.convs[1](self.pad(out)), gamma, beta) + x


class UGATIT(nn.Module):
    """Returns the picture, the two logits of the classifier on the side, and its heat map."""

    def __init__(self, width, blocks):
        super().__init__()
        w1, w2, w4 = width, 2 * width, 4 * width
        self.encoder = nn.Sequential(
            *conv_norm(3, w1, 7), nn.ReLU(True), *conv_norm(w1, w2, 3, 2), nn.ReLU(True),
            *conv_norm(w2, w4, 3, 2), nn.ReLU(True), *(EncoderBlock(w4) for _ in range(blocks)),
        )  # fmt: skip
        self.pools = nn.ModuleList(nn.Linear(w4, 1, bias=False) for _ in range(2))
        self.merge = nn.Conv2d(2 * w4, w4, 1)
        self.mlp = nn.Sequential(nn.Linear(w4, w4), nn.ReLU(True))
        self.gamma, self.beta = nn.Linear(w4, w4), nn.Linear(w4, w4)
        self.blocks = nn.ModuleList(DecoderBlock(w4) for _ in range(blocks))
        ups = []
        for a, b in ((w4, w2), (w2, w1)):
            ups += [nn.Upsample(scale_factor=2, mode="nearest"), nn.ReflectionPad2d(1)]
            ups += [nn.Conv2d(a, b, 3, bias=False), Mixed(b, own=True), nn.ReLU(True)]
        self.ups = nn.Sequential(*ups, nn.ReflectionPad2d(3), nn.Conv2d(w1, 3, 7, bias=False), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoder(x)
        pooled = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
        logits = [fc(p.view(x.shape[0], -1)) for fc, p in zip(self.pools, pooled, strict=True)]
        weighted = [x * next(iter(fc.parameters())).unsqueeze(2).unsqueeze(3) for fc in self.pools]
        x = torch.relu(self.merge(torch.cat(weighted, 1)))
        heat = torch.sum(x, dim=1, keepdim=True)
        style = self.mlp(F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1))
        gamma, beta = self.gamma(style), self.beta(style)
        for block in self.blocks:
            x = block(x, gamma, beta)
        return self.ups(x), torch.cat(logits, 1), heat


ROWS = (
    # The 1x1 convolution that merges the two weighted pictures reads a concatenation, and has no norm. The
    # mixed norms are sums of two norms with learned weights: what is said of them is no convolution's reason.
    Architecture("U-GAT-IT", lambda: UGATIT(8, 2), ((1, 3, 32, 40),), 15, 14, 7, ("nothing around it",)),
)
