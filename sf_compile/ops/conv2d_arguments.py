"""What ``styleforge::conv2d`` is called with: its arguments by name, and what is asked of them.

``sf_compile.ops.conv2d`` says what they mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.ops import quantization
from sf_compile.ops.checks import (
    FLOATING,
    PADDING_MODES,
    check_activation,
    check_alike,
    check_choice,
    check_dtype,
    check_image,
    check_moves,
    check_norm,
    check_residual,
    require,
)
from sf_compile.ops.normalize import Norm
from sf_compile.precision import PRECISIONS, storage
from sf_compile.subpixel import is_subpixel


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order.

    Shapes: ``input`` and ``residual`` (N, C, H, W), ``weight`` (O, C, kh, kw), or (C, O, kh, kw) if
    ``transposed``, ``bias`` (O,), ``mean``, ``variance``, ``norm_weight`` and ``norm_bias`` (N, C) or
    (C,). ``padding`` is left, right, top, bottom.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    activation: str
    residual: Tensor | None
    upsample: int
    padding: list[int]
    padding_mode: str
    stride: list[int]
    output_activation: str
    statistics: bool
    keep_input: bool
    channels_last: bool
    transposed: bool = False
    precision: str = "auto"
    out_dtype: torch.dtype | None = None
    input_scale: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the convolution's operands are rounded to, and what is kept is stored in."""
        return storage(self.precision, self.input.dtype)

    @property
    def output_dtype(self) -> torch.dtype:
        """The output's."""
        return self.out_dtype or self.dtype

    @property
    def out_channels(self) -> Any:
        """Channels of the output."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def is_subpixel(self) -> bool:
        """Whether it has the sub-pixel form of a convolution behind an upsampling."""
        plain = not self.transposed
        return plain and is_subpixel(self.weight.shape[2:], self.stride, self.upsample, self.padding)

    @property
    def normalizes(self) -> bool:
        """Whether anything is applied to ``input`` before it is upsampled and padded."""
        return self.mean is not None or self.residual is not None or self.activation != "none"

    @property
    def norm(self) -> Norm:
        """What is applied to ``input`` before the residual is added."""
        return Norm(self.mean, self.variance, self.norm_weight, self.norm_bias, self.eps, self.activation)


def check(a: Arguments) -> tuple[Any, Any]:
    """Check everything that fake and real calls share; return the output's height and width."""
    input, weight, bias = a.input, a.weight, a.bias
    check_image("conv2d", input)
    check_norm("conv2d", input, a.mean, a.variance, a.norm_weight, a.norm_bias)
    check_activation("conv2d", "activation", a.activation)
    check_activation("conv2d", "output_activation", a.output_activation)
    check_choice("conv2d", "padding_mode", a.padding_mode, PADDING_MODES)
    check_choice("conv2d", "precision", a.precision, PRECISIONS)
    check_dtype("conv2d", "out_dtype", a.out_dtype)
    converts = a.precision != "auto"
    check_residual("conv2d", input, a.residual, converts)
    require(
        weight.dim() == 4 and weight.shape[0 if a.transposed else 1] == input.shape[1],
        lambda: f"styleforge::conv2d: weight must be "
        f"{f'({input.shape[1]}, out' if a.transposed else f'(out, {input.shape[1]}'}, kh, kw), got "
        f"{tuple(weight.shape)}",
    )
    check_alike("conv2d", "weight", weight, input, converts)
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == a.out_channels,
            lambda: f"styleforge::conv2d: bias must be ({a.out_channels},), got {tuple(bias.shape)}",
        )
        require(
            (bias.dtype == input.dtype or (converts and bias.dtype in FLOATING))
            and bias.device == input.device,
            lambda: f"styleforge::conv2d: bias is {bias.dtype} on {bias.device}, the input "
            f"{input.dtype} on {input.device}",
        )
    require(
        len(a.stride) == 2 and min(a.stride) >= 1,
        lambda: f"styleforge::conv2d: stride must be 2 numbers of 1 or more, got {list(a.stride)}",
    )
    require(
        not a.keep_input or a.normalizes,
        lambda: "styleforge::conv2d: keep_input needs a norm, an activation or a residual to apply",
    )
    quantization.check(a)
    if a.transposed:
        return _transposed_size(a)
    height, width = check_moves("conv2d", input, a.upsample, a.padding, a.padding_mode)
    require(
        height >= weight.shape[2] and width >= weight.shape[3],
        lambda: f"styleforge::conv2d: kernel {tuple(weight.shape[2:])} is larger than the padded picture, "
        f"{height} x {width}",
    )
    return (height - weight.shape[2]) // a.stride[0] + 1, (width - weight.shape[3]) // a.stride[1] + 1


def _transposed_size(a: Arguments) -> tuple[Any, Any]:
    """The output's height and width, once what is only asked of a transposed convolution is checked."""
    height, width = check_moves("conv2d", a.input, a.upsample, [0, 0, 0, 0], a.padding_mode)
    left, right, top, bottom = a.padding
    require(
        a.padding_mode == "zeros" and min(left, top) >= 0 and right > -a.stride[1] and bottom > -a.stride[0],
        lambda: f"styleforge::conv2d: a transposed convolution of stride {list(a.stride)} has no padding "
        f"{a.padding_mode!r} {list(a.padding)}",
    )
    rows = (height - 1) * a.stride[0] + a.weight.shape[2]
    columns = (width - 1) * a.stride[1] + a.weight.shape[3]
    require(
        rows - top - bottom >= 1 and columns - left - right >= 1,
        lambda: f"styleforge::conv2d: padding {list(a.padding)} cuts off all of {rows} x {columns}",
    )
    return rows - top - bottom, columns - left - right
