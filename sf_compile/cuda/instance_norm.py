"""Host side of csrc/instance_norm.cu and csrc/instance_norm_plane.cu: ``styleforge::instance_norm`` on a GPU.

Small contiguous planes, enough of them to fill the GPU, take the plane kernel (one block a plane,
in registers); everything else dense takes the slab kernel. Both read each pixel once where it can
stay on the chip. A picture that is dense in neither layout, or whose output layout differs, goes
through ``statistics`` and ``normalize``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product

from torch import Tensor

from sf_compile.cuda import activation as functions
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import (
    DTYPES,
    dense_channels,
    image_stride,
    is_channels_last,
    multiprocessors,
    parameter_dtype,
    parameter_dtypes,
    pointer,
    shared_bytes,
    vector_width,
    vector_widths,
)
from sf_compile.cuda.loader import load
from sf_compile.cuda.normalization import normalize, usable
from sf_compile.cuda.slabs import STEP, SlabVariant, cut, phased, slab_variants
from sf_compile.cuda.statistics import statistics
from sf_compile.ops.instance_norm import Arguments
from sf_compile.ops.library import empty_image

SLAB_SOURCE = "instance_norm.cu"
PLANE_SOURCE = "instance_norm_plane.cu"
_THREADS = 640
_SHARED_BYTES_PER_CHANNEL = 172  # of a group: its moments in each of 20 warps, and its map
_HELD = (1, 2, 4, 8)
_PLANE_VECTORS = 512 * _HELD[-1]
_PLANE_BYTES = 64 * 1024  # a larger plane is better cut into slabs, or held in shared memory


def slab_constants(slab: SlabVariant, parameter: int, function: int = functions.FLOOR) -> dict[str, int]:
    """The compile-time constants of one csrc/instance_norm.cu kernel."""
    cut_by = {name.upper(): int(value) for name, value in slab._asdict().items()}
    return cut_by | {"PARAMETER": parameter, "ACTIVATION": function}


def plane_constants(
    dtype: int, parameter: int, vector: int, held: int, function: int = functions.FLOOR
) -> dict[str, int]:
    """The compile-time constants of one csrc/instance_norm_plane.cu kernel."""
    return {
        "DTYPE": dtype, "PARAMETER": parameter, "VECTOR": vector, "HELD": held, "ACTIVATION": function,
    }  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (source, constants) that ``instance_norm`` can ask for; of activations beyond ReLU only some."""
    for slab in slab_variants():
        for parameter in parameter_dtypes(slab.dtype):
            yield SLAB_SOURCE, slab_constants(slab, parameter)
    for dtype in DTYPES.values():
        for parameter, vector, held in product(parameter_dtypes(dtype), vector_widths(dtype), _HELD):
            yield PLANE_SOURCE, plane_constants(dtype, parameter, vector, held)
    for function in functions.GENERAL:
        if function != functions.GELU_TANH:  # it spills 8 bytes for sm_120
            yield SLAB_SOURCE, slab_constants(SlabVariant(1, True, 8, 8), 1, function)
        yield PLANE_SOURCE, plane_constants(1, 1, 8, 8, function)
    yield SLAB_SOURCE, slab_constants(SlabVariant(0, False, 4, 1), 0, functions.GELU)


@functools.cache
def _slab_kernel(index: int, slab: SlabVariant, parameter: int, waits: bool, function: int) -> Kernel:
    constants = slab_constants(slab, parameter, function)
    mode = "cooperative" if waits else "ordinary"
    signature = "PPPPPPqqf" + functions.SIGNATURE + "iqiii"
    return load(SLAB_SOURCE, "instance_norm", constants, index, signature, mode)


@functools.cache
def _plane_kernel(
    index: int, dtype: int, parameter: int, vector: int, held: int, function: int
) -> Kernel:
    constants = plane_constants(dtype, parameter, vector, held, function)
    signature = "PPPPPqqf" + functions.SIGNATURE + "ii"
    return load(PLANE_SOURCE, "instance_norm_plane", constants, index, signature)


def plane_block(vectors: int) -> tuple[int, int]:
    """(held, threads) of the plane kernel for planes of ``vectors`` accesses, at most 4096."""
    held = next(h for h in _HELD if h == 8 or vectors <= h * 64)
    return held, max(32, -(-vectors // (held * 32)) * 32)


def instance_norm(a: Arguments) -> Tensor:
    """``styleforge::instance_norm``; its arguments have been checked."""
    input, weight, bias, eps, activation, residual, channels_last = a
    parameter = parameter_dtype(input.dtype, weight, bias)
    dense = is_channels_last if channels_last else Tensor.is_contiguous
    inputs = [t for t in (input, residual) if t is not None]
    vectors = dense_channels(weight) and dense_channels(bias)
    if parameter is None or not vectors or not usable(input) or not all(dense(t) for t in inputs):
        return normalize(input, a.norm(*statistics(input)), residual, channels_last)
    n, c, h, w = input.shape
    index, dtype = input.device.index, DTYPES[input.dtype]
    function, numbers = functions.shared_code(activation), functions.arguments(activation)
    out = empty_image(input.shape, input, channels_last)
    pointers = (pointer(input), pointer(residual), pointer(out), pointer(weight), pointer(bias))
    strides = (image_stride(weight), image_stride(bias))
    small = h * w * input.element_size() <= _PLANE_BYTES and 2 * n * c >= multiprocessors(index)
    if input.is_contiguous() and out.is_contiguous() and small:
        vector = vector_width(h * w, input, residual)
        if h * w <= vector * _PLANE_VECTORS:
            held, threads = plane_block(h * w // vector)
            kernel = _plane_kernel(index, dtype, parameter, vector, held, function)
            kernel.launch((n * c, 1, 1), threads, 0, (*pointers, *strides, eps, numbers, c, h * w))
            return out
    slabs = cut(input, _THREADS, 1, residual)
    variant = slabs.variant
    step_bytes = STEP * _THREADS * variant.vector * input.element_size()
    left = shared_bytes(index) - _SHARED_BYTES_PER_CHANNEL * slabs.group - 1024
    slots = left // step_bytes
    _slab_kernel(index, variant, parameter, slabs.slices > 1, function).launch(
        slabs.grid, _THREADS, slots * step_bytes,
        (*pointers, phased(input, slabs), *strides, eps, numbers, c, h * w, slabs.turns, slabs.rest, slots),
    )  # fmt: skip
    return out
