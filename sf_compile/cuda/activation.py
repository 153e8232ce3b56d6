"""How csrc/activation.cuh is told an activation: the function as a constant, its numbers as arguments."""

from __future__ import annotations

import functools
import math
import struct

import torch

from sf_compile.activations import Activation, parse

IDENTITY, RECTIFIED, FLOOR, LEAKY, CLAMPED, TANH, SIGMOID, SILU, GELU, GELU_TANH, ELU, PRELU = range(12)
"""The functions by the names of the source. FLOOR is a ReLU, or none, by its argument."""

GENERAL = (LEAKY, CLAMPED, TANH, SIGMOID, SILU, GELU, GELU_TANH, ELU)
"""All but those that are a ReLU or none, and PRELU, which normalize.cu alone has."""

SIGNATURE = "A"
"""Of ``arguments``."""

_ON_THE_WAY_IN = (IDENTITY, RECTIFIED, LEAKY, CLAMPED)

_CODES = {
    "none": IDENTITY, "relu": RECTIFIED, "leaky_relu": LEAKY, "hardtanh": CLAMPED, "clamp": CLAMPED,
    "tanh": TANH, "sigmoid": SIGMOID, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "elu": ELU,
    "prelu": PRELU,
}  # fmt: skip
_MOST = torch.finfo(torch.float32).max
_BOUNDS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf)}


def _scaled_as(found: Activation) -> Activation:
    """A ReLU or none that is scaled, as a clamp: IDENTITY, RECTIFIED and FLOOR have no scale."""
    bounds = _BOUNDS.get(found.function)
    return found if bounds is None else found._replace(function="clamp", parameters=bounds)


@functools.cache
def code(activation: str) -> int:
    """The function of ``activation``, as a kernel that has one for each takes it."""
    found = parse(activation)
    return _CODES[(_scaled_as(found) if found.is_scaled else found).function]


@functools.cache
def shared_code(activation: str) -> int:
    """The same for a kernel in which a ReLU and none are one."""
    found = code(activation)
    return FLOOR if found in (IDENTITY, RECTIFIED) else found


@functools.cache
def arguments(activation: str) -> bytes:
    """``Activation`` of the source: a parameter, another, scale, offset; infinite where float32 ends."""
    found = parse(activation)
    # A ReLU and none: the bounds of FLOOR, which the others do not look at.
    first, second = map(_float32, (*_scaled_as(found).parameters, 0.0, 0.0)[:2])
    # x + -0 is x, of a negative zero too.
    return struct.pack("4f", first, second, _float32(found.scale), _float32(found.offset or -0.0))


def _float32(value: float) -> float:
    return value if abs(value) <= _MOST else math.copysign(math.inf, value)


@functools.cache
def refusal(activation: str) -> str | None:
    """Why the fused convolutions do not apply ``activation`` on the way in; None where they do.

    The threads that finish the input have few instructions to spare beside the products, and every pixel of a
    halo is finished again by each neighbour.
    """
    if code(activation) in _ON_THE_WAY_IN and not parse(activation).is_scaled:
        return None
    return f"{activation} costs more on the way in than in a pass of its own"
