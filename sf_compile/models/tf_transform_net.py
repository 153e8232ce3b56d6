"""The TensorFlow flavour of the style-transfer network: zero SAME padding, transposed convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-3  # of every instance norm in this family; PyTorch's own default is 1e-5


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis of `size` pixels under TensorFlow's "SAME" rule.

    The output has ceil(size / stride) pixels; the zeros that takes are shared out evenly, and an
    odd one goes after (bottom, right).
    """
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


class ConvNorm(nn.Module):
    """SAME-padded convolution without bias, then instance norm (eps 1e-3, affine)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        # At stride 1 an odd kernel pads both sides alike, whatever the size: the convolution can do it.
        padding = kernel_size // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm = nn.InstanceNorm2d(out_channels, eps=EPS, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        kernel_size, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            rows = same_padding(x.shape[2], kernel_size, stride)
            columns = same_padding(x.shape[3], kernel_size, stride)
            x = F.pad(x, (*columns, *rows))
        return self.norm(self.conv(x))


class TransposedConvNorm(nn.Module):
    """Stride-2 transposed 3x3 convolution without bias, cropped to 2H x 2W, then instance norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=3, stride=2, bias=False)
        self.norm = nn.InstanceNorm2d(out_channels, eps=EPS, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, 2H, 2W)."""
        # The transpose of a SAME convolution over 2H pixels: its one zero was at the bottom and right.
        return self.norm(self.conv(x)[:, :, :-1, :-1])


class ResidualBlock(nn.Module):
    """x + b(relu(a(x))); no activation after the addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = ConvNorm(channels, channels, kernel_size=3)
        self.b = ConvNorm(channels, channels, kernel_size=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to x of shape (N, channels, H, W); the shape stays."""
        return x + self.b(F.relu(self.a(x)))


class TensorFlowTransformNet(nn.Module):
    """The transform network of the TensorFlow fast-style-transfer family (lengstrom and its ports).

    Instance norm follows every convolution, the last too; the output is tanh(x) * 150 + 127.5.

    RGB 0..255, shape (N, 3, H, W), to RGB within -22.5..277.5 (not clamped), shape
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
            raise ValueError(
                f"TensorFlowTransformNet needs width >= 1 and blocks >= 0, got {width} and {blocks}"
            )
        self.width = width
        self.blocks = blocks
        self.c1 = ConvNorm(3, width, kernel_size=9)
        self.c2 = ConvNorm(width, 2 * width, kernel_size=3, stride=2)
        self.c3 = ConvNorm(2 * width, 4 * width, kernel_size=3, stride=2)
        self.res = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(blocks)))
        self.t1 = TransposedConvNorm(4 * width, 2 * width)
        self.t2 = TransposedConvNorm(2 * width, width)
        self.c4 = ConvNorm(width, 3, kernel_size=9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stylise x of shape (N, 3, H, W), RGB 0..255."""
        y = F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x))))))
        y = self.res(y)
        y = F.relu(self.t2(F.relu(self.t1(y))))
        return torch.tanh(self.c4(y)) * 150 + 127.5
