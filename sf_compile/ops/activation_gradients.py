"""The derivatives of ``sf_compile.activations``, by PyTorch's own backward functions: equal at every kink."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sf_compile.activations import parse

_aten = torch.ops.aten


def _clamp(grad: Tensor, x: Tensor, lower: float, upper: float) -> Tensor:
    return torch.where((x >= lower) & (x <= upper), grad, 0)


# (gradient of the value, argument, parameters) -> gradient of the argument
_BY_ARGUMENT: dict[str, Callable[..., Tensor]] = {
    "none": lambda grad, x: grad,
    "relu": lambda grad, x: torch.where(x > 0, grad, 0),
    "leaky_relu": lambda grad, x, slope: _aten.leaky_relu_backward(grad, x, slope, False),
    "hardtanh": _aten.hardtanh_backward,
    "clamp": _clamp,
    "tanh": lambda grad, x: _aten.tanh_backward(grad, x.tanh()),
    "sigmoid": lambda grad, x: _aten.sigmoid_backward(grad, x.sigmoid()),
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "elu": lambda grad, x, alpha: _aten.elu_backward(grad, alpha, 1.0, 1.0, False, x),
}


# (gradient of the value, value, parameters) -> gradient of the argument
_BY_VALUE: dict[str, Callable[..., Tensor]] = {
    "relu": _BY_ARGUMENT["relu"],
    "leaky_relu": lambda grad, value, slope: _aten.leaky_relu_backward(grad, value, slope, True),
    "tanh": _aten.tanh_backward,
    "sigmoid": _aten.sigmoid_backward,
}


def prelu_gradients(grad: Tensor, x: Tensor, slope: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of x and of the slope, (1,) or (C,), of scale * prelu(x)."""
    through, of_slope = _aten._prelu_kernel_backward(grad * scale, x, slope.to(x.dtype).reshape(1, -1, 1, 1))
    total = of_slope.sum((0, 2, 3))
    return through, (total if slope.shape[0] == x.shape[1] else total.sum(0, keepdim=True)).to(slope.dtype)


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of ``x``, of which ``activation`` made what ``grad`` is the gradient of."""
    found = parse(activation)
    grad = grad * found.scale if found.is_scaled else grad
    return _BY_ARGUMENT[found.function](grad, x, *found.parameters)


def is_by_value(activation: str) -> bool:
    """Whether the derivative is read off the value that ``activation`` returned.

    A scaled value is too coarse a number to go back from, and one at a bound may come from either side.
    """
    found = parse(activation)
    return not found.is_scaled and found.function in _BY_VALUE and all(p > 0 for p in found.parameters)


def gradient_by_value(grad: Tensor, value: Tensor, activation: str) -> Tensor:
    """The same from the value that ``activation`` returned, which ``is_by_value``."""
    found = parse(activation)
    return _BY_VALUE[found.function](grad, value, *found.parameters)
