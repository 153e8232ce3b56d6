"""Argument checks shared by the fake and the real kernels of every op.

They raise ``RuntimeError`` (``torch._check``), as PyTorch's own operators do, with the values that
were wrong. Shapes may be symbolic: a check never turns a symbolic size into a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sf_compile.activations import parse

PADDING_MODES = ("zeros", "reflect", "replicate")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: Any, message: Callable[[], str]) -> None:
    """``torch._check``, at the cost of one comparison where the condition is a plain True."""
    if condition is not True:
        torch._check(condition, message)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of means and variances: float32, or float64 for float64 pictures."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_image(op: str, input: Tensor) -> None:
    """``input`` must be a floating (N, C, H, W) tensor."""
    require(
        input.dim() == 4,
        lambda: f"styleforge::{op}: input must be (N, C, H, W), got {tuple(input.shape)}",
    )
    require(
        input.dtype in FLOATING,
        lambda: f"styleforge::{op}: input must be float16, bfloat16, float32 or float64, got {input.dtype}",
    )


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """``value`` must be one of ``choices``."""
    require(
        value in choices,
        lambda: f"styleforge::{op}: {name} must be one of {', '.join(choices)}; got {value!r}",
    )


def check_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    """``dtype`` must be None or one of pictures."""
    require(
        dtype is None or dtype in FLOATING,
        lambda: f"styleforge::{op}: {name} must be float16, bfloat16, float32 or float64, got {dtype}",
    )


def check_activation(op: str, name: str, text: Any, slope: Tensor | None = None) -> None:
    """``text`` must name one of ``sf_compile.activations``: a PReLU if, and only if, a slope is given."""
    try:
        found = parse(text)
    except ValueError as error:
        message = f"styleforge::{op}: {name} must be {error}"
        require(False, lambda: message)
        return
    require(
        (found.function == "prelu") == (slope is not None),
        lambda: f"styleforge::{op}: {name} {text!r} {'has no' if slope is not None else 'needs a'} slope",
    )


def check_slope(op: str, input: Tensor, slope: Tensor | None) -> None:
    """``slope`` must be a PReLU's: (1,) or (C,), of the input's dtype and device."""
    if slope is None:
        return
    require(
        slope.dim() == 1 and (slope.shape[0] == 1 or slope.shape[0] == input.shape[1]),
        lambda: f"styleforge::{op}: slope must be (1,) or ({input.shape[1]},), got {tuple(slope.shape)}",
    )
    require(
        slope.dtype == input.dtype and slope.device == input.device,
        lambda: f"styleforge::{op}: slope is {slope.dtype} on {slope.device}, the input {input.dtype} on "
        f"{input.device}",
    )


def check_residual(op: str, input: Tensor, residual: Tensor | None, converts: bool = False) -> None:
    """``residual`` must have the shape and device of ``input``: it is added, not broadcast.

    And its dtype, unless the op ``converts``.
    """
    if residual is None:
        return
    require(
        residual.dim() == 4 and all(a == b for a, b in zip(residual.shape, input.shape, strict=True)),
        lambda: f"styleforge::{op}: residual {tuple(residual.shape)} must have the input's shape "
        f"{tuple(input.shape)}",
    )
    check_alike(op, "residual", residual, input, converts)


def check_alike(op: str, name: str, operand: Tensor, input: Tensor, converts: bool = False) -> None:
    """``operand`` must have the dtype of ``input``, unless the op ``converts`` it, and its device."""
    require(
        (operand.dtype == input.dtype or (converts and operand.dtype in FLOATING))
        and operand.device == input.device,
        lambda: f"styleforge::{op}: {name} is {operand.dtype} on {operand.device}, the input "
        f"{input.dtype} on {input.device}",
    )


def check_moves(op: str, input: Tensor, upsample: int, padding: Sequence[int], mode: str) -> tuple[Any, Any]:
    """``input`` can be upsampled and then padded so; returns the height and width that this gives."""
    check_choice(op, "padding_mode", mode, PADDING_MODES)
    require(upsample >= 1, lambda: f"styleforge::{op}: upsample must be 1 or more, got {upsample}")
    require(
        len(padding) == 4 and min(padding) >= 0,
        lambda: f"styleforge::{op}: padding must be 4 sizes of 0 or more, got {list(padding)}",
    )
    left, right, top, bottom = padding
    height, width = input.shape[2] * upsample, input.shape[3] * upsample
    if mode == "reflect":
        require(
            max(left, right) < width and max(top, bottom) < height,
            lambda: f"styleforge::{op}: reflection padding {list(padding)} must be smaller than the "
            f"picture, {height} x {width}",
        )
    return height + top + bottom, width + left + right


def check_channels(op: str, input: Tensor, **vectors: Tensor | None) -> None:
    """Every given vector must be (C,) or (N, C): a value for each channel of ``input``, or of each image."""
    for name, vector in vectors.items():
        if vector is not None:
            _check_vector(op, input, name, vector)


def _check_vector(op: str, input: Tensor, name: str, vector: Tensor) -> None:
    require(
        vector.dim() in (1, 2)
        and vector.shape[-1] == input.shape[1]
        and (vector.dim() == 1 or vector.shape[0] == input.shape[0]),
        lambda: f"styleforge::{op}: {name} must be ({input.shape[1]},) or "
        f"({input.shape[0]}, {input.shape[1]}), got {tuple(vector.shape)}",
    )
    require(
        vector.device == input.device,
        lambda: f"styleforge::{op}: {name} is on {vector.device}, the input on {input.device}",
    )


def check_norm(
    op: str,
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """``mean`` and ``variance`` come together, (N, C) or (C,); weight and bias, of either, beside them."""
    require(
        (mean is None) == (variance is None),
        lambda: f"styleforge::{op}: mean and variance must be given together",
    )
    if mean is None or variance is None:
        require(
            weight is None and bias is None,
            lambda: f"styleforge::{op}: a norm's weight or bias needs mean and variance",
        )
        return
    require(
        mean.shape == variance.shape
        and mean.dim() in (1, 2)
        and mean.shape[-1] == input.shape[1]
        and (mean.dim() == 1 or mean.shape[0] == input.shape[0]),
        lambda: f"styleforge::{op}: mean {tuple(mean.shape)} and variance {tuple(variance.shape)} must be "
        f"({input.shape[0]}, {input.shape[1]}) or ({input.shape[1]},)",
    )
    require(
        mean.device == input.device and variance.device == input.device,
        lambda: f"styleforge::{op}: mean and variance must be on {input.device}",
    )
    check_channels(op, input, weight=weight, bias=bias)
