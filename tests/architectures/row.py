"""One row of the table of architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """A network that people have, and what of it must be fused.

    Attributes:
        name: The family and, after a comma, its variant.
        factory: Makes the network, small; every seed gives other weights.
        shapes: Shape of each of its inputs.
        dense: How many ungrouped convolutions, transposed ones too, a call runs.
        fused: At least so many of them must be in fused sites.
        norms: At least so many fused sites must have a norm.
        declined: Words that must be in a reason given for something that is left alone.
        peak: The pictures' values are 0 to ``peak``.
    """

    name: str
    factory: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    dense: int
    fused: int
    norms: int
    declined: tuple[str, ...] = ()
    peak: float = 1.0

    def build(self) -> nn.Module:
        """The network in eval, every affine parameter and running statistic different from its default."""
        model = self.factory().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
                if module.weight is not None:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.3)
                if getattr(module, "running_var", None) is not None:
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model.requires_grad_(False)

    def inputs(self, scale: int = 1) -> list[Tensor]:
        """Random inputs in float32; pictures ``scale`` times as high and as wide as in ``shapes``."""
        sizes = [(*s[:2], *(scale * side for side in s[2:])) for s in self.shapes]
        return [torch.rand(size) * (self.peak if len(size) == 4 else 1) for size in sizes]
