"""What a site is made of: one dataclass for each kind of operation that ``patterns`` recognises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sf_compile.activations import Activation


@dataclass(frozen=True)
class Step:
    """One recognised operation: its node and its first input."""

    node: fx.Node
    input: fx.Node

    @property
    def kind(self) -> str:
        """The step's name in a pattern."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Upsample(Step):
    """Nearest upsampling by a whole number in both directions."""

    factor: int


@dataclass(frozen=True)
class Pad(Step):
    """Padding by (left, right, top, bottom) pixels of the last two dimensions."""

    padding: tuple[int, int, int, int]
    mode: str


@dataclass(frozen=True)
class Conv(Step):
    """A dense 2-D convolution; ``padding`` (height, width) is its own, of zeros."""

    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class ConvTranspose(Conv):
    """A dense transposed 2-D convolution, whose ``padding`` is cut off its result.

    ``output_padding`` (height, width) is not cut off at the end.
    """

    output_padding: tuple[int, int]

    @property
    def kind(self) -> str:
        """The step's name in a pattern."""
        return "conv_transpose"


@dataclass(frozen=True)
class Crop(Step):
    """(left, right, top, bottom) pixels are cut off."""

    sizes: tuple[int, int, int, int]


@dataclass(frozen=True)
class Norm(Step):
    """A norm by the picture's own statistics, or (``mean`` and ``variance`` given) by running ones.

    ``weight`` and ``bias`` are (C,) or (N, C). Own statistics are those of an instance norm (the biased
    variance of each channel, eps inside of the root) unless ``groups``, ``correction`` or ``outer_eps`` say
    otherwise, as in ``styleforge::norm_statistics``.
    """

    mean: fx.Node | None
    variance: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    eps: Any
    groups: int | None = None
    correction: Any = 0
    outer_eps: Any = None

    @property
    def statistics(self) -> tuple[int | None, Any, Any] | None:
        """The last arguments of ``norm_statistics``; None where the channels' own statistics are used."""
        plain = self.groups is None and self.correction == 0 and self.outer_eps is None
        return None if plain else (self.groups, self.correction, self.outer_eps)


@dataclass(frozen=True)
class Activate(Step):
    """A function of each number by itself; ``slope`` is a PReLU's, (1,) or (C,)."""

    activation: Activation
    slope: fx.Node | None = None

    @property
    def kind(self) -> str:
        """The function's name."""
        return self.activation.function


@dataclass(frozen=True)
class Affine(Step):
    """input * scale + offset, with constants."""

    scale: float
    offset: float


@dataclass(frozen=True)
class Add(Step):
    """The addition of two equal-shaped tensors; ``residual`` is the one that is not ``input``."""

    residual: fx.Node
