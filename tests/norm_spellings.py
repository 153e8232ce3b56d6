"""Norms as models spell them out, for the tests of graph/handwritten_norm.py.

Each is a function of a picture (N, C, H, W) that it only normalises, with the correction, eps and outer eps
that belong to it; ``exact`` is what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Spelling(NamedTuple):
    """A hand-written norm, and what the matcher should read in it."""

    body: Callable[[Tensor], Tensor]
    correction: int = 0
    eps: float = 0.0
    outer_eps: float | None = None
    groups: int | None = None


def exact(x: Tensor, s: Spelling) -> Tensor:
    """The norm in float64."""
    pixels = x.double().reshape(x.shape[0], s.groups or x.shape[1], -1)
    variance, mean = torch.var_mean(pixels, 2, correction=s.correction, keepdim=True)
    return ((pixels - mean) / ((variance + s.eps).sqrt() + (s.outer_eps or 0.0))).reshape(x.shape)


def centred_first(x: Tensor) -> Tensor:
    """As in StyleGAN."""
    x = x - torch.mean(x, (2, 3), True)
    return x * torch.rsqrt(torch.mean(torch.mul(x, x), (2, 3), True) + 1e-8)


def flat_statistics(x: Tensor) -> Tensor:
    """``calc_mean_std`` of AdaIN."""
    n, c = x.size()[:2]
    std = (x.view(n, c, -1).var(dim=2) + 1e-5).sqrt().view(n, c, 1, 1)
    mean = x.view(n, c, -1).mean(dim=2).view(n, c, 1, 1)
    return (x - mean.expand(x.size())) / std.expand(x.size())


def pair(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-3) ** 0.5


def std_pair(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, dim=(-2, -1), keepdim=True)
    return torch.div(torch.sub(x, mean), torch.add(std, 1e-9))


def squares(x: Tensor) -> Tensor:
    mean = x.mean((-1, -2), keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean([2, 3], keepdim=True) + 1e-5)


def difference_of_squares(x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    variance = (x * x).mean((2, 3), keepdim=True) - mean.pow(2)
    return (x - mean) * (1.0 / (1e-2 + variance).sqrt())


def without_keepdim(x: Tensor) -> Tensor:
    mean, std = x.mean([2, 3]), x.std([2, 3], unbiased=False)
    return (x - mean[:, :, None, None]) / (1e-3 + std.unsqueeze(2).unsqueeze(-1))


def sums(x: Tensor) -> Tensor:
    pixels = x.shape[2] * x.shape[3]
    flat = x.flatten(2)
    centred = x - (flat.sum(2) / pixels).reshape(x.shape[0], -1, 1, 1)
    variance = (centred.square().flatten(2).sum(2) / (pixels - 1)).reshape(x.shape[0], -1, 1, 1)
    return centred.mul((variance + 1e-5).pow(-0.5))


def on_the_view(x: Tensor) -> Tensor:
    flat = x.view(x.size(0), x.size(1), -1)
    flat = (flat - flat.mean(-1, keepdim=True)) / (flat.std(-1, keepdim=True) + 1e-5)
    return flat.view(x.size())


def in_place(x: Tensor) -> Tensor:
    mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
    y = x - mean
    y /= std.add(1e-5).expand_as(x)
    return y


def munit_layer_norm(x: Tensor) -> Tensor:
    shape = [-1] + [1] * (x.dim() - 1)
    mean = x.view(x.size(0), -1).mean(1).view(*shape)
    std = x.view(x.size(0), -1).std(1).view(*shape)
    return (x - mean) / (std + 1e-5)


def two_groups(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, 2, c // 2, h, w)
    mean, variance = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), unbiased=False, keepdim=True)
    return ((y - mean) / torch.sqrt(variance + 1e-5)).reshape(n, c, h, w)


def batch_of_channels(x: Tensor) -> Tensor:
    """AdaIN of MUNIT, but for weight and bias."""
    n, c, h, w = x.shape
    mean, variance = torch.zeros(c).repeat(n), torch.ones(c).repeat(n)
    y = F.batch_norm(x.contiguous().view(1, n * c, h, w), mean, variance, None, None, True, 0.1, 1e-5)
    return y.view(n, c, h, w)


SPELLINGS = {
    "centred first": Spelling(centred_first, eps=1e-8),
    "flat statistics": Spelling(flat_statistics, 1, 1e-5),
    "var_mean": Spelling(pair, eps=1e-3),
    "std_mean": Spelling(std_pair, 1, outer_eps=1e-9),
    "mean of squares": Spelling(squares, eps=1e-5),
    "difference of squares": Spelling(difference_of_squares, eps=1e-2),
    "without keepdim": Spelling(without_keepdim, outer_eps=1e-3),
    "sums": Spelling(sums, 1, 1e-5),
    "on the view": Spelling(on_the_view, 1, outer_eps=1e-5),
    "in place": Spelling(in_place, 1, outer_eps=1e-5),
    "no eps": Spelling(
        lambda x: (x - x.mean((2, 3), True)) / x.var((2, 3), correction=0, keepdim=True).sqrt()
    ),
    "reciprocal": Spelling(
        lambda x: torch.reciprocal(x.std((2, 3), keepdim=True) + 1e-2) * (x - x.mean((2, 3), True)),
        1, outer_eps=1e-2,
    ),
    "layer norm of MUNIT": Spelling(munit_layer_norm, 1, outer_eps=1e-5, groups=1),
    "two groups": Spelling(two_groups, eps=1e-5, groups=2),
    "group norm": Spelling(lambda x: F.group_norm(x, 2, eps=1e-3), eps=1e-3, groups=2),
    "group norm of one group": Spelling(lambda x: F.group_norm(x, 1), eps=1e-5, groups=1),
    "a group for each channel": Spelling(lambda x: F.group_norm(x, x.shape[1]), eps=1e-5),
    "layer norm": Spelling(lambda x: F.layer_norm(x, x.shape[1:]), eps=1e-5, groups=1),
    "batch of channels": Spelling(batch_of_channels, eps=1e-5),
}  # fmt: skip
