"""Every spelling of the operations the matcher knows, and the canonical form of each.

Dynamo records an operation as the user wrote it: ``torch.relu(x)``, ``x.relu_()``,
``F.relu(x, inplace=True)``, ``operator.iadd(a, b)``. ``canonical`` maps a node to the spelling that
``sf_compile.graph.spelling`` documents, so that the matcher needs to know one of each operation.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sf_compile.graph.picture_norm import picture_norm
from sf_compile.graph.spelling import (
    ADD,
    BATCH_NORM,
    CLAMP,
    CONV2D,
    CONV_TRANSPOSE2D,
    ELU,
    GELU,
    GETITEM,
    GROUP_NORM,
    HARDTANH,
    INSTANCE_NORM,
    INTERPOLATE,
    LAYER_NORM,
    LEAKY_RELU,
    PAD,
    PICTURE_NORM,
    PRELU,
    RELU,
    SIGMOID,
    SILU,
    TANH,
    Spelling,
    is_number,
)


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
    return Spelling(CONV2D, (input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups))


def _conv_transpose2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: Any = 1, dilation: Any = 1,
) -> Spelling:  # fmt: skip
    sizes = (_pair(stride), _pair(padding), _pair(output_padding), groups, _pair(dilation))
    return Spelling(CONV_TRANSPOSE2D, (input, weight, bias, *sizes))


def _getitem(input: Any, index: Any) -> Spelling:
    return Spelling(GETITEM, (input, index))


def _narrow(input: Any, dim: Any, start: Any, length: Any) -> Spelling | None:
    if not all(isinstance(value, int) and value >= 0 for value in (dim, start, length)):
        return None
    return Spelling(GETITEM, (input, (*[slice(None)] * dim, slice(start, start + length))))


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


def _of_one(target: Callable[..., Any]) -> Callable[..., Spelling]:
    """``target(input)``, also as a function with a flag that makes it an in-place one."""
    return lambda input, inplace=False: Spelling(target, (input,), bool(inplace))


def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> Spelling:
    return Spelling(LEAKY_RELU, (input, negative_slope), bool(inplace))


def _elu(input: Any, alpha: Any = 1.0, inplace: Any = False) -> Spelling:
    return Spelling(ELU, (input, alpha), bool(inplace))


def _unscaled_elu(input: Any, alpha: Any = 1.0) -> Spelling:
    return Spelling(ELU, (input, alpha))


def _hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Spelling:
    return Spelling(HARDTANH, (input, min_val, max_val), bool(inplace))


def _relu6(input: Any, inplace: Any = False) -> Spelling:
    return Spelling(HARDTANH, (input, 0.0, 6.0), bool(inplace))


def _clamp(input: Any, min: Any = None, max: Any = None) -> Spelling:
    return Spelling(CLAMP, (input, min, max))


def _gelu(input: Any, *, approximate: Any = "none") -> Spelling:
    return Spelling(GELU, (input, approximate))


def _prelu(input: Any, weight: Any) -> Spelling:
    return Spelling(PRELU, (input, weight))


def _sum(input: Any, other: Any, *, alpha: Any = 1) -> Spelling | None:
    return _arithmetic(operator.add, ADD)(input, other) if alpha == 1 else None


def _difference(input: Any, other: Any, *, alpha: Any = 1) -> Spelling | None:
    return _arithmetic(operator.sub)(input, other) if alpha == 1 else None


def _arithmetic(
    with_number: Callable[..., Any], of_tensors: Callable[..., Any] | None = None
) -> Callable[..., Spelling | None]:
    """An operation of a tensor and a number, in either order where that is the same, or of two tensors."""

    def canonical(input: Any, other: Any) -> Spelling | None:
        if with_number in (operator.add, operator.mul) and is_number(input):
            input, other = other, input
        if is_number(other):
            return Spelling(with_number, (input, other))
        return Spelling(of_tensors, (input, other)) if of_tensors is not None else None

    return canonical


def _inplace(spell: Callable[..., Spelling | None]) -> Callable[..., Spelling | None]:
    """The in-place form of what ``spell`` describes."""

    def canonical(input: Any, *args: Any, **kwargs: Any) -> Spelling | None:
        spelling = spell(input, *args, **kwargs)
        # ``1 += x`` makes a tensor of its own: only a tensor in front is written to.
        writes = spelling is not None and spelling.args[0] is input
        return spelling._replace(inplace=True) if spelling is not None and writes else spelling

    return canonical


def _positional(target: Callable[..., Any]) -> Callable[..., Spelling]:
    """All arguments of a Python function in the order of its signature, defaults filled in."""
    signature = inspect.signature(target)

    def canonical(*args: Any, **kwargs: Any) -> Spelling:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Spelling(target, tuple(bound.arguments.values()))

    return canonical


_relu, _tanh, _sigmoid, _silu = map(_of_one, (RELU, TANH, SIGMOID, SILU))
_product, _quotient = _arithmetic(operator.mul), _arithmetic(operator.truediv)

_FUNCTIONS: dict[Any, Callable[..., Spelling | None]] = {
    CONV2D: _conv2d,
    F.conv2d: _conv2d,
    CONV_TRANSPOSE2D: _conv_transpose2d,
    F.conv_transpose2d: _conv_transpose2d,
    GETITEM: _getitem,
    torch.narrow: _narrow,
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
    torch.relu_: _inplace(_relu),
    F.relu_: _inplace(_relu),
    TANH: _tanh,
    F.tanh: _tanh,
    torch.tanh_: _inplace(_tanh),
    SIGMOID: _sigmoid,
    F.sigmoid: _sigmoid,
    torch.special.expit: _sigmoid,
    torch.sigmoid_: _inplace(_sigmoid),
    SILU: _silu,
    F.silu: _silu,
    torch._C._nn.silu_: _inplace(_silu),
    LEAKY_RELU: _leaky_relu,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _inplace(_leaky_relu),
    ELU: _unscaled_elu,
    F.elu: _elu,
    F.elu_: _inplace(_unscaled_elu),
    HARDTANH: _hardtanh,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _inplace(_hardtanh),
    F.relu6: _relu6,
    torch._C._nn.relu6: _relu6,
    torch._C._nn.relu6_: _inplace(_relu6),
    CLAMP: _clamp,
    torch.clip: _clamp,
    torch.clamp_: _inplace(_clamp),
    torch.clip_: _inplace(_clamp),
    torch._C._nn.gelu: _gelu,
    F.gelu: _gelu,
    PRELU: _prelu,
    F.prelu: _prelu,
    ADD: _sum,
    operator.add: _sum,
    operator.iadd: _inplace(_sum),
    torch.sub: _difference,
    operator.sub: _difference,
    operator.isub: _inplace(_difference),
    torch.mul: _product,
    operator.mul: _product,
    operator.imul: _inplace(_product),
    torch.div: _quotient,
    operator.truediv: _quotient,
    operator.itruediv: _inplace(_quotient),
}
_METHODS: dict[str, Callable[..., Spelling | None]] = {
    "relu": _relu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "clamp": _clamp,
    "clip": _clamp,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
}
_METHODS |= {f"{name}_": _inplace(spell) for name, spell in _METHODS.items()}
_METHODS |= {
    "prelu": _prelu,
    "narrow": _narrow,
    "__add__": _sum,
    "__radd__": _sum,
    "__iadd__": _inplace(_sum),
    "__sub__": _difference,
    "__isub__": _inplace(_difference),
    "__mul__": _product,
    "__rmul__": _product,
    "__imul__": _inplace(_product),
    "__truediv__": _quotient,
    "__itruediv__": _inplace(_quotient),
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
