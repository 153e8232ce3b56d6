"""Host side of csrc/normalize.cu: one pass that normalises, activates, adds, upsamples and pads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.cuda import activation
from sf_compile.cuda.activation import FLOOR
from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import (
    DTYPES,
    PADS,
    dense_channels,
    image_stride,
    is_channels_last,
    multiprocessors,
    parameter_dtype,
    parameter_dtypes,
    pointer,
    vector_width,
    vector_widths,
)
from sf_compile.cuda.loader import load
from sf_compile.ops import reference
from sf_compile.ops.library import empty_image
from sf_compile.ops.normalize import Norm

SOURCE = "normalize.cu"
CHANNELS_LAST, CONTIGUOUS, STRIDED = 0, 1, 2
_THREADS = 256
_UNROLL = 4
_RESIDENT = 3  # blocks of the channels_last kernel that a multiprocessor holds at once, at most
_GRID_LIMIT = 65535
_SIGNATURE = "PPPPPPPPf" + activation.SIGNATURE + "qqqiiiiiiii"
_FACTORS = (1, 2, 0)  # compiled in; 0 takes the factor at run time
_OUTPUTS = {**DTYPES, torch.int8: 3, torch.uint8: 4}
_BYTES = min(_OUTPUTS[torch.int8], _OUTPUTS[torch.uint8])  # from here on OUTPUT is of 8 bits
_EXTRA = {CHANNELS_LAST: "iii", CONTIGUOUS: "q", STRIDED: "iiqqqqqqqq"}


class Variant(NamedTuple):
    """The compile-time constants of one ``normalize`` kernel.

    ``residual`` and ``output`` are the DTYPE of each where it is another than the input's.
    """

    layout: int
    dtype: int
    parameter: int
    vector: int
    upsample: int
    pad: int
    activation: int = FLOOR
    residual: int = -1
    output: int = -1

    def constants(self) -> dict[str, int]:
        """By the names that the kernel source uses."""
        own = {"RESIDUAL": self.residual, "OUTPUT": self.output}
        named = {name.upper(): int(value) for name, value in self._asdict().items()}
        return named | {name: self.dtype if value < 0 else value for name, value in own.items()}


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (source, constants) that ``apply`` can ask for; of activations beyond ReLU only some."""
    for dtype in DTYPES.values():
        for parameter, upsample, pad in product(parameter_dtypes(dtype), _FACTORS, range(4)):
            moves = pad > 0 or upsample != 1
            widths = {
                CHANNELS_LAST: vector_widths(dtype),
                CONTIGUOUS: (1,) if moves else vector_widths(dtype),
                STRIDED: (1,),
            }
            for layout, vectors in widths.items():
                for vector in vectors:
                    yield SOURCE, Variant(layout, dtype, parameter, vector, upsample, pad).constants()
    for function in activation.GENERAL:
        yield SOURCE, Variant(CHANNELS_LAST, 1, 1, 8, 1, 0, function).constants()
        yield SOURCE, Variant(CONTIGUOUS, 0, 0, 4, 1, 0, function).constants()
    for dtype in (1, 2):  # from a picture in float32 into a region, and out of it again
        for pad in (0, 2):
            yield SOURCE, Variant(STRIDED, 0, 0, 1, 1, pad, FLOOR, 0, dtype).constants()
            yield SOURCE, Variant(CHANNELS_LAST, dtype, 0, 4, 1, pad, FLOOR, 0, 0).constants()
        yield SOURCE, Variant(CONTIGUOUS, 0, 0, 4, 1, 0, FLOOR, dtype, dtype).constants()
        yield SOURCE, Variant(STRIDED, dtype, 0, 1, 1, 0, FLOOR, dtype, 0).constants()
    yield SOURCE, Variant(STRIDED, 2, 2, 1, 0, 2, activation.GELU).constants()
    yield SOURCE, Variant(CHANNELS_LAST, 2, 0, 8, 2, 2, activation.LEAKY).constants()
    for layout, vector in ((CHANNELS_LAST, 8), (CONTIGUOUS, 8), (STRIDED, 1)):
        yield SOURCE, Variant(layout, 1, 1, vector, 1, 0, activation.PRELU).constants()
    for dtype, parameter in ((1, 1), (1, 0), (2, 2)):
        for output in (_OUTPUTS[torch.int8], _OUTPUTS[torch.uint8]):
            yield SOURCE, Variant(CHANNELS_LAST, dtype, parameter, 8, 1, 0, FLOOR, -1, output).constants()


@functools.cache
def _kernel(index: int, variant: Variant) -> Kernel:
    slope = "Pq" if variant.activation == activation.PRELU else ""
    per_unit = "f" if variant.output >= _BYTES else ""
    signature = _SIGNATURE + slope + per_unit + _EXTRA[variant.layout]
    mode = "overlapping" if torch.cuda.get_device_capability(index) >= (9, 0) else "ordinary"
    return load(SOURCE, "normalize", variant.constants(), index, signature, mode)


def usable(x: Tensor, out_width: int = 0) -> bool:
    """Whether the kernels take ``x``, to write rows of ``out_width`` pixels if that is more than its own.

    They do for a dtype they have, rows of under 2^30 elements (within a row they count in 32 bits), and
    where NVRTC is at hand.
    """
    n, c, _, w = x.shape
    indexable = n <= _GRID_LIMIT and c * max(w, out_width) < 2**30
    return x.dtype in DTYPES and x.numel() > 0 and indexable and usable_or_warn()


def converts(*dtypes: torch.dtype | None) -> bool:
    """Whether the kernels read a residual, and write, in each of these."""
    return all(dtype is None or dtype in DTYPES for dtype in dtypes)


def _float(vector: Tensor | None) -> Tensor | None:
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.to(torch.float32).contiguous()


def apply(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
    channels_last: bool,
    keep: bool = False,
    keep_channels_last: bool | None = None,
    slope: Tensor | None = None,
    dtype: torch.dtype | None = None,
    per_unit: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """pad(upsample_nearest(act(norm(x)) + residual)) in the asked layout; if ``keep``, what was padded too.

    ``x`` and ``residual`` are (N, C, H, W) of any strides, each in one dtype of ``DTYPES``; ``padding`` is
    left, right, top, bottom, already checked; ``slope`` is a PReLU's, (1,) or (C,). Returns fresh tensors, in
    ``dtype`` or in that of ``x``. The caller has asked ``usable``, and ``converts`` for the residual's dtype
    and ``dtype``.

    With ``per_unit``, ``dtype`` is int8 or uint8: the first result is rounded to integers after it was
    multiplied by that, and the second is in the dtype of ``x``. Everything is channels_last then, of channels
    in multiples of 16.
    """
    n, c, h, w = x.shape
    left, right, top, bottom = padding
    out_h, out_w = h * upsample + top + bottom, w * upsample + left + right
    dtype = dtype or x.dtype
    out = empty_image((n, c, out_h, out_w), x, channels_last, dtype)
    if not keep or keep_channels_last is None:
        keep_channels_last = channels_last
    kept_dtype = dtype if per_unit is None else x.dtype
    kept = empty_image(x.shape, x, keep_channels_last, kept_dtype) if keep else None
    if out.numel() == 0:
        return out, kept
    weight, bias, mean, variance = norm.weight, norm.bias, _float(norm.mean), _float(norm.variance)
    parameter = parameter_dtype(x.dtype, weight, bias)
    if parameter is None:
        weight, bias, parameter = _float(weight), _float(bias), DTYPES[torch.float32]
    weight, bias = (v if v is None or dense_channels(v) else v.contiguous() for v in (weight, bias))
    moves = upsample > 1 or any(padding)
    inputs = [t for t in (x, residual) if t is not None]
    if channels_last and keep_channels_last and all(is_channels_last(t) for t in inputs):
        layout, width = CHANNELS_LAST, vector_width(c, *inputs, out, kept)
    elif not channels_last and not (keep and keep_channels_last) and all(t.is_contiguous() for t in inputs):
        layout, width = CONTIGUOUS, 1 if moves else vector_width(h * w, *inputs, out, kept)
    else:
        layout, width = STRIDED, 1
    if layout == CHANNELS_LAST and not moves and c * h * w < 2**30:
        h, w, out_h, out_w = 1, h * w, 1, h * w  # one row, to be cut evenly
    pad = PADS[padding_mode] if any(padding) else 0
    factor = upsample if upsample in _FACTORS else 0
    function = activation.shared_code(norm.activation)
    own = [-1 if t is None or t.dtype == x.dtype else _OUTPUTS[t.dtype] for t in (residual, out)]
    variant = Variant(layout, DTYPES[x.dtype], parameter, width, factor, pad, function, *own)
    kernel = _kernel(x.device.index, variant)
    arguments: tuple[Any, ...] = (
        pointer(x), pointer(residual), pointer(out), pointer(kept), pointer(mean), pointer(variance),
        pointer(weight), pointer(bias), norm.eps, activation.arguments(norm.activation),
        image_stride(mean), image_stride(weight), image_stride(bias), c, h, w, upsample, top, left, out_h,
        out_w,
    )  # fmt: skip
    if slope is not None:
        arguments = (*arguments, pointer(slope), slope.stride(0) if slope.shape[0] == c else 0)
    if per_unit is not None:
        assert layout == CHANNELS_LAST and width % 4 == 0
        arguments = (*arguments, per_unit)
    if layout == CHANNELS_LAST:
        groups = c // width
        lanes, chunks = min(groups, _THREADS), -(-groups // _THREADS)
        segments, segment = _row_segments(x.device.index, n * chunks, out_h, out_w, _THREADS // lanes)
        blocks = min(out_h * segments, max(1, multiprocessors(x.device.index) * _RESIDENT // (n * chunks)))
        kernel.launch((blocks, n, chunks), _THREADS, 0, (*arguments, lanes, segments, segment))
    elif layout == CONTIGUOUS:
        blocks = out_h if moves else -(-(h * w) // (_THREADS * _UNROLL * width))
        kernel.launch((blocks, min(n * c, _GRID_LIMIT), 1), _THREADS, 0, (*arguments, n * c))
    else:
        add = residual.stride() if residual is not None else (0, 0, 0, 0)
        kernel.launch(
            (out_h, n, 1), _THREADS, 0,
            (*arguments, int(channels_last), int(keep_channels_last), *x.stride(), *add),
        )  # fmt: skip
    return out, kept


def _row_segments(index: int, images: int, rows: int, width: int, columns: int) -> tuple[int, int]:
    """How many segments a row is cut into, and their length: enough blocks to fill the GPU."""
    blocks = multiprocessors(index) * _RESIDENT
    # Of one row a segment for each block, and none for a second turn of a few.
    wanted = blocks // images if rows == 1 else -(-blocks // (images * rows))
    segments = max(1, min(wanted, width // (columns * _UNROLL)))
    length = -(-width // segments)
    return -(-width // length), length


def normalize(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None,
    channels_last: bool,
    upsample: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    padding_mode: str = "zeros",
    slope: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``styleforge::normalize``; its arguments have been checked."""
    fits = usable(input, input.shape[3] * upsample + padding[0] + padding[1])
    if not fits or not converts(dtype, None if residual is None else residual.dtype):
        z = reference.normalize(input, *norm, residual, slope, dtype)
        return reference.layout(reference.moved(z, upsample, padding, padding_mode), channels_last)
    z, _ = apply(
        input, norm, residual, upsample, padding, padding_mode, channels_last, slope=slope, dtype=dtype
    )
    return z
