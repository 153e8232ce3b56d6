"""Style transfer by transformers: StyTr2 (Deng and others, 2022) and S2WAT (Zhang and others, 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.row import Architecture


def conv_relu(inputs, outputs):
    return [nn.ReflectionPad2d((1, 1, 1, 1)), nn.Conv2d(inputs, outputs, (3, 3)), nn.ReLU()]


def decoder(channels: int, doublings: int) -> nn.Sequential:
    """doublings + 1 convolutions."""
    layers: list[nn.Module] = []
    for _ in range(doublings):
        layers += [*conv_relu(channels, channels), nn.Upsample(scale_factor=2, mode="nearest")]
    return nn.Sequential(*layers, nn.ReflectionPad2d((1, 1, 1, 1)), nn.Conv2d(channels, 3, (3, 3)))


class TransformerLayer(nn.Module):
    """Attention by nn.MultiheadAttention over (places, N, C), then a feed-forward part; norms after."""

    def __init__(self, channels, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, dropout=0.1)
        self.linear1, self.linear2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(query=x, key=memory, value=memory)[0]))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class StyTr2(nn.Module):
    """Patches of 8 x 8, a transformer encoder for each picture, cross attention, a decoder."""

    def __init__(self, channels, heads):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, kernel_size=(8, 8), stride=(8, 8))
        self.place = nn.Conv2d(channels, channels, (1, 1))
        self.layers = nn.ModuleList(TransformerLayer(channels, heads) for _ in range(3))
        self.decode = decoder(channels, 3)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        content, style = self.patches(content), self.patches(style)
        n, c, h, w = content.shape
        place = self.place(F.adaptive_avg_pool2d(content, 4))
        place = F.interpolate(place, mode="bilinear", size=style.shape[-2:])
        x, s = content.flatten(2).permute(2, 0, 1), (style + place).flatten(2).permute(2, 0, 1)
        x, s = self.layers[0](x, x), self.layers[1](s, s)
        x = self.layers[2](x, s).permute(1, 2, 0).view(n, c, h, w)
        return self.decode(x)


class WindowLayer(nn.Module):
    """Attention within windows, by hand: linear, matmul, softmax, matmul; GELU in the feed-forward part."""

    def __init__(self, channels, heads, window):
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.drop = nn.Dropout(0.0)

    def attend(self, x: Tensor) -> Tensor:
        n, places, c = x.shape
        q, k, v = self.qkv(x).reshape(n, places, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(n, places, c))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        size = self.window
        windows = self.norm1(x).view(n, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5)
        out = self.attend(windows.reshape(-1, size * size, c))
        out = out.view(n, h // size, w // size, size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + out
        return x + self.mlp(self.norm2(x))


class S2WAT(nn.Module):
    """Patches of 2 x 2, windows, places merged once, and a transfer layer before the decoder."""

    def __init__(self, channels, heads):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 2, 2)
        self.layers = nn.ModuleList(WindowLayer(channels, heads, 4) for _ in range(2))
        self.merge = nn.Linear(4 * channels, channels, bias=False)
        self.transfer = TransformerLayer(channels, heads)
        self.decode = decoder(channels, 2)

    def encode(self, picture: Tensor) -> Tensor:
        x = self.layers[0](self.patches(picture).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.layers[1](self.merge(torch.cat(corners, -1)))

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        content, style = self.encode(content), self.encode(style)
        n, h, w, c = content.shape
        x = self.transfer(content.view(n, h * w, c).transpose(0, 1), style.view(n, -1, c).transpose(0, 1))
        return self.decode(x.permute(1, 2, 0).reshape(n, c, h, w))


TWO = ((1, 3, 32, 48), (1, 3, 48, 32))
ALONE = ("nothing around it",)
ROWS = (
    Architecture("StyTr2", lambda: StyTr2(16, 4), TWO, 7, 4, 0, ALONE),
    Architecture("S2WAT", lambda: S2WAT(16, 4), TWO, 5, 3, 0, ALONE),
)
