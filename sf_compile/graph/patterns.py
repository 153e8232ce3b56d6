"""What the matcher looks for, one rule an operation.

A site is a chain of single-reader steps around one convolution or norm:

    [activation] -> [upsample] -> [pad] -> conv -> [norm] -> [activation] -> [affine] -> [add]
    norm -> [activation] -> [affine] -> [add]

A transposed convolution has no pad in front of it, and may be cropped behind it. What a site finishes for
a reader that is no fused convolution may be upsampled and padded behind it.

Each rule below reads one canonical node and returns its step, or a ``Miss`` that says why this
node is left alone. Rules look at constants and at the fake tensors that Dynamo recorded; they
never turn a symbolic size into a number, so they add no guard on one. The rules about norms are in
``norm_patterns``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sf_compile.activations import Activation
from sf_compile.graph import spelling
from sf_compile.graph.steps import Activate, Add, Affine, Conv, ConvTranspose, Pad, Upsample
from sf_compile.graph.values import (
    AUTOCAST_DTYPES,
    Miss,
    arguments_of,
    autocast_is_on,
    dense,
    not_a_picture,
    value_of,
)

# Beyond 8, floor(i * (1 / factor)) in float32 has not been shown to equal i // factor.
UPSAMPLE_FACTORS = (2, 3, 4, 5, 6, 7, 8)
PADDING_MODES = {"reflect": "reflect", "replicate": "replicate", "constant": "zeros"}


def upsample(node: fx.Node) -> Upsample | Miss:
    """F.interpolate, nearest, by a whole number of 2 to 8, the same in both directions."""
    input, _, scales, mode, _, recompute, antialias = arguments_of(node)
    if mode != "nearest":
        return Miss(node.name, f"upsampling mode {mode!r}: only nearest is an index map")
    if recompute or antialias:
        return Miss(node.name, "upsampling with recompute_scale_factor or antialias")
    if (miss := not_a_picture(node, "upsampling")) is not None:
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
    input, padding, mode, value = arguments_of(node)
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
    if (miss := not_a_picture(node, "padding")) is not None:
        return miss
    assert isinstance(input, fx.Node)
    left, right, top, bottom = padding
    return Pad(node, input, (left, right, top, bottom), PADDING_MODES[str(mode)])


def conv(node: fx.Node) -> Conv | Miss:
    """torch.conv2d of one dtype or under autocast, ungrouped and undilated, by constant sizes."""
    input, weight, bias, stride, padding, dilation, groups = arguments_of(node)
    if (miss := _not_dense(node, "convolution", groups, dilation)) is not None:
        return miss
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
    """torch.conv_transpose2d of one dtype or under autocast, ungrouped and undilated, by constant sizes."""
    input, weight, bias, stride, padding, output_padding, groups, dilation = arguments_of(node)
    if (miss := _not_dense(node, "transposed convolution", groups, dilation)) is not None:
        return miss
    if (miss := _operands(node, input, weight, bias, stride)) is not None:
        return miss
    for name, value in (("padding", padding), ("output_padding", output_padding)):
        if not _constant_pair(value):
            return Miss(node.name, f"{name} {value} is not a constant")
    return ConvTranspose(node, input, weight, bias, stride, padding, output_padding)


def _not_dense(node: fx.Node, what: str, groups: Any, dilation: Any) -> Miss | None:
    if groups != 1:
        return Miss(node.name, f"grouped {what} (groups={groups})")
    if dilation != (1, 1):
        return Miss(node.name, f"dilated {what} (dilation={dilation})")
    return None


def _operands(node: fx.Node, input: Any, weight: Any, bias: Any, stride: Any) -> Miss | None:
    """Why a convolution of these is none that the ops take; None if it is one."""
    if not _constant_pair(stride):
        return Miss(node.name, f"stride {stride} is not a constant")
    if (miss := not_a_picture(node, "convolution")) is not None:
        return miss
    assert isinstance(input, fx.Node)
    if not isinstance(weight, fx.Node):
        return Miss(node.name, "convolution without a weight in the graph")
    if not all(isinstance(value_of(n), torch.Tensor) for n in (input, weight, bias) if n is not None):
        return Miss(node.name, "convolution of something without a recorded shape")
    operands = {value_of(n).dtype for n in (input, weight, bias) if n is not None}
    dtypes = operands | {value_of(node).dtype}
    by_autocast = value_of(node).dtype in AUTOCAST_DTYPES and dtypes <= AUTOCAST_DTYPES | {torch.float32}
    if len(operands) > 1:  # a shape may be recorded of what eager refuses: nothing is multiplied for it
        by_autocast = by_autocast and autocast_is_on(node, value_of(node).device.type)
    if len(dtypes) > 1 and not by_autocast:
        mixed = ", ".join(sorted(map(str, dtypes)))
        return Miss(node.name, f"convolution that mixes dtypes: {mixed}")
    return None


def _constant_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int) for v in value)


_FUNCTIONS: dict[Any, str] = {
    spelling.RELU: "relu", spelling.LEAKY_RELU: "leaky_relu", spelling.HARDTANH: "hardtanh",
    spelling.CLAMP: "clamp", spelling.TANH: "tanh", spelling.SIGMOID: "sigmoid", spelling.SILU: "silu",
    spelling.ELU: "elu",
}  # fmt: skip


def activation(node: fx.Node) -> Activate | Miss:
    """A function of one number, of which every parameter is a constant."""
    input, *parameters = arguments_of(node)
    assert isinstance(input, fx.Node)
    if node.target is spelling.PRELU:
        return _prelu(node, input, *parameters)
    if node.target is spelling.GELU:
        forms = {"none": "gelu", "tanh": "gelu_tanh"}
        return Activate(node, input, Activation(forms[str(parameters[0])]))
    function = _FUNCTIONS[node.target]
    if function == "clamp":
        bounds = zip(parameters, (-math.inf, math.inf), strict=True)
        parameters = [default if bound is None else bound for bound, default in bounds]
    parameters = [_constant(value) for value in parameters]
    if not all(isinstance(value, int | float) and not math.isnan(value) for value in parameters):
        return Miss(node.name, f"{function} with a slope or a bound that is not a constant")
    if function in ("leaky_relu", "elu") and not math.isfinite(parameters[0]):
        return Miss(node.name, f"{function} of {parameters[0]}")
    return Activate(node, input, Activation(function, tuple(map(float, parameters))))


def _constant(value: Any) -> Any:
    """The number of a symbolic one that a module keeps, which the compiled code then guards on.

    With ``dynamic=True`` Dynamo takes every float that a module has for one that changes. Without, a symbolic
    one has changed: that one stays symbolic, as does a number computed of sizes.
    """
    if not isinstance(value, fx.Node) or torch._dynamo.config.assume_static_by_default:
        return value
    symbol = value_of(value)
    item = value.op == "call_method" and value.target == "item"
    kept = item and value.all_input_nodes[0].op == "placeholder"
    if kept and isinstance(symbol, torch.SymFloat) and symbol.node.has_hint():
        return float(symbol)
    return value


def _prelu(node: fx.Node, input: fx.Node, slope: Any) -> Activate | Miss:
    """torch.prelu, whose slope is a tensor: of one number, or of one a channel."""
    value, of = value_of(slope), value_of(input)
    if not isinstance(value, torch.Tensor) or not isinstance(of, torch.Tensor):
        return Miss(node.name, "a PReLU without a recorded shape")
    if (value.dtype, value.device) != (of.dtype, of.device) or value.dim() != 1 or of.dim() != 4:
        return Miss(node.name, "a PReLU whose slope is no vector of the picture's dtype")
    return Activate(node, input, Activation("prelu"), slope)


def affine(node: fx.Node) -> Affine | Miss:
    """The sum, difference, product or quotient of a tensor and a number."""
    input, number = arguments_of(node)
    target: Any = node.target
    assert isinstance(input, fx.Node)
    if not math.isfinite(number) or (target is operator.truediv and number == 0):
        return Miss(node.name, f"{target.__name__} with {number}")
    if target in (operator.add, operator.sub):
        return Affine(node, input, 1.0, float(target(0, number)))
    return Affine(node, input, float(target(1, number)), 0.0)


def add(node: fx.Node, branch: fx.Node) -> Add | Miss:
    """torch.add of ``branch`` and another tensor, in either order."""
    first, second = arguments_of(node)
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
