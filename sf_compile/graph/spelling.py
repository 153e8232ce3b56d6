"""The canonical spelling of the operations the matcher knows, and every other spelling of each.

Dynamo records an operation as the user wrote it: ``torch.relu(x)``, ``x.relu_()``,
``F.relu(x, inplace=True)``, ``operator.iadd(a, b)``. ``canonical`` maps a node to one
``call_function`` target with all its arguments in one positional form, so that the matcher needs
to know one spelling of each operation. The arguments of a canonical node are:

    F.interpolate   (input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    pad             (input, padding, mode, value)              torch.nn.functional.pad
    conv2d          (input, weight, bias, stride, padding, dilation, groups)
    instance_norm   (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    batch_norm      (input, running_mean, running_var, weight, bias, training, momentum, eps)
    group_norm      (input, num_groups, weight, bias, eps)
    layer_norm      (input, normalized_shape, weight, bias, eps)
    picture_norm    (input, weight, bias, groups, correction, eps, outer_eps)   graph/picture_norm.py
    relu            (input,)
    add             (input, other)
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from sf_compile.graph.picture_norm import picture_norm

INTERPOLATE: Callable[..., Any] = F.interpolate
PAD: Callable[..., Any] = torch._C._nn.pad
CONV2D: Callable[..., Any] = torch.conv2d
INSTANCE_NORM: Callable[..., Any] = F.instance_norm
BATCH_NORM: Callable[..., Any] = F.batch_norm
GROUP_NORM: Callable[..., Any] = F.group_norm
LAYER_NORM: Callable[..., Any] = F.layer_norm
PICTURE_NORM: Callable[..., Any] = picture_norm
RELU: Callable[..., Any] = torch.relu
ADD: Callable[..., Any] = torch.add

# What these return is a tensor of its own, never a view or an alias of an argument.
FRESH = frozenset({INTERPOLATE, PAD, CONV2D, INSTANCE_NORM, BATCH_NORM, RELU, ADD}) | {
    GROUP_NORM, LAYER_NORM, PICTURE_NORM,
}  # fmt: skip


class Spelling(NamedTuple):
    """A node in canonical form; ``inplace`` says that the node writes into its first argument."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    inplace: bool = False


def _pair(value: Any) -> Any:
    if isinstance(value, str | fx.Node):
        return value
    return tuple(value) if isinstance(value, Sequence) else (value, value)


# Each function below has the signature of an operation as PyTorch documents it, and returns its
# canonical form. A call that does not fit the signature raises TypeError: it is left as written.


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1,
) -> Spelling:  # fmt: skip
    return Spelling(
        CONV2D, (input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    )


def _pad(input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Spelling:
    padding = tuple(pad) if isinstance(pad, Sequence) else pad
    return Spelling(PAD, (input, padding, mode, value))


def _group_norm(
    input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
    cudnn_enabled: Any = True,
) -> Spelling:  # fmt: skip
    return Spelling(GROUP_NORM, (input, num_groups, weight, bias, eps))


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
    cudnn_enable: Any = True,
) -> Spelling:  # fmt: skip
    return Spelling(LAYER_NORM, (input, normalized_shape, weight, bias, eps))


def _relu(input: Any, inplace: Any = False) -> Spelling:
    return Spelling(RELU, (input,), bool(inplace))


def _relu_(input: Any) -> Spelling:
    return Spelling(RELU, (input,), True)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Spelling | None:
    return Spelling(ADD, (input, other)) if alpha == 1 else None


def _add_(input: Any, other: Any, *, alpha: Any = 1) -> Spelling | None:
    return Spelling(ADD, (input, other), True) if alpha == 1 else None


def _positional(target: Callable[..., Any]) -> Callable[..., Spelling]:
    """All arguments of a Python function in the order of its signature, defaults filled in."""
    signature = inspect.signature(target)

    def canonical(*args: Any, **kwargs: Any) -> Spelling:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Spelling(target, tuple(bound.arguments.values()))

    return canonical


_FUNCTIONS: dict[Any, Callable[..., Spelling | None]] = {
    CONV2D: _conv2d,
    F.conv2d: _conv2d,
    PAD: _pad,
    F.pad: _pad,
    INTERPOLATE: _positional(F.interpolate),
    INSTANCE_NORM: _positional(F.instance_norm),
    BATCH_NORM: _positional(F.batch_norm),
    GROUP_NORM: _group_norm,
    torch.group_norm: _group_norm,
    LAYER_NORM: _layer_norm,
    torch.layer_norm: _layer_norm,
    PICTURE_NORM: _positional(picture_norm),
    RELU: _relu,
    F.relu: _relu,
    torch.relu_: _relu_,
    F.relu_: _relu_,
    ADD: _add,
    operator.add: _add,
    operator.iadd: _add_,
}
_METHODS: dict[str, Callable[..., Spelling | None]] = {
    "relu": _relu,
    "relu_": _relu_,
    "add": _add,
    "__add__": _add,
    "__radd__": _add,
    "add_": _add_,
    "__iadd__": _add_,
}


def canonical(node: fx.Node) -> Spelling | None:
    """The canonical form of ``node``, or None for an operation that the matcher does not know."""
    table: Any = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op)
    spell = table.get(node.target) if table else None
    if spell is None:
        return None
    try:
        spelling = spell(*node.args, **node.kwargs)
    except TypeError:
        return None
    if spelling is not None and not isinstance(spelling.args[0], fx.Node):
        return None
    return spelling
