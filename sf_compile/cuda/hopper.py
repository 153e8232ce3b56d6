"""What the fused convolutions, of compute capability 9.0 and in general, have in common on the host side.

Their kernels convolve on the tensor cores with 16-bit operands, or float32 ones in TF32, and fp32
accumulation, apply the producer's norm on the way in and take the statistics of their own output on the way
out.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda.compiler import usable_or_warn
from sf_compile.cuda.layout import dense_channels, image_stride, parameter_dtype, pointer
from sf_compile.cuda.workspace import zeroed
from sf_compile.ops.checks import statistics_dtype
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.library import absent

SHARED_BYTES = 232_448
"""Shared memory that a block may have on compute capability 9.0 (CUDA C++ Programming Guide, 227 KB)."""

SIXTEEN_BIT = {torch.float16: 1, torch.bfloat16: 2}
"""The dtypes that all kernels compute in, with the value of their DTYPE constant."""

OPERANDS = {torch.float32: 0, **SIXTEEN_BIT}
"""The dtypes of pictures that the fused convolutions take, float32 in TF32, with their DTYPE constant."""

NORM_SIGNATURE = "PPPPfqqq"
SUMS_SIGNATURE = "PPP"
_HEADER_BYTES = 16
_TOTAL_BYTES = 8 * (4 * 8 + 2)  # of an (image, channel): four totals in eight copies, and two counts


KERNELS = "STYLEFORGE_KERNELS"
"""The environment variable that names the kernels to use: ``auto``, or ``general``, those of every GPU."""


@functools.cache
def available(index: int) -> bool:
    """Whether CUDA device ``index`` runs the kernels for compute capability 9.0, which may not be wanted.

    Raises:
        ValueError: ``STYLEFORGE_KERNELS`` is neither ``auto`` nor ``general``.
    """
    wanted = os.environ.get(KERNELS) or "auto"
    if wanted not in ("auto", "general"):
        raise ValueError(f"styleforge: {KERNELS}={wanted} names no kernels; valid: auto, general")
    return wanted == "auto" and torch.cuda.get_device_capability(index) == (9, 0)


def kernels(index: int) -> str | None:
    """Which fused convolutions CUDA device ``index`` runs: ``"sm_90a"``, ``"general"``, or None: none.

    Raises:
        ValueError: as ``available``.
    """
    if not usable_or_warn() or torch.cuda.get_device_capability(index) < (8, 0):
        return None
    return "sm_90a" if available(index) else "general"


def runs_on(x: Tensor) -> bool:
    """Whether ``x`` is a picture in a dtype and on a device that kernels of this family run on."""
    on_hopper = x.is_cuda and available(x.device.index)
    return on_hopper and x.dtype in OPERANDS and x.numel() > 0 and usable_or_warn()


def refusal(a: Arguments) -> str | None:
    """Why no kernel of this family runs ``a``; None where one may."""
    if not a.input.is_cuda or not available(a.input.device.index):
        return "the fused convolutions need compute capability 9.0"
    return operand_refusal(a)


def operand_refusal(a: Arguments) -> str | None:
    """Why no fused convolution takes the tensors of ``a``, on whatever GPU; None where one may."""
    if a.dtype == torch.float32 and not tf32.allowed(a.precision):
        return "TF32 is not allowed"
    if a.dtype not in OPERANDS:
        return f"the fused convolutions do not compute in {a.dtype}"
    if a.input.numel() == 0:
        return "the picture is empty"
    if parameter(a) is None:
        return "the norm's weight and bias have a dtype of their own"
    if not all(vector is None or vector.is_contiguous() for vector in (a.mean, a.variance, a.bias)):
        return "a vector of the norm is not contiguous"
    if not (dense_channels(a.norm_weight) and dense_channels(a.norm_bias)):
        return "a norm's weight or bias is not contiguous"
    if any(v is not None and v.dtype != torch.float32 for v in (a.mean, a.variance)):
        return "the statistics are not float32"
    if not usable_or_warn():
        return "NVRTC is missing"
    return None


def parameter(a: Arguments) -> int | None:
    """The PARAMETER constant for the norm's weight and bias; None where no kernel takes them."""
    return parameter_dtype(a.input.dtype, a.norm_weight, a.norm_bias)


def norm_arguments(a: Arguments) -> tuple[int | float, ...]:
    """What ``Norm`` in csrc/norm.cuh is made of, for ``NORM_SIGNATURE``."""
    return (
        pointer(a.mean), pointer(a.variance), pointer(a.norm_weight), pointer(a.norm_bias), a.eps,
        image_stride(a.mean), image_stride(a.norm_weight), image_stride(a.norm_bias),
    )  # fmt: skip


def statistics_outputs(a: Arguments) -> tuple[Tensor, Tensor]:
    """Room for the output's mean and variance, (N, O) float32; empty where they are not asked for."""
    if not a.statistics:
        dtype = statistics_dtype(a.input.dtype)
        return absent(a.input, dtype), absent(a.input, dtype)
    shape = (a.input.shape[0], a.out_channels)
    mean = torch.empty(shape, dtype=torch.float32, device=a.input.device)
    return mean, torch.empty_like(mean)


def sums_arguments(a: Arguments, mean: Tensor, variance: Tensor) -> tuple[int, int, int]:
    """Workspace, mean and variance for csrc/channel_sums.cuh, for ``SUMS_SIGNATURE``; zeros for none."""
    if not a.statistics:
        return 0, 0, 0
    size = _HEADER_BYTES + _TOTAL_BYTES * a.input.shape[0] * a.out_channels
    return zeroed(a.input.device, "channel sums", size), mean.data_ptr(), variance.data_ptr()

