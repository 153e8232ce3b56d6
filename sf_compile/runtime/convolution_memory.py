"""What a convolution takes on a GPU beside its operands and results, by its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.precision import storage

_FIRST_LAYERS = 4  # channels of pictures whose planes a kernel reads
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_FEWEST_WORKSPACE_BYTES = 4096
_TOTALS_BYTES = 272  # of an (image, channel) in the workspace of a convolution's statistics


@dataclass(frozen=True)
class Convolution:
    """What is known of a call of ``styleforge::conv2d``: its arguments by name, and its output."""

    arguments: dict[str, Any]
    output: Tensor

    @property
    def precision(self) -> str:
        """By the name that the op was given."""
        return self.arguments.get("precision") or "auto"

    @property
    def dtype(self) -> torch.dtype:
        """What finished inputs and weights are stored in."""
        return storage(self.precision, self.arguments["input"].dtype)

    @property
    def fused(self) -> bool:
        """Whether kernels of ours convolve, as far as dtypes tell; elsewhere cuDNN does."""
        in_tf32 = self.dtype == torch.float32 and tf32.allowed(self.precision)
        return in_tf32 or self.dtype in _SIXTEEN_BIT

    @property
    def subpixel(self) -> bool:
        """Whether its packed weight has the form of the parities of its output."""
        return bool(self.arguments["upsample"] == 2 or self.arguments["transposed"])


def finished_apart(convolution: Convolution) -> int:
    """Bytes of the finished input that a pass of its own writes for a convolution, and that is not kept."""
    a = convolution.arguments
    x = a["input"]
    if a.get("input_scale") is not None:
        return int(x.numel())  # 8-bit integers, beside what is kept
    if convolution.fused:
        planes = x.shape[1] > _FIRST_LAYERS and not x.is_contiguous(memory_format=torch.channels_last)
        turns = a["channels_last"] and planes
        apart = (a["residual"] is not None or turns) and not a["keep_input"]
        return x.numel() * convolution.dtype.itemsize if apart else 0
    left, right, top, bottom = (0, 0, 0, 0) if a["transposed"] else a["padding"]
    zeros = a["padding_mode"] == "zeros" and left == right and top == bottom
    if zeros:
        left = right = top = bottom = 0
    copies = a["upsample"] > 1 or any((left, right, top, bottom))
    finishes = a["mean"] is not None or a["residual"] is not None or a["activation"] != "none"
    if not copies and (not finishes or a["keep_input"]):
        return 0
    n, c, h, w = x.shape
    factor = a["upsample"]
    pixels = (h * factor + top + bottom) * (w * factor + left + right)
    return int(n * c * pixels) * convolution.dtype.itemsize


def packed(convolution: Convolution) -> int:
    """Bytes of a weight in the layout of a kernel: whole tiles, and four times four taps for nine."""
    if not convolution.fused:
        return 0
    weight = convolution.arguments["weight"]
    out, channels, height, width = weight.shape
    if convolution.arguments["transposed"]:
        out, channels = channels, out
    taps = 16 if convolution.subpixel else height * width
    rows = out if convolution.subpixel and out <= 32 else -(-out // 64) * 64
    # Where integers are multiplied, the call that settles their scales has multiplied the others.
    size = convolution.dtype.itemsize + bool(convolution.arguments.get("input_scale"))
    return int(rows * -(-channels // 16) * 16 * taps) * size


def workspaces(convolutions: Sequence[Convolution]) -> int:
    """Bytes in which blocks meet to make statistics: one workspace, as large as the largest asks for."""
    wanted = [
        _TOTALS_BYTES * c.output.shape[0] * c.output.shape[1]
        for c in convolutions
        if c.arguments["statistics"]
    ]
    return 1 << (max(_FEWEST_WORKSPACE_BYTES, int(max(wanted))) - 1).bit_length() if wanted else 0
