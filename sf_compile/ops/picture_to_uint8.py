"""``styleforge::picture_to_uint8``: a network's output becomes pictures of bytes.

    pixels[n, y, x, c] = round(clamp((input[n, c, y, x] - low) * 255 / (high - low), 0, 255))

in float32 (float64 for float64), a half to the even neighbour, NaN to 0. ``broken[n]`` is 1 where image n
has a number that is not finite, else 0. There is no gradient, as a rounding has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sf_compile.ops import reference
from sf_compile.ops.checks import check_image, require
from sf_compile.ops.library import register

SCHEMA = "picture_to_uint8(Tensor input, float low=0., float high=255.) -> (Tensor pixels, Tensor broken)"


def _check(input: Tensor, low: float, high: float) -> None:
    check_image("picture_to_uint8", input)
    require(
        low < high, lambda: f"styleforge::picture_to_uint8: low {low} must be below high {high}"
    )


def _cpu(input: Tensor, low: float = 0.0, high: float = 255.0) -> tuple[Tensor, Tensor]:
    _check(input, low, high)
    return reference.picture_to_uint8(input, low, high)


def _cuda(input: Tensor, low: float = 0.0, high: float = 255.0) -> tuple[Tensor, Tensor]:
    from sf_compile.cuda import picture as cuda

    _check(input, low, high)
    return cuda.picture_to_uint8(input, low, high)


def _fake(input: Tensor, low: float = 0.0, high: float = 255.0) -> tuple[Tensor, Tensor]:
    _check(input, low, high)
    n, c, h, w = input.shape
    return input.new_empty((n, h, w, c), dtype=torch.uint8), input.new_empty((n,), dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, grad_pixels: Tensor | None, grad_broken: Tensor | None) -> tuple[None, ...]:
    return None, None, None


register(SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context)
picture_to_uint8 = torch.ops.styleforge.picture_to_uint8.default
