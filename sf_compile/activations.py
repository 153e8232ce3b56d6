"""The functions of one number that the fused ops apply, and the text that names one in a graph.

    none   relu   leaky_relu(0.2)   hardtanh(-1.0, 1.0)   clamp(0.0, 255.0)   tanh   sigmoid   silu
    gelu   gelu_tanh   elu(1.0)   prelu

each alone or followed by an affine map of what it returns, as in ``tanh * 150.0 + 127.5``. They are
PyTorch's functions of these names, NaN and infinity included; ``gelu_tanh`` is ``gelu(approximate="tanh")``,
``hardtanh`` and ``clamp`` differ in their gradients at the bounds. The slope of ``prelu`` is a tensor, which
``styleforge::normalize`` alone takes.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

PARAMETERS = {
    "none": 0, "relu": 0, "leaky_relu": 1, "hardtanh": 2, "clamp": 2, "tanh": 0, "sigmoid": 0, "silu": 0,
    "gelu": 0, "gelu_tanh": 0, "elu": 1, "prelu": 0,
}  # fmt: skip
"""How many numbers each function takes beside its argument: a slope, two bounds, ELU's alpha."""

_TEXT = re.compile(r"(\w+)(?:\((\S+(?:, \S+)*)\))?(?: \* (\S+) \+ (\S+))?")


class Activation(NamedTuple):
    """``scale * function(x) + offset``; ``parameters`` are the function's own."""

    function: str = "none"
    parameters: tuple[float, ...] = ()
    scale: float = 1.0
    offset: float = 0.0

    @property
    def is_scaled(self) -> bool:
        """Whether the function's value is changed at all."""
        return (self.scale, self.offset) != (1.0, 0.0)

    def then(self, scale: float, offset: float) -> Activation:
        """``scale * self(x) + offset``."""
        return self._replace(scale=self.scale * scale, offset=self.offset * scale + offset)

    def __str__(self) -> str:
        parameters = f"({', '.join(map(repr, self.parameters))})" if self.parameters else ""
        affine = f" * {self.scale!r} + {self.offset!r}" if self.is_scaled else ""
        return self.function + parameters + affine


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Activation:
    """The activation that ``str`` made ``text`` of.

    Raises:
        ValueError: ``text`` names no activation, has another number of parameters than it takes, or a
            number in it is not a number (bounds may be infinite, everything else is finite).
    """
    found = _TEXT.fullmatch(str(text))
    if found is None or found[1] not in PARAMETERS:
        raise ValueError(f"one of {', '.join(PARAMETERS)}; got {text!r}")
    parameters = tuple(map(float, found[2].split(", "))) if found[2] else ()
    if len(parameters) != PARAMETERS[found[1]]:
        raise ValueError(f"{found[1]} of {PARAMETERS[found[1]]} numbers; got {text!r}")
    scale, offset = float(found[3] or 1.0), float(found[4] or 0.0)
    bounds = found[1] in ("hardtanh", "clamp")
    if any(map(math.isnan, parameters)) or not all(
        map(math.isfinite, (scale, offset, *(() if bounds else parameters)))
    ):
        raise ValueError(f"an activation of finite numbers; got {text!r}")
    return Activation(found[1], parameters, scale, offset)
