"""What is in the library of ``building``, as functions of tensors, float32 or bfloat16, of any strides."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor

from sf_compile.cpu import building
from sf_compile.cpu.forms import WINOGRAD_CHANNELS
from sf_compile.cpu.structures import (
    Assemble,
    Finish,
    Groups,
    Layout,
    Statistics,
    Winograd,
    activation_of,
    library_function,
)
from sf_compile.ops import reference
from sf_compile.ops.library import empty_image
from sf_compile.ops.normalize import Norm

DIRECT, SUBPIXEL, COLUMNS, WINOGRAD = range(4)
"""The forms of a convolution: csrc/cpu/assemble.cpp finishes the first three, winograd.cpp is the last."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_MODES = {"zeros": 0, "reflect": 1, "replicate": 2}


def take(x: Tensor) -> bool:
    """Whether the kernels are there and take such a picture; builds them at the first one."""
    # Autocast would hand the convolutions in between another dtype.
    known = x.dtype in _DTYPES and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
    return known and building.library() is not None


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _vector(vector: Tensor | None) -> Tensor | None:
    """(C,) or (N, C) in float32, dense."""
    if vector is None or (vector.dtype is torch.float32 and vector.is_contiguous()):
        return vector
    return vector.detach().to(torch.float32).contiguous()


def _step(vector: Tensor | None) -> int:
    """From image to image."""
    return 0 if vector is None or vector.dim() == 1 else vector.shape[1]


_STEPS = c_int64 * 3
_NO_STEPS = _STEPS(0, 0, 0)


def _steps(x: Tensor, channels_last: bool) -> Any:
    """From image to image, row to row and pixel to pixel; of planes from image, channel and row."""
    n, c, h, w = x.stride()
    return _STEPS(n, h, w) if channels_last else _STEPS(n, c, h)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie beside each other, whatever the other strides."""
    return x.stride(1) == 1 or x.shape[1] == 1


def is_planar(x: Tensor) -> bool:
    """Whether the pixels of a row of one channel lie beside each other, whatever the other strides."""
    return x.stride(3) == 1 or x.shape[3] == 1


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) over the pixels of every (image, channel) of (N, C, H, W)."""
    n, c, h, w = x.shape
    of_image, of_channel, of_row, of_pixel = x.stride()
    step = of_pixel if w > 1 else of_row if h > 1 else 1
    if (h > 1 and w > 1 and of_row != w * step) or not (step == 1 or of_channel == 1 or c == 1):
        return statistics(x.contiguous())
    planar = step == 1
    mean, variance = torch.empty((n, c), dtype=torch.float32), torch.empty((n, c), dtype=torch.float32)
    library_function("statistics", Statistics)(
        Statistics(
            x.data_ptr(), mean.data_ptr(), variance.data_ptr(), _DTYPES[x.dtype], planar, n, c, h * w,
            of_image, of_channel if planar else step,
        )
    )  # fmt: skip
    return mean, variance


def norm_statistics(
    mean: Tensor, variance: Tensor, groups: int | None, bessel: float, outer_eps: float | None
) -> tuple[Tensor, Tensor]:
    """``reference.norm_statistics`` of float32 statistics (N, C)."""
    n, c = mean.shape
    mean, variance = mean.contiguous(), variance.contiguous()
    out = torch.empty((n, c), dtype=torch.float32), torch.empty((n, c), dtype=torch.float32)
    groups = c if groups is None else groups
    library_function("groups", Groups)(
        Groups(
            mean.data_ptr(), variance.data_ptr(), out[0].data_ptr(), out[1].data_ptr(), n * groups,
            c // groups, outer_eps is not None, bessel, outer_eps or 0.0, reference.CONSTANT_ROOT,
        )
    )  # fmt: skip
    return out


def layout(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` (N, C, H, W) with the strides of ``reference.layout``: itself where it has them."""
    n, c, h, w = x.shape
    of_image, of_channel, of_row, of_pixel = x.stride()
    planar, pixels = of_pixel == 1, h * w
    is_other = planar == channels_last and (planar or of_channel == 1) and of_row == w * of_pixel
    if not is_other or c == 1 or pixels == 1 or x.dtype not in _DTYPES:
        return reference.layout(x, channels_last)
    output = empty_image(x.shape, x, channels_last)
    library_function("layout", Layout)(
        Layout(
            x.data_ptr(), output.data_ptr(), _DTYPES[x.dtype], n, *((c, pixels) if planar else (pixels, c)),
            of_image, of_channel if planar else of_pixel,
        )
    )  # fmt: skip
    return output


def finish(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    channels_last: bool,
    *,
    upsample: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    padding_mode: str = "zeros",
    dtype: torch.dtype | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The finished picture, upsampled and padded, in a layout and a dtype (by default its own); and as it is.

    A bfloat16 picture may be wanted in float32: it is then not rounded. The finished picture itself is in the
    dtype of ``x``, and only returned if it is to be kept.
    """
    n, c, h, w = x.shape
    dtype = x.dtype if dtype is None else dtype
    left, right, top, bottom = padding
    fits = is_channels_last if channels_last else is_planar
    x = x if fits(x) else layout(x, channels_last)
    if residual is not None and not fits(residual):
        residual = layout(residual, channels_last)
    mean, variance, weight, bias = map(_vector, norm[:4])
    output = torch.empty(
        (n, c, h * upsample + top + bottom, w * upsample + left + right), dtype=dtype,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    same = dtype == x.dtype and upsample == 1 and not any(padding)
    kept = empty_image((n, c, h, w), x, channels_last) if keep and not same else None
    library_function("finish", Finish)(
        Finish(
            x.data_ptr(), _pointer(residual), output.data_ptr(), _pointer(kept), _pointer(mean),
            _pointer(variance), _pointer(weight), _pointer(bias), _step(mean), _step(weight), _step(bias),
            _DTYPES[x.dtype], _DTYPES[dtype], not channels_last, n, c, h, w, _steps(x, channels_last),
            _NO_STEPS if residual is None else _steps(residual, channels_last),
            upsample, left, right, top, bottom, _MODES[padding_mode], norm.eps,
            activation_of(norm.activation),
        )
    )  # fmt: skip
    return output, output if keep and same else kept


def assemble(
    result: Tensor, form: int, shape: Sequence[int], bias: Tensor | None, activation: str, dtype: torch.dtype,
    want_statistics: bool, columns: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """What a convolution in one of the forms stands for, (N, O, H, W) of ``shape``, and its statistics.

    ``result`` is channels_last and dense; where it can be, it is written to. In the form ``DIRECT`` it
    has its bias already.
    """
    assert form != DIRECT or bias is None
    n, c, h, w = shape
    bias = _vector(bias)
    if form == DIRECT and result.dtype == dtype:
        output = result
    else:
        output = torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
    mean = variance = None
    if want_statistics:
        mean, variance = torch.empty((n, c), dtype=torch.float32), torch.empty((n, c), dtype=torch.float32)
    library_function("assemble", Assemble)(
        Assemble(
            result.data_ptr(), output.data_ptr(), _pointer(bias), _pointer(mean), _pointer(variance),
            _DTYPES[result.dtype], _DTYPES[dtype], form, columns, n, c, h, w, activation_of(activation),
        )
    )  # fmt: skip
    return output, mean, variance


def winograd_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) as ``winograd`` wants it: (16, O / 16, C, 16), with O rounded up to a multiple of 32."""
    o, c = weight.shape[:2]
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    transformed = torch.einsum("ij,ocjk,lk->iloc", g, weight.double(), g).reshape(16, o, c)
    rows = transformed.new_zeros((16, -(-o // 32) * 32, c))
    rows[:, :o] = transformed
    return rows.unflatten(1, (-1, WINOGRAD_CHANNELS)).transpose(2, 3).to(torch.float32).contiguous()


def winograd(
    padded: Tensor, weights: Tensor, out_channels: int, bias: Tensor | None, activation: str,
    dtype: torch.dtype, want_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The 3x3 convolution of a finished picture (N, C, H + 2, W + 2), and its statistics.

    The picture is float32, dense in channels_last, and ``weights`` are ``winograd_weights``.
    """
    n, c, h, w = padded.shape
    shape = n, out_channels, h - 2, w - 2
    bias = _vector(bias)
    output = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    mean = variance = None
    if want_statistics:
        mean = torch.empty(shape[:2], dtype=torch.float32)
        variance = torch.empty(shape[:2], dtype=torch.float32)
    library_function("winograd", Winograd)(
        Winograd(
            padded.data_ptr(), output.data_ptr(), weights.data_ptr(), _pointer(bias), _pointer(mean),
            _pointer(variance), _DTYPES[dtype], n, c, *shape[1:], activation_of(activation),
        )
    )  # fmt: skip
    return output, mean, variance
