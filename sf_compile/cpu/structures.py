"""The functions of the library of ``building``, and the structs that they take: each as csrc/cpu has it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from typing import Any

from sf_compile.activations import parse
from sf_compile.cpu import building

_FUNCTIONS = {
    "none": 0, "relu": 1, "leaky_relu": 2, "hardtanh": 3, "clamp": 3, "tanh": 4, "sigmoid": 5, "silu": 6,
    "gelu": 7, "gelu_tanh": 8, "elu": 9,
}  # fmt: skip


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Activation(ctypes.Structure):
    """An activation with its parameters, and the scale and offset behind it."""

    _fields_ = (
        ("function", c_int64), ("parameters", c_double * 2), ("scale", c_double), ("offset", c_double),
    )  # fmt: skip


class Statistics(ctypes.Structure):
    """A picture, and where its mean and variance go."""

    _fields_ = (
        *_fields(c_void_p, "input mean variance"),
        *_fields(c_int64, "dtype planar images channels pixels image_stride stride"),
    )


class Groups(ctypes.Structure):
    """Statistics (N, C), and where those of groups of channels go, or with another correction."""

    _fields_ = (
        *_fields(c_void_p, "mean variance mean_out variance_out"),
        *_fields(c_int64, "groups channels has_outer_eps"),
        *_fields(c_double, "bessel outer_eps constant_root"),
    )


class Finish(ctypes.Structure):
    """A picture with all that is done to it on its way into a convolution."""

    _fields_ = (
        *_fields(c_void_p, "input residual output kept mean variance weight bias"),
        *_fields(c_int64, "mean_stride weight_stride bias_stride dtype output_dtype planar"),
        *_fields(c_int64, "images channels height width"),
        *_fields(c_int64 * 3, "input_strides residual_strides"),
        *_fields(c_int64, "upsample left right top bottom mode"),
        ("eps", c_double), ("activation", Activation),
    )  # fmt: skip


class Assemble(ctypes.Structure):
    """A convolution's result in one of the forms, and what it stands for."""

    _fields_ = (
        *_fields(c_void_p, "input output bias mean variance"),
        *_fields(c_int64, "dtype output_dtype form columns images channels height width"),
        ("activation", Activation),
    )


class Layout(ctypes.Structure):
    """A picture, and where it goes in the other layout."""

    _fields_ = (
        *_fields(c_void_p, "input output"),
        *_fields(c_int64, "dtype images rows columns image_stride row_stride"),
    )


class Winograd(ctypes.Structure):
    """A finished picture and a convolution's weights in Winograd's form."""

    _fields_ = (
        *_fields(c_void_p, "input output weights bias mean variance"),
        *_fields(c_int64, "output_dtype images channels out_channels height width"),
        ("activation", Activation),
    )


@functools.cache
def library_function(name: str, structure: type[ctypes.Structure]) -> Callable[..., None]:
    """``styleforge_<name>`` of the library, which has to be there, as a function of a ``structure``."""
    library = building.library()
    assert library is not None
    size = getattr(library, f"styleforge_{name}_size")
    size.restype = c_int64
    assert size() == ctypes.sizeof(structure), f"{name}: the library and its caller differ"
    function = getattr(library, f"styleforge_{name}")
    function.argtypes, function.restype = (ctypes.POINTER(structure),), None
    return function


@functools.lru_cache(maxsize=256)
def activation_of(text: str) -> Activation:
    """The struct of an activation in text, as the ops take it."""
    found = parse(text)
    parameters = (c_double * 2)(*found.parameters)
    return Activation(_FUNCTIONS[found.function], parameters, found.scale, found.offset)
