"""The feed-forward style-transfer network with instance norm and resize-convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ConvLayer(nn.Module):
    """Nearest upsampling (optional), reflection padding by kernel_size // 2, convolution.

    (N, in_channels, H, W) to (N, out_channels, ceil(uH / stride), ceil(uW / stride)) with u the
    upsampling factor (1 where `upsample` is None) and an odd kernel. The padding must be smaller
    than uH and uW.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        upsample: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.reflection_pad = nn.ReflectionPad2d(kernel_size // 2)
        self.conv2d = nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x of shape (N, in_channels, H, W)."""
        if self.upsample is not None:
            x = F.interpolate(x, scale_factor=self.upsample, mode="nearest")
        return self.conv2d(self.reflection_pad(x))


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), 3x3 convolutions; no activation after the addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, kernel_size=3)
        self.in1 = nn.InstanceNorm2d(channels, affine=True)
        self.conv2 = ConvLayer(channels, channels, kernel_size=3)
        self.in2 = nn.InstanceNorm2d(channels, affine=True)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to x of shape (N, channels, H, W); the shape stays."""
        inner = self.relu(self.in1(self.conv1(x)))
        return self.in2(self.conv2(inner)) + x


class TransformerNet(nn.Module):
    """Johnson's image transformation network, as the public fast_neural_style example trains it.

    After Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
    Super-Resolution" (2016), with instance norm (Ulyanov, Vedaldi and Lempitsky, 2016) for batch
    norm, nearest upsampling + convolution for transposed convolution, and reflection pads. The
    parameter names are the example's, so that its checkpoints load.

    RGB 0..255, shape (N, 3, H, W) with H, W >= 5, to RGB of about 0..255 (not clamped), shape
    (N, 3, 4 * ceil(ceil(H / 2) / 2), 4 * ceil(ceil(W / 2) / 2)). Any floating dtype.

    Args:
        width: channels of the first layer; the inner layers have 2 and 4 times as many.
        blocks: residual blocks, each of two 3x3 convolutions at 4 * width channels.

    Raises:
        ValueError: width below 1 or blocks below 0.
    """

    def __init__(self, width: int = 32, blocks: int = 5) -> None:
        super().__init__()
        if width < 1 or blocks < 0:
            raise ValueError(f"TransformerNet needs width >= 1 and blocks >= 0, got {width} and {blocks}")
        self.width = width
        self.blocks = blocks
        self.conv1 = ConvLayer(3, width, kernel_size=9)
        self.in1 = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = ConvLayer(width, 2 * width, kernel_size=3, stride=2)
        self.in2 = nn.InstanceNorm2d(2 * width, affine=True)
        self.conv3 = ConvLayer(2 * width, 4 * width, kernel_size=3, stride=2)
        self.in3 = nn.InstanceNorm2d(4 * width, affine=True)
        self._residual_names = [f"res{number}" for number in range(1, blocks + 1)]
        for name in self._residual_names:
            self.add_module(name, ResidualBlock(4 * width))
        self.deconv1 = ConvLayer(4 * width, 2 * width, kernel_size=3, upsample=2)
        self.in4 = nn.InstanceNorm2d(2 * width, affine=True)
        self.deconv2 = ConvLayer(2 * width, width, kernel_size=3, upsample=2)
        self.in5 = nn.InstanceNorm2d(width, affine=True)
        self.deconv3 = ConvLayer(width, 3, kernel_size=9)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stylise x of shape (N, 3, H, W), RGB 0..255."""
        y = self.relu(self.in1(self.conv1(x)))
        y = self.relu(self.in2(self.conv2(y)))
        y = self.relu(self.in3(self.conv3(y)))
        for name in self._residual_names:
            y = self.get_submodule(name)(y)
        y = self.relu(self.in4(self.deconv1(y)))
        y = self.relu(self.in5(self.deconv2(y)))
        return self.deconv3(y)
