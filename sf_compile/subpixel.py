"""Weights of the convolutions that one of an enlarged picture comes to: one of 2x2 taps for each parity.

A convolution behind a nearest upsampling by 2, or a transposed one of stride 2, makes an output whose rows
and columns of one parity see the same few source pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_subpixel(kernel: Sequence[int], stride: Sequence[int], upsample: int, padding: Sequence[int]) -> bool:
    """Whether a convolution has the form of ``subpixel_weights``: 3x3, upsampled by 2, padded by 1.

    ``kernel`` and ``stride`` are (height, width), ``padding`` is (left, right, top, bottom).
    """
    return upsample == 2 and (*kernel, *stride, *padding) == (3, 3, 1, 1, 1, 1, 1, 1)


def subpixel_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) after a nearest upsampling by 2, as (4, O, C, 2, 2) on the small picture.

    The first index is 2 p + q for output rows of parity p and columns of parity q. Along one axis an even
    output sees source pixels (i - 1, i) with weights (w0, w1 + w2), an odd one (i, i + 1) with (w0 + w1, w2).
    The sums are rounded once.
    """
    rows = _summed(weight.double(), 2)
    return torch.stack([part for row in rows for part in _summed(row, 3)]).to(weight.dtype)


def transposed_weights(weight: Tensor, top: int, left: int) -> Tensor:
    """(C, O, kh, kw) of a transposed convolution of stride 2, as (4, O, C, 2, 2) on its source.

    ``top`` and ``left`` are cut off its result. Indexed as ``subpixel_weights`` are. Along one axis output
    pixel 2 i + p has source pixel i - 1 + p + j times tap before - p + 2 - 2 j: every other one of the four
    taps from before - 1 on, backwards, and those that the kernel does not have are zeros.
    """
    kh, kw = weight.shape[2:]
    four = torch.nn.functional.pad(weight.transpose(0, 1), (1 - left, left + 3 - kw, 1 - top, top + 3 - kh))
    backwards = four.flip(2, 3)
    return torch.stack([backwards[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)])


def _summed(weight: Tensor, dim: int) -> list[Tensor]:
    """Three weights along ``dim`` as the two that an even output sees, and the two that an odd one does."""
    first, second, third = weight.split(1, dim)
    return [torch.cat((first, second + third), dim), torch.cat((first + second, third), dim)]
