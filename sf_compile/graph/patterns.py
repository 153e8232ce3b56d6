"""What the matcher looks for, one rule an operation.

A site is a chain of single-reader steps around one convolution or norm:

    [activation] -> [upsample] -> [pad] -> conv -> [norm] -> [activation] -> [affine] -> [add]
    norm -> [activation] -> [affine] -> [add]

A transposed convolution has no pad in front of it, and may be cropped behind it. What a site finishes for
a reader that is no fused convolution may be upsampled and padded behind it.

Each rule below reads one canonical node and returns its step, or a ``Miss`` that says why this
node is left alone. Rules look at constants and at the fake tensors that Dynamo recorded; they
never turn a symbolic size into a number, so they add no guard.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.activations import Activation
from sf_compile.graph import spelling
from sf_compile.graph.values import Miss, value_of, whole_images

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda")
# Beyond 8, floor(i * (1 / factor)) in float32 has not been shown to equal i // factor.
UPSAMPLE_FACTORS = (2, 3, 4, 5, 6, 7, 8)
PADDING_MODES = {"reflect": "reflect", "replicate": "replicate", "constant": "zeros"}


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
    """A function of each number by itself."""

    activation: Activation

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


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a canonical node, in the order that ``spelling`` documents."""
    return node.args


def _image(node: fx.Node, what: str) -> Miss | None:
    """Why the output of ``node`` is not a picture that the ops take; None if it is one."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return Miss(node.name, f"{what} without a recorded shape")
    if value.dim() != 4:
        return Miss(node.name, f"{what} of a {value.dim()}-dimensional tensor, not (N, C, H, W)")
    if value.dtype not in DTYPES:
        return Miss(node.name, f"{what} in {value.dtype}")
    if value.device.type not in DEVICES:
        return Miss(node.name, f"{what} on device {value.device.type!r}")
    if value.layout != torch.strided:
        return Miss(node.name, f"{what} of a {value.layout} tensor")
    return None


def dense(value: torch.Tensor) -> bool:
    """Whether (N, C, H, W) is surely contiguous or channels_last, the two layouts that the ops return."""
    _, c, h, w = value.shape
    for strides in ((c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c)):
        pairs = zip(value.shape, value.stride(), strides, strict=True)
        if all(statically_known_true(size == 1) or statically_known_true(a == b) for size, a, b in pairs):
            return True
    return False


def upsample(node: fx.Node) -> Upsample | Miss:
    """F.interpolate, nearest, by a whole number of 2 to 8, the same in both directions."""
    input, _, scales, mode, _, recompute, antialias = _arguments(node)
    if mode != "nearest":
        return Miss(node.name, f"upsampling mode {mode!r}: only nearest is an index map")
    if recompute or antialias:
        return Miss(node.name, "upsampling with recompute_scale_factor or antialias")
    if (miss := _image(node, "upsampling")) is not None:
        return miss
    assert isinstance(input, fx.Node)
    small, large = value_of(input), value_of(node)
    # A scale of 2.05 can give the size of a scale of 2, by another index map.
    given = scales if isinstance(scales, tuple | list) else (scales,)
    for factor in UPSAMPLE_FACTORS:
        if all(statically_known_true(large.shape[i] == factor * small.shape[i]) for i in (2, 3)) and all(
            scale is None or _equals(scale, factor) for scale in given
        ):
            return Upsample(node, input, factor)
    return Miss(node.name, "upsampling by a scale that is not one whole number of 2 to 8")


def _equals(scale: Any, factor: int) -> bool:
    """Whether a number, or a node that Dynamo recorded one for, is surely ``factor``."""
    value = value_of(scale) if isinstance(scale, fx.Node) else scale
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        return False
    return statically_known_true(value == factor)


def pad(node: fx.Node) -> Pad | Miss:
    """Reflect, replicate or zero padding of the last two dimensions by constant sizes."""
    input, padding, mode, value = _arguments(node)
    if mode not in PADDING_MODES:
        return Miss(node.name, f"padding mode {mode!r}")
    if mode == "constant" and value not in (None, 0, 0.0):
        return Miss(node.name, f"padding with the value {value}")
    if not isinstance(padding, tuple) or not all(isinstance(size, int) for size in padding):
        return Miss(node.name, "padding by sizes that are not constants")
    if len(padding) == 2:
        padding = (*padding, 0, 0)
    if len(padding) != 4:
        return Miss(node.name, f"padding of {len(padding) // 2} dimensions")
    if min(padding) < 0:
        return Miss(node.name, "negative padding, a crop")
    if (miss := _image(node, "padding")) is not None:
        return miss
    assert isinstance(input, fx.Node)
    left, right, top, bottom = padding
    return Pad(node, input, (left, right, top, bottom), PADDING_MODES[str(mode)])


def conv(node: fx.Node) -> Conv | Miss:
    """torch.conv2d of one dtype, ungrouped and undilated, with constant stride and padding."""
    input, weight, bias, stride, padding, dilation, groups = _arguments(node)
    if groups != 1:
        return Miss(node.name, f"grouped convolution (groups={groups})")
    if dilation != (1, 1):
        return Miss(node.name, f"dilated convolution (dilation={dilation})")
    if (miss := _operands(node, input, weight, bias, stride)) is not None:
        return miss
    kernel = value_of(weight).shape[2:]
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        if not all(isinstance(k, int) and k % 2 for k in kernel):
            return Miss(node.name, "'same' padding of an even kernel")
        padding = tuple(k // 2 for k in kernel)
    if not _constant_pair(padding):
        return Miss(node.name, f"padding {padding} is not a constant")
    return Conv(node, input, weight, bias, stride, padding)


def conv_transpose(node: fx.Node) -> ConvTranspose | Miss:
    """torch.conv_transpose2d of one dtype, ungrouped and undilated, by constant sizes."""
    input, weight, bias, stride, padding, output_padding, groups, dilation = _arguments(node)
    if groups != 1:
        return Miss(node.name, f"grouped transposed convolution (groups={groups})")
    if dilation != (1, 1):
        return Miss(node.name, f"dilated transposed convolution (dilation={dilation})")
    if (miss := _operands(node, input, weight, bias, stride)) is not None:
        return miss
    for name, value in (("padding", padding), ("output_padding", output_padding)):
        if not _constant_pair(value):
            return Miss(node.name, f"{name} {value} is not a constant")
    return ConvTranspose(node, input, weight, bias, stride, padding, output_padding)


def _operands(node: fx.Node, input: Any, weight: Any, bias: Any, stride: Any) -> Miss | None:
    """Why a convolution of these is none that the ops take; None if it is one."""
    if not _constant_pair(stride):
        return Miss(node.name, f"stride {stride} is not a constant")
    if (miss := _image(node, "convolution")) is not None:
        return miss
    assert isinstance(input, fx.Node)
    if not isinstance(weight, fx.Node):
        return Miss(node.name, "convolution without a weight in the graph")
    if not all(isinstance(value_of(n), torch.Tensor) for n in (input, weight, bias) if n is not None):
        return Miss(node.name, "convolution of something without a recorded shape")
    dtypes = {value_of(n).dtype for n in (node, input, weight, bias) if n is not None}
    if len(dtypes) > 1:
        mixed = ", ".join(sorted(map(str, dtypes)))
        return Miss(node.name, f"convolution that mixes dtypes (autocast?): {mixed}")
    return None


def _constant_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int) for v in value)


def instance_norm(node: fx.Node) -> Norm | Miss:
    """F.instance_norm: by the picture's own statistics, or by running ones as the model asked."""
    input, mean, variance, weight, bias, use_input_stats, _, eps = _arguments(node)
    if not isinstance(use_input_stats, bool):
        return Miss(node.name, "instance norm whose use_input_stats is not a constant")
    if use_input_stats and mean is not None:
        return Miss(node.name, "instance norm in training updates its running statistics")
    return _norm(node, input, mean, variance, weight, bias, eps, "instance norm")


def batch_norm(node: fx.Node) -> Norm | Miss:
    """F.batch_norm in eval: an affine by its running statistics."""
    input, mean, variance, weight, bias, training, _, eps = _arguments(node)
    if training is not False or mean is None:
        return Miss(node.name, "batch norm in training takes its statistics from the batch")
    return _norm(node, input, mean, variance, weight, bias, eps, "batch norm")


def group_norm(node: fx.Node) -> Norm | Miss:
    """F.group_norm: by the picture's own statistics over groups of channels."""
    input, groups, weight, bias, eps = _arguments(node)
    if not isinstance(groups, int):
        return Miss(node.name, "group norm whose number of groups is not a constant")
    norm = _norm(node, input, None, None, weight, bias, eps, "group norm")
    if isinstance(norm, Miss) or statically_known_true(value_of(input).shape[1] == groups):
        return norm  # a group for each channel is an instance norm
    return replace(norm, groups=groups)


def layer_norm(node: fx.Node) -> Norm | Miss:
    """F.layer_norm over (C, H, W), without a weight and bias for every pixel."""
    input, shape, weight, bias, eps = _arguments(node)
    if not whole_images(shape, value_of(input)):
        return Miss(node.name, "layer norm over other dimensions than (C, H, W)")
    if weight is not None or bias is not None:
        return Miss(node.name, "layer norm with a weight and bias for every pixel")
    norm = _norm(node, input, None, None, None, None, eps, "layer norm")
    return norm if isinstance(norm, Miss) else replace(norm, groups=1)


def picture_norm(node: fx.Node) -> Norm | Miss:
    """A hand-written norm, as graph/handwritten_norm.py put it."""
    input, weight, bias, groups, correction, eps, outer_eps = _arguments(node)
    norm = _norm(node, input, None, None, weight, bias, eps, "norm")
    if isinstance(norm, Miss):
        return norm
    return replace(norm, groups=groups, correction=correction, outer_eps=outer_eps)


def _norm(
    node: fx.Node, input: Any, mean: Any, variance: Any, weight: Any, bias: Any, eps: Any, what: str
) -> Norm | Miss:
    if (miss := _image(node, what)) is not None:
        return miss
    if value_of(node).dtype != value_of(input).dtype:
        return Miss(node.name, f"{what} that changes the dtype")
    return Norm(node, input, mean, variance, weight, bias, eps)


_FUNCTIONS: dict[Any, str] = {
    spelling.RELU: "relu", spelling.LEAKY_RELU: "leaky_relu", spelling.HARDTANH: "hardtanh",
    spelling.CLAMP: "clamp", spelling.TANH: "tanh", spelling.SIGMOID: "sigmoid", spelling.SILU: "silu",
    spelling.ELU: "elu",
}  # fmt: skip


def activation(node: fx.Node) -> Activate | Miss:
    """A function of one number, of which every parameter is a constant."""
    input, *parameters = _arguments(node)
    assert isinstance(input, fx.Node)
    if node.target is spelling.PRELU:
        return Miss(node.name, "the slope of a PReLU is a tensor: it follows the fused norm as it is")
    if node.target is spelling.GELU:
        forms = {"none": "gelu", "tanh": "gelu_tanh"}
        return Activate(node, input, Activation(forms[str(parameters[0])]))
    function = _FUNCTIONS[node.target]
    if function == "clamp":
        bounds = zip(parameters, (-math.inf, math.inf), strict=True)
        parameters = [default if bound is None else bound for bound, default in bounds]
    if not all(isinstance(value, int | float) and not math.isnan(value) for value in parameters):
        return Miss(node.name, f"{function} with a slope or a bound that is not a constant")
    if function in ("leaky_relu", "elu") and not math.isfinite(parameters[0]):
        return Miss(node.name, f"{function} of {parameters[0]}")
    return Activate(node, input, Activation(function, tuple(map(float, parameters))))


def affine(node: fx.Node) -> Affine | Miss:
    """The sum, difference, product or quotient of a tensor and a number."""
    input, number = _arguments(node)
    target: Any = node.target
    assert isinstance(input, fx.Node)
    if not math.isfinite(number) or (target is operator.truediv and number == 0):
        return Miss(node.name, f"{target.__name__} with {number}")
    if target in (operator.add, operator.sub):
        return Affine(node, input, 1.0, float(target(0, number)))
    return Affine(node, input, float(target(1, number)), 0.0)


def add(node: fx.Node, branch: fx.Node) -> Add | Miss:
    """torch.add of ``branch`` and another tensor, in either order."""
    first, second = _arguments(node)
    if first is second:
        return Miss(node.name, "adds a tensor to itself")
    if not dense(value_of(node)):
        return Miss(node.name, "adds into strides that are neither contiguous nor channels_last")
    other = second if first is branch else first
    assert isinstance(other, fx.Node)
    return Add(node, branch, other)


CONVOLUTIONS: dict[Any, Callable[[fx.Node], Conv | Miss]] = {
    spelling.CONV2D: conv,
    spelling.CONV_TRANSPOSE2D: conv_transpose,
}
# What is left to PyTorch whatever surrounds it, and why.
LEFT = {
    torch.pixel_shuffle: "a pixel shuffle: a norm behind it takes statistics over several of the "
    "convolution's channels; the ops around it fuse",
}
NORMS: dict[Any, Callable[[fx.Node], Norm | Miss]] = {
    spelling.INSTANCE_NORM: instance_norm,
    spelling.BATCH_NORM: batch_norm,
    spelling.GROUP_NORM: group_norm,
    spelling.LAYER_NORM: layer_norm,
    spelling.PICTURE_NORM: picture_norm,
}
