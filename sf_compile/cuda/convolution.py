"""``styleforge::conv2d`` on a GPU: by a fused kernel where there is one, else around cuDNN's convolution.

One kernel does everything: on compute capability 9.0 one that is made for such a layer, else, from 8.0 on,
the general one. Where either has no room for what is done on the way in, such as adding a residual, a pass of
its own finishes the input first. Everywhere else our prologue writes the convolution's finished, upsampled
and padded input in one pass, cuDNN convolves it, and our statistics read the raw output once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from sf_compile.cuda import first_conv, halo_conv, last_conv, mma_conv, packing, tf32
from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.layout import dense_channels, is_channels_last
from sf_compile.cuda.normalization import apply, usable
from sf_compile.cuda.statistics import statistics
from sf_compile.ops import reference
from sf_compile.ops.checks import statistics_dtype
from sf_compile.ops.conv2d import Arguments, absent, composed

_MOST_CHOICES = 4096
_log = logging.getLogger(__name__)


def runs_channels_last(a: Arguments) -> bool:
    """Whether cuDNN is given channels_last: where asked, where the input is, and for 16-bit pictures."""
    sixteen_bit = a.input.dtype in (torch.float16, torch.bfloat16)
    return a.channels_last or sixteen_bit or (is_channels_last(a.input) and not a.input.is_contiguous())


def _finished(a: Arguments, z: Tensor) -> Arguments:
    """What is left of ``a`` once its norm, activation and addition have made ``z`` of its input."""
    return a._replace(
        input=z, mean=None, variance=None, norm_weight=None, norm_bias=None, activation="none", residual=None,
        keep_input=False,
    )  # fmt: skip


_KERNELS: tuple[Any, ...] = (last_conv, first_conv, halo_conv, mma_conv)
_TRANSPOSING = (halo_conv,)
_choices: dict[tuple[Any, ...], tuple[Any, bool]] = {}


def _kernels(a: Arguments) -> tuple[Any, ...]:
    return tuple(kernel for kernel in _KERNELS if kernel in _TRANSPOSING) if a.transposed else _KERNELS


def choice(a: Arguments) -> tuple[Any, bool]:
    """The module of the fused kernel that runs ``a``, or None; whether a pass before it finishes the input.

    What the kernels look at is looked at once for each key: three of them in front of sixteen convolutions a
    picture would cost more than launching them.
    """
    key = _key(a)
    found = _choices.get(key)
    if found is None:
        refusals = [(kernel, kernel.refusal(a)) for kernel in _kernels(a)]
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = _chosen(a, [kernel for kernel, refusal in refusals if refusal is None])
        _explain(a, *found, refusals)
    return found


def _chosen(a: Arguments, fitting: list[Any]) -> tuple[Any, bool]:
    """What ``choice`` returns, of those among ``_kernels(a)`` that do not refuse ``a``."""
    if fitting and fitting[0] is not mma_conv:
        return fitting[0], False
    # A pass in front finishes in channels_last, and what is kept has the layout of the output.
    passes = a.normalizes and usable(a.input) and (a.channels_last or not a.keep_input)
    finished = _finished(a, a.input)
    for kernel in _kernels(a) if passes else ():
        if kernel is not mma_conv and kernel.refusal(finished) is None:
            return kernel, True
    if mma_conv in _kernels(a) and mma_conv.prefers(a):
        if fitting:
            return mma_conv, False
        if passes and mma_conv.refusal(finished) is None:
            return mma_conv, True
    return None, False


def _explain(a: Arguments, kernel: Any, split: bool, refusals: list[tuple[Any, str | None]]) -> None:
    """One debug line for a convolution that was not seen before: what runs it, and why nothing else does."""
    if not _log.isEnabledFor(logging.DEBUG):
        return
    runs = "cuDNN between passes of ours" if kernel is None else kernel.SOURCE
    if split:
        runs = f"a pass that finishes the input, then {runs}"
    reasons = "; ".join(f"not {other.SOURCE}: {reason}" for other, reason in refusals if reason)
    _log.debug(
        "%s of %s %s by %s: %s (%s)",
        "transposed conv2d" if a.transposed else "conv2d",
        a.input.dtype, tuple(a.input.shape), tuple(a.weight.shape), runs, reasons or "its first choice",
    )  # fmt: skip


def _key(a: Arguments) -> tuple[Any, ...]:
    """Everything of ``a`` that a refusal can depend on."""
    pictures = (a.input, a.weight, a.residual)
    vectors = (a.bias, a.mean, a.variance)
    affine = (a.norm_weight, a.norm_bias)
    return (
        usable_or_warn(), tf32.allowed(), a.input.device.index,
        *(None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in pictures),
        *(None if t is None else (t.dtype, t.dim(), t.is_contiguous()) for t in vectors),
        *(None if t is None else (t.dtype, dense_channels(t)) for t in affine),
        a.activation, a.upsample, *a.padding, a.padding_mode, *a.stride, *a[-5:],
    )  # fmt: skip


def conv2d(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``styleforge::conv2d``; its arguments have been checked."""
    kernel, split = choice(a)
    if split:
        z, _ = apply(a.input, a.norm, a.residual, 1, (0, 0, 0, 0), "zeros", True)
        out, mean, variance, none = kernel.conv2d(_finished(a, z))
        return out, mean, variance, z if a.keep_input else none
    if kernel is not None:
        return kernel.conv2d(a)
    left, right, top, bottom = (0, 0, 0, 0) if a.transposed else a.padding
    if not usable(a.input, a.input.shape[3] * a.upsample + left + right):
        return composed(a)
    channels_last = runs_channels_last(a)
    zeros = a.padding_mode == "zeros" and left == right and top == bottom
    copies = a.upsample > 1 or (any((left, right, top, bottom)) and not zeros)
    in_layout = is_channels_last(a.input) if channels_last else a.input.is_contiguous()
    z, kept = a.input, None
    if a.normalizes or copies or not in_layout:
        padding = (0, 0, 0, 0) if zeros else (left, right, top, bottom)
        keep = a.keep_input and (copies or channels_last != a.channels_last)
        z, kept = apply(
            a.input, a.norm, a.residual, a.upsample, padding, a.padding_mode, channels_last, keep,
            a.channels_last,
        )  # fmt: skip
        if a.keep_input and kept is None:
            kept = z
    weight = packing.channels_last(a.weight) if channels_last else a.weight
    if a.transposed:
        out = reference.conv_transpose2d(z, weight, a.bias, a.stride, a.padding, "none")
    else:
        out = torch.conv2d(z, weight, a.bias, list(a.stride), [top, left] if zeros else [0, 0])
    out = reference.activate_(out, a.output_activation)
    dtype = statistics_dtype(a.input.dtype)
    if a.statistics:
        mean, variance = statistics(out)
    else:
        mean, variance = absent(a.input, dtype), absent(a.input, dtype)
    return (
        reference.layout(out, a.channels_last),
        mean,
        variance,
        absent(a.input, a.input.dtype) if kept is None else kept,
    )
