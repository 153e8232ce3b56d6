"""Disentangled translation: MUNIT, UNIT, FUNIT (Huang, Liu and others) and DRIT (Lee and others)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


class AdaIN(nn.Module):
    """Instance norm as a batch norm of one picture with N * C channels; its parameters are assigned."""

    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.weight = self.bias = None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.size(0), x.size(1)
        mean, var = self.running_mean.repeat(n), self.running_var.repeat(n)
        planes = x.contiguous().view(1, n * c, *x.size()[2:])
        out = F.batch_norm(planes, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        return out.view(n, c, *x.size()[2:])


class LayerNorm(nn.Module):
    """Over all of a picture, by the unbiased deviation, eps outside the root; affine by channel."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.rand(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1] + [1] * (x.dim() - 1)
        if x.size(0) == 1:
            mean, std = x.view(-1).mean().view(*shape), x.view(-1).std().view(*shape)
        else:
            mean = x.view(x.size(0), -1).mean(1).view(*shape)
            std = x.view(x.size(0), -1).std(1).view(*shape)
        x = (x - mean) / (std + self.eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.gamma.view(*shape) + self.beta.view(*shape)


class Layer(nn.Module):
    """Pad - conv - norm ("in", "adain", "ln", "none") - ReLU, tanh or nothing."""

    def __init__(self, inputs, outputs, kernel, stride, padding, norm="none", act="relu"):
        super().__init__()
        self.pad = nn.ReflectionPad2d(padding)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride)
        norms = {"in": nn.InstanceNorm2d, "adain": AdaIN, "ln": LayerNorm}
        self.norm = norms[norm](outputs) if norm in norms else None
        self.act = {"relu": nn.ReLU(inplace=True), "tanh": nn.Tanh(), "none": None}[act]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pad(x))
        if self.norm:
            x = self.norm(x)
        return self.act(x) if self.act else x


class Block(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        first, second = (
            Layer(channels, channels, 3, 1, 1, norm),
            Layer(channels, channels, 3, 1, 1, norm, "none"),
        )
        self.model = nn.Sequential(first, second)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.model(x)
        out += residual
        return out


def content_encoder(width, blocks):
    down = [Layer(3, width, 7, 1, 3, "in"), Layer(width, 2 * width, 4, 2, 1, "in")]
    down.append(Layer(2 * width, 4 * width, 4, 2, 1, "in"))
    return nn.Sequential(*down, *(Block(4 * width, "in") for _ in range(blocks)))


def style_encoder(width, outputs):
    layers = [
        Layer(3, width, 7, 1, 3),
        Layer(width, 2 * width, 4, 2, 1),
        Layer(2 * width, 2 * width, 4, 2, 1),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, outputs, 1))


def decoder(width, blocks, norm):
    layers = [Block(4 * width, norm) for _ in range(blocks)]
    for a, b in ((4 * width, 2 * width), (2 * width, width)):
        layers += [nn.Upsample(scale_factor=2), Layer(a, b, 5, 1, 2, "ln")]
    return nn.Sequential(*layers, Layer(width, 3, 7, 1, 3, act="tanh"))


class MUNIT(nn.Module):
    """Content of one picture, style of another: a multilayer perceptron makes every AdaIN's parameters.

    ``style_dim`` is the width of the style code: 8 for MUNIT; FUNIT's is the width of its class code.
    """

    def __init__(self, width, blocks, style_dim=8):
        super().__init__()
        self.content, self.style = content_encoder(width, blocks), style_encoder(width, style_dim)
        self.decoder = decoder(width, blocks, "adain")
        self.layers = [module for module in self.decoder.modules() if isinstance(module, AdaIN)]
        count = sum(2 * layer.channels for layer in self.layers)
        self.mlp = nn.Sequential(nn.Linear(style_dim, 16), nn.ReLU(True), nn.Linear(16, count))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        code = self.style(style)
        parameters = self.mlp(code.view(code.size(0), -1))
        for layer in self.layers:
            c = layer.channels
            layer.bias = parameters[:, :c].contiguous().view(-1)
            layer.weight = parameters[:, c : 2 * c].contiguous().view(-1)
            parameters = parameters[:, 2 * c :]
        return self.decoder(self.content(x))


class UNIT(nn.Module):
    """A shared code without styles: instance norms in the decoder's blocks too."""

    def __init__(self, width, blocks):
        super().__init__()
        self.encoder, self.decoder = content_encoder(width, blocks), decoder(width, blocks, "in")

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class DRITBlock(nn.Module):
    """conv - norm, concatenated with the attribute planes, mixed by two 1x1 convolutions; twice."""

    def __init__(self, channels, attributes):
        super().__init__()
        wide = channels + attributes
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)
            )
            for _ in range(2)
        )
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, wide, 1), nn.ReLU(), nn.Conv2d(wide, channels, 1), nn.ReLU())
            for _ in range(2)
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        planes = z.view(z.size(0), z.size(1), 1, 1).expand(z.size(0), z.size(1), x.size(2), x.size(3))
        out = self.mixes[0](torch.cat([self.convs[0](x), planes], dim=1))
        out = self.mixes[1](torch.cat([self.convs[1](out), planes], dim=1))
        out += x
        return out


class DRITUp(nn.Module):
    """Transposed convolution, nn.LayerNorm's function over (C, H, W) with an affine by channel, ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1)
        self.weight = nn.Parameter(torch.rand(outputs, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        shape = x.size()[1:]
        return F.relu(F.layer_norm(x, shape, self.weight.expand(shape), self.bias.expand(shape)))


class DRIT(nn.Module):
    def __init__(self, width, attributes):
        super().__init__()
        self.first = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.LeakyReLU(inplace=True))
        norm = nn.InstanceNorm2d
        self.content = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, 2 * width, 3, 2), norm(2 * width), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(2 * width, 4 * width, 3, 2), norm(4 * width), nn.ReLU(True),
        )  # fmt: skip
        self.mlp = nn.Linear(attributes, 2 * attributes)
        self.blocks = nn.ModuleList(DRITBlock(4 * width, attributes) for _ in range(2))
        self.ups = nn.Sequential(DRITUp(4 * width, 2 * width), DRITUp(2 * width, width))
        self.last = nn.Sequential(nn.ConvTranspose2d(width, 3, 1), nn.Tanh())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = self.content(self.first(x))
        for block, code in zip(self.blocks, self.mlp(z).chunk(2, 1), strict=True):
            x = block(x, code)
        return self.last(self.ups(x))


TWO = ((1, 3, 32, 40), (1, 3, 36, 32))
ALONE = ("nothing around it",)
ROWS = (
    # Fused: all but the 1x1 convolution of the pooled style.
    Architecture("MUNIT", lambda: MUNIT(8, 2), TWO, 18, 17, 11, ALONE),
    Architecture("MUNIT, two at once", lambda: MUNIT(8, 1), ((2, 3, 32, 32),) * 2, 14, 13, 7, ALONE),
    Architecture("FUNIT", lambda: MUNIT(8, 2, style_dim=16), TWO, 18, 17, 11, ALONE),
    Architecture("UNIT", lambda: UNIT(8, 2), ((1, 3, 32, 40),), 14, 14, 11),
    # Fused: those in front of instance norms, and the first, for its pad. The 1x1 ones read concatenations.
    Architecture("DRIT", lambda: DRIT(8, 8), ((2, 3, 32, 40), (2, 8)), 18, 7, 6, ALONE),
)
