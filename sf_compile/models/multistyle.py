"""A thin network for many styles: the convolutions are shared, a style is a set of norm parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from sf_compile.models.transformer_net import ConvLayer


class ConvNorm(nn.Module):
    """Upsampling (optional), reflection pad, convolution without bias, instance norm (affine)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        upsample: int | None = None,
    ) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels, kernel_size, stride, upsample, bias=False)
        self.norm = nn.InstanceNorm2d(out_channels, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x of shape (N, in_channels, H, W)."""
        return self.norm(self.conv(x))


class MultiStyleNet(nn.Module):
    """The 26-style network with conditional instance norm, set to one style.

    After Dumoulin, Shlens and Kudlur, "A Learned Representation for Artistic Style" (2017): all
    styles share the convolutions, and each has its own gamma and beta in every instance norm. Here
    `load_style` puts one style's gamma and beta into ordinary nn.InstanceNorm2d layers.

    RGB 0..1, shape (N, 3, H, W) with H, W >= 5, to RGB 0..1 (a sigmoid), shape
    (N, 3, 4 * ceil(ceil(H / 2) / 2), 4 * ceil(ceil(W / 2) / 2)). Any floating dtype.

    Args:
        channels: of the three contracting layers and the residual blocks.
        blocks: residual blocks.
        expand: channels after the first and the second x2 upsampling.
    """

    def __init__(self, channels: int = 32, blocks: int = 6, expand: tuple[int, int] = (8, 4)) -> None:
        super().__init__()
        self.contract = nn.ModuleList(
            [
                ConvNorm(3, channels, kernel_size=9),
                ConvNorm(channels, channels, kernel_size=3, stride=2),
                ConvNorm(channels, channels, kernel_size=3, stride=2),
            ]
        )
        self.res = nn.ModuleList(
            nn.ModuleList([ConvNorm(channels, channels, 3), ConvNorm(channels, channels, 3)])
            for _ in range(blocks)
        )
        self.expand = nn.ModuleList(
            [
                ConvNorm(channels, expand[0], kernel_size=3, upsample=2),
                ConvNorm(expand[0], expand[1], kernel_size=3, upsample=2),
                ConvNorm(expand[1], 3, kernel_size=9),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stylise x of shape (N, 3, H, W), RGB 0..1."""
        for layer in self.contract:
            x = F.relu(layer(x))
        for block in self.res:
            first, second = block.children()
            x = x + second(F.relu(first(x)))
        for layer in list(self.expand)[:-1]:
            x = F.relu(layer(x))
        return torch.sigmoid(self.expand[-1](x))

    def load_style(self, tables: Mapping[str, torch.Tensor], style: int) -> None:
        """Fill every parameter for one style.

        Args:
            tables: for each layer path such as ``contract.0`` or ``res.5.1``: ``<path>.w`` (out, in,
                kh, kw), ``<path>.norm.gamma`` and ``<path>.norm.beta`` (styles, out).
            style: row of gamma and beta.

        Raises:
            ValueError: a table is missing or of the wrong shape, or has no such row.
        """
        for path, layer in self.named_modules():
            if not isinstance(layer, ConvNorm):
                continue
            weight = layer.conv.conv2d.weight
            _fill(weight, f"{path}.w", tables, None)
            _fill(layer.norm.weight, f"{path}.norm.gamma", tables, style)
            _fill(layer.norm.bias, f"{path}.norm.beta", tables, style)


def _fill(parameter: torch.Tensor, key: str, tables: Mapping[str, torch.Tensor], row: int | None) -> None:
    if key not in tables:
        raise ValueError(f"the table {key!r} is missing")
    table = tables[key]
    if row is not None:
        if not 0 <= row < table.shape[0]:
            raise ValueError(f"style {row} is not one of the {table.shape[0]} rows of {key!r}")
        table = table[row]
    if table.shape != parameter.shape:
        raise ValueError(f"{key!r} has shape {tuple(table.shape)}, expected {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(table)
