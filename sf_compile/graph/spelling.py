"""The canonical spelling of the operations the matcher knows; ``signatures`` has every other one.

A canonical node is a ``call_function`` of one target, with all its arguments in one positional form:

    F.interpolate   (input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    pad             (input, padding, mode, value)              torch.nn.functional.pad
    conv2d          (input, weight, bias, stride, padding, dilation, groups)
    conv_transpose2d
                    (input, weight, bias, stride, padding, output_padding, groups, dilation)
    getitem         (input, index)                             of a tensor, as written
    instance_norm   (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    batch_norm      (input, running_mean, running_var, weight, bias, training, momentum, eps)
    group_norm      (input, num_groups, weight, bias, eps)
    layer_norm      (input, normalized_shape, weight, bias, eps)
    picture_norm    (input, weight, bias, groups, correction, eps, outer_eps)   graph/picture_norm.py
    relu, tanh, sigmoid, silu                       (input,)
    leaky_relu, elu (input, negative slope or alpha)
    hardtanh, clamp (input, lower, upper)           clamp: a bound may be None; relu6 is hardtanh from 0 to 6
    gelu            (input, approximate)            "none" or "tanh"
    add             (input, other)                  two tensors
    operator.add, sub, mul, truediv                 (input, number)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from sf_compile.graph.picture_norm import picture_norm

INTERPOLATE: Callable[..., Any] = F.interpolate
PAD: Callable[..., Any] = torch._C._nn.pad
CONV2D: Callable[..., Any] = torch.conv2d
CONV_TRANSPOSE2D: Callable[..., Any] = torch.conv_transpose2d
GETITEM: Callable[..., Any] = operator.getitem
INSTANCE_NORM: Callable[..., Any] = F.instance_norm
BATCH_NORM: Callable[..., Any] = F.batch_norm
GROUP_NORM: Callable[..., Any] = F.group_norm
LAYER_NORM: Callable[..., Any] = F.layer_norm
PICTURE_NORM: Callable[..., Any] = picture_norm
RELU: Callable[..., Any] = torch.relu
LEAKY_RELU: Callable[..., Any] = torch._C._nn.leaky_relu
ELU: Callable[..., Any] = torch._C._nn.elu
HARDTANH: Callable[..., Any] = torch._C._nn.hardtanh
CLAMP: Callable[..., Any] = torch.clamp
TANH: Callable[..., Any] = torch.tanh
SIGMOID: Callable[..., Any] = torch.sigmoid
SILU: Callable[..., Any] = torch._C._nn.silu


def gelu(input: Any, approximate: Any) -> Any:
    """torch.nn.functional.gelu, whose second argument is one by name alone up to torch 2.12."""
    return F.gelu(input, approximate=approximate)


GELU: Callable[..., Any] = gelu
PRELU: Callable[..., Any] = torch.prelu
ADD: Callable[..., Any] = torch.add

# Of a tensor and a number; not to be taken for ADD, of two tensors.
WITH_NUMBER = frozenset({operator.add, operator.sub, operator.mul, operator.truediv})
ACTIVATIONS = frozenset({RELU, LEAKY_RELU, ELU, HARDTANH, CLAMP, TANH, SIGMOID, SILU, GELU, PRELU})

# What these return is a tensor of its own, never a view or an alias of an argument.
FRESH = ACTIVATIONS | WITH_NUMBER | {
    INTERPOLATE, PAD, CONV2D, CONV_TRANSPOSE2D, INSTANCE_NORM, BATCH_NORM, GROUP_NORM, LAYER_NORM,
    PICTURE_NORM, ADD,
}  # fmt: skip


class Spelling(NamedTuple):
    """A node in canonical form; ``inplace`` says that the node writes into its first argument."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    inplace: bool = False


def is_number(value: Any) -> bool:
    """Whether it is a Python number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dropout(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> bool:
    return training is False or (is_number(p) and p == 0)


_DROPOUTS = frozenset({F.dropout, F.dropout2d, torch.dropout, torch.dropout_})


def is_identity(node: fx.Node) -> bool:
    """Whether ``node`` returns its first argument itself: a dropout outside of training, or of nothing."""
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    try:
        return _dropout(*node.args, **node.kwargs) and isinstance(node.args[0], fx.Node)
    except (TypeError, IndexError):
        return False
