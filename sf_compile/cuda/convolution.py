"""``styleforge::conv2d`` on a GPU: by a fused kernel where there is one, else around cuDNN's convolution.

One kernel does everything: on compute capability 9.0 one that is made for such a layer, else, from 8.0 on,
the general one. Where either has no room for what is done on the way in, such as adding a residual, or reads
no planes, a pass of its own finishes the input first. Everywhere else our prologue writes the convolution's
finished, upsampled and padded input in one pass, cuDNN convolves it, and our statistics read the raw output
once.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda import first_conv, halo_conv, last_conv, mma_conv, packing, quantized_conv
from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.layout import dense_channels, is_channels_last
from sf_compile.cuda.normalization import apply, converts, normalize, usable
from sf_compile.cuda.statistics import statistics
from sf_compile.ops import reference
from sf_compile.ops.checks import statistics_dtype
from sf_compile.ops.conv2d import composed
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent, empty_image
from sf_compile.ops.normalize import Norm

_MOST_CHOICES = 4096
_NO_NORM = Norm(None, None, None, None, 1.0, "none")
_log = logging.getLogger(__name__)


def runs_channels_last(a: Arguments) -> bool:
    """Whether cuDNN is given channels_last: where asked, where the input is, and for 16-bit pictures."""
    sixteen_bit = a.dtype in (torch.float16, torch.bfloat16)
    return a.channels_last or sixteen_bit or (is_channels_last(a.input) and not a.input.is_contiguous())


def _finished(a: Arguments, z: Tensor) -> Arguments:
    """What is left of ``a`` once its norm, activation and addition have made ``z`` of its input."""
    return a._replace(
        input=z, mean=None, variance=None, norm_weight=None, norm_bias=None, activation="none", residual=None,
        keep_input=False,
    )  # fmt: skip


class Choice(NamedTuple):
    """What runs a convolution.

    Attributes:
        kernel: The module of the fused kernel; None: cuDNN, between passes of ours.
        before: Whether a pass before it finishes the input, or turns its planes.
        behind: Whether a pass behind it makes of its result the dtype, or the planes, that were asked for.
    """

    kernel: Any
    before: bool = False
    behind: bool = False

    def __str__(self) -> str:
        runs = "cuDNN between passes of ours" if self.kernel is None else str(self.kernel.SOURCE)
        before = "a pass that finishes the input, then " if self.before else ""
        return f"{before}{runs}{', then a pass that changes its result' if self.behind else ''}"


_KERNELS: tuple[Any, ...] = (last_conv, first_conv, halo_conv, mma_conv)
_TRANSPOSING = (halo_conv,)
_READING = (first_conv,)  # pictures of another dtype than they compute in
_WRITING = (last_conv,)
_choices: dict[tuple[Any, ...], Choice] = {}
_refusals: dict[tuple[Any, ...], str | None] = {}


def _kernels(a: Arguments) -> tuple[Any, ...]:
    return tuple(kernel for kernel in _KERNELS if kernel in _TRANSPOSING) if a.transposed else _KERNELS


def _refusal(kernel: Any, a: Arguments) -> str | None:
    """Why ``kernel`` does not run ``a``; None where it does."""
    reads = a.input.dtype == a.dtype or (kernel in _READING and converts(a.input.dtype))
    writes = a.output_dtype == a.dtype or (kernel in _WRITING and converts(a.output_dtype))
    if not reads:
        return f"reads {a.dtype}, not {a.input.dtype}"
    if not writes:
        return f"writes {a.dtype}, not {a.output_dtype}"
    if a.residual is not None and a.residual.dtype != a.input.dtype:
        return f"a residual in {a.residual.dtype} beside {a.input.dtype}"
    refusal: str | None = kernel.refusal(a)
    return refusal


def _in_precision(a: Arguments) -> Arguments:
    """``a`` with its parameters in dtypes that the kernels take: copies that are kept."""
    weight, bias = packing.cast(a.weight, a.dtype), a.bias
    if bias is not None:
        bias = packing.cast(bias, a.dtype)
    affine = [
        v if v is None or v.dtype == a.dtype else packing.cast(v, statistics_dtype(a.dtype))
        for v in (a.norm_weight, a.norm_bias)
    ]
    return a._replace(weight=weight, bias=bias, norm_weight=affine[0], norm_bias=affine[1])


def _convolved(
    a: Arguments, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's convolution as ``a`` says, transposed where there is an ``output_padding``."""
    if a.precision in ("tf32", "fp32"):
        transposed = output_padding is not None
        return tf32.convolution(
            x, weight, bias, stride, padding, a.precision, transposed, output_padding or (0, 0)
        )
    if output_padding is None:
        return torch.conv2d(x, weight, bias, stride, padding)
    return torch.conv_transpose2d(x, weight, bias, stride, padding, output_padding)


def choice(a: Arguments) -> Choice:
    """What runs ``a``.

    What the kernels look at is looked at once for each key: three of them in front of sixteen convolutions a
    picture would cost more than launching them.
    """
    key = _key(a)
    found = _choices.get(key)
    if found is None:
        refusals = [(kernel, _refusal(kernel, a)) for kernel in _kernels(a)]
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = _chosen(a, [kernel for kernel, refusal in refusals if refusal is None])
        _explain(a, found, refusals)
    return found


def quantized_refusal(a: Arguments) -> str | None:
    """Why ``a`` with an ``input_scale`` is computed without it; None where integers are multiplied.

    Looked at once for each key, as by ``choice``.
    """
    if a.precision != "auto":
        a = _in_precision(a)
    a = a._replace(input_scale=1.0)
    key = _key(a)
    if key not in _refusals:
        if len(_refusals) >= _MOST_CHOICES:
            _refusals.clear()
        reason = _refusals[key] = quantized_conv.refusal(a)
        runs = f"{a.dtype}: {reason}" if reason else "8-bit integers"
        _log.debug("conv2d of %s by %s in %s", tuple(a.input.shape), tuple(a.weight.shape), runs)
    return _refusals[key]


def _chosen(a: Arguments, fitting: list[Any]) -> Choice:
    """What ``choice`` returns, of those among ``_kernels(a)`` that do not refuse ``a``."""
    if fitting and fitting[0] is not mma_conv:
        return Choice(fitting[0])
    # A pass in front finishes in channels_last, and what is kept has the layout of the output.
    casts = a.input.dtype != a.dtype
    turns = a.channels_last and not is_channels_last(a.input)
    passes = (a.normalizes or casts or turns) and _passes(a) and (a.channels_last or not a.keep_input)
    # What the pass will write, for the kernels to look at.
    z = empty_image(a.input.shape, a.input, True, a.dtype) if passes and (casts or turns) else a.input
    finished = _finished(a, z)
    for kernel in _kernels(a) if passes else ():
        if kernel is not mma_conv and _refusal(kernel, finished) is None:
            return Choice(kernel, before=True)
    if mma_conv in _kernels(a) and mma_conv.prefers(a):
        if fitting:
            return Choice(mma_conv)
        if passes and _refusal(mma_conv, finished) is None:
            return Choice(mma_conv, before=True)
    written = _as_kernels_write(a)
    return Choice(None) if written is None else choice(written)._replace(behind=True)


def _as_kernels_write(a: Arguments) -> Arguments | None:
    """``a``, which no kernel runs, but for its result's dtype or layout; None where that gains nothing.

    In channels_last a kernel may run it, where cuDNN would be called between passes as well.
    """
    if a.output_dtype != a.dtype:
        return a._replace(out_dtype=None)
    turned = a._replace(channels_last=True)
    turns = not a.channels_last and not a.keep_input and choice(turned).kernel is not None
    return turned if turns else None


def _explain(a: Arguments, found: Choice, refusals: list[tuple[Any, str | None]]) -> None:
    """One debug line for a convolution that was not seen before: what runs it, and why nothing else does."""
    if not _log.isEnabledFor(logging.DEBUG):
        return
    reasons = "; ".join(f"not {other.SOURCE}: {reason}" for other, reason in refusals if reason)
    _log.debug(
        "%s of %s %s by %s: %s (%s)",
        "transposed conv2d" if a.transposed else "conv2d",
        a.input.dtype, tuple(a.input.shape), tuple(a.weight.shape), found,
        reasons or "its first choice",
    )  # fmt: skip


def _key(a: Arguments) -> tuple[Any, ...]:
    """Everything of ``a`` that a refusal can depend on."""
    pictures = (a.input, a.weight, a.residual)
    vectors = (a.bias, a.mean, a.variance)
    affine = (a.norm_weight, a.norm_bias)
    return (
        usable_or_warn(), tf32.allowed(a.precision), a.input.device.index,
        *(None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in pictures),
        *(None if t is None else (t.dtype, t.dim(), t.is_contiguous()) for t in vectors),
        *(None if t is None else (t.dtype, dense_channels(t)) for t in affine),
        a.activation, a.upsample, *a.padding, a.padding_mode, *a.stride, *a[-8:],
    )  # fmt: skip


def _passes(a: Arguments, out_width: int = 0) -> bool:
    """Whether a pass of ours takes what is done on the way into ``a``."""
    residual = None if a.residual is None else a.residual.dtype
    return usable(a.input, out_width) and converts(residual, a.dtype)


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; its arguments have been checked."""
    if a.precision != "auto":
        a = _in_precision(a)
    if a.input_scale is not None:
        if quantized_refusal(a) is None:
            return quantized_conv.conv2d(a)
        a = a._replace(input_scale=None)
    kernel, before, behind = choice(a)
    if behind:
        written = _as_kernels_write(a)
        assert written is not None
        out, mean, variance, stored = conv2d(written)
        dtype = statistics_dtype(a.output_dtype)
        out = normalize(out, _NO_NORM, None, a.channels_last, dtype=a.output_dtype)
        return out, mean.to(dtype), variance.to(dtype), stored
    if before:
        z, _ = apply(a.input, a.norm, a.residual, 1, (0, 0, 0, 0), "zeros", True, dtype=a.dtype)
        out, mean, variance, none = kernel.conv2d(_finished(a, z))
        return out, mean, variance, z if a.keep_input else none
    if kernel is not None:
        return kernel.conv2d(a)
    left, right, top, bottom = (0, 0, 0, 0) if a.transposed else a.padding
    if not _passes(a, a.input.shape[3] * a.upsample + left + right):
        return composed(a)
    channels_last = runs_channels_last(a)
    zeros = a.padding_mode == "zeros" and left == right and top == bottom
    copies = a.upsample > 1 or (any((left, right, top, bottom)) and not zeros)
    in_layout = is_channels_last(a.input) if channels_last else a.input.is_contiguous()
    z, kept = a.input, None
    if a.normalizes or copies or not in_layout or a.input.dtype != a.dtype:
        padding = (0, 0, 0, 0) if zeros else (left, right, top, bottom)
        keep = a.keep_input and (copies or channels_last != a.channels_last)
        z, kept = apply(
            a.input, a.norm, a.residual, a.upsample, padding, a.padding_mode, channels_last, keep,
            a.channels_last, dtype=a.dtype,
        )  # fmt: skip
        if a.keep_input and kept is None:
            kept = z
    weight = packing.channels_last(a.weight) if channels_last else a.weight
    if a.transposed:
        convolve = functools.partial(_convolved, a)
        out = reference.conv_transpose2d(z, weight, a.bias, a.stride, a.padding, "none", convolve)
    else:
        out = _convolved(a, z, weight, a.bias, list(a.stride), [top, left] if zeros else [0, 0])
    out = reference.activate_(out, a.output_activation)
    dtype = statistics_dtype(a.dtype)
    if a.statistics:
        mean, variance = statistics(out)
    else:
        mean, variance = absent(a.input, dtype), absent(a.input, dtype)
    return (
        reference.layout(out, a.channels_last),
        mean,
        variance,
        absent(a.input, a.dtype) if kept is None else kept,
    )
