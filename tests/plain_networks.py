"""Networks with nothing to fuse, each with its input: torchvision's, a U-Net of batch norms, a small GPT."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LIBRARIES: list[torch.library.Library] = []


def torchvision_models() -> Any:
    """``torchvision.models``; skips the test where there is no torchvision.

    The classifiers need none of torchvision's own C++ operators, and a wheel built for CUDA cannot load them
    beside a PyTorch for the CPU. Its import then wants two of their schemas.
    """
    try:
        return pytest.importorskip("torchvision").models
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        _LIBRARIES.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision").models


class UNet(nn.Module):
    """Two levels down and up again: zero padding, batch norms, transposed convolutions, joined skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.level(3, 16), self.level(16, 32), self.level(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1, self.last = self.level(64, 32), self.level(32, 16), nn.Conv2d(16, 2, 1)

    @staticmethod
    def level(channels: int, out: int) -> nn.Sequential:
        """Two convolutions, each with its batch norm and activation."""
        layers: list[nn.Module] = []
        for c in (channels, out):
            layers += [nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 2, H, W); height and width multiples of 4."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.bottom(F.max_pool2d(two, 2))
        y = self.join2(torch.cat([self.up2(y), two], 1))
        return self.last(self.join1(torch.cat([self.up1(y), one], 1)))


class Block(nn.Module):
    """A transformer's block: attention to what came before, and a network for each token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same."""
        n, tokens, width = x.shape
        q, k, v = (
            part.view(n, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, dim=2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.inner(self.between(x))


class Gpt(nn.Module):
    """Two blocks over embedded tokens."""

    def __init__(self, words: int = 64, width: int = 32, longest: int = 16) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, tokens) of integers to (N, tokens, words)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.word(tokens) + self.place(places))))


def _classifier(name: str, side: int, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        network = getattr(torchvision_models(), name)(weights=None, **settings)
        return network.eval(), torch.randn(1, 3, side, side)

    return build


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet50": _classifier("resnet50", 64),
    "mobilenet_v3_small": _classifier("mobilenet_v3_small", 64),
    "vit_b_16": _classifier("vit_b_16", 32, image_size=32),
    "swin_t": _classifier("swin_t", 64),
    "U-Net": lambda: (UNet().eval(), torch.randn(2, 3, 16, 24)),
    "GPT": lambda: (Gpt().eval(), torch.randint(64, (2, 12))),
}
