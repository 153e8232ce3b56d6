"""White-box cartoonization (Wang and Yu, 2020): no norms, LeakyReLU, bilinear upsampling, skips added."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(act(self.conv1(x)))


class WhiteBox(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        w1, w2, w4 = width, 2 * width, 4 * width
        self.conv0 = nn.Conv2d(3, w1, 7, padding=3)
        self.conv1, self.conv2 = nn.Conv2d(w1, w1, 3, 2, 1), nn.Conv2d(w1, w2, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(w2, w2, 3, 2, 1), nn.Conv2d(w2, w4, 3, padding=1)
        self.blocks = nn.ModuleList(Block(w4) for _ in range(blocks))
        self.conv5 = nn.Conv2d(w4, w2, 3, padding=1)
        self.conv6, self.conv7 = nn.Conv2d(w2, w2, 3, padding=1), nn.Conv2d(w2, w1, 3, padding=1)
        self.conv8, self.conv9 = nn.Conv2d(w1, w1, 3, padding=1), nn.Conv2d(w1, 3, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x0 = act(self.conv0(x))
        x1 = act(self.conv2(act(self.conv1(x0))))
        x2 = act(self.conv4(act(self.conv3(x1))))
        for block in self.blocks:
            x2 = block(x2)
        x2 = act(self.conv5(x2))
        x3 = F.interpolate(x2, scale_factor=2, mode="bilinear", align_corners=False)
        x3 = act(self.conv7(act(self.conv6(x3 + x1))))
        x4 = F.interpolate(x3, scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv9(act(self.conv8(x4 + x0)))


ROWS = (
    # On a CPU nothing is fused; tests/test_bare_convolutions.py has what is on a GPU: all.
    Architecture("White-box cartoon", lambda: WhiteBox(8, 2), ((1, 3, 32, 40),), 14, 0, 0, ("bilinear",)),
)
