"""The gradient of ``styleforge::conv2d``: what a call keeps for it, and how it is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sf_compile.activations import parse
from sf_compile.ops import reference
from sf_compile.ops.activation_gradients import activation_gradient, gradient_by_value, is_by_value
from sf_compile.ops.checks import statistics_dtype
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.instance_statistics import statistics_gradient
from sf_compile.ops.normalize import moved_gradient, normalize_gradients, own


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep in ``ctx`` what ``backward`` needs of a call."""
    a = Arguments(*inputs)
    ctx.set_materialize_grads(False)
    # A result that is not needed is not kept: it may be written to before the backward pass.
    needed = a.statistics or is_by_value(a.output_activation)
    kept = a._replace(
        # Also of a bare convolution, whose picture eager keeps: a pad by nothing, a copy, looks like it.
        input=own(a.input, a.norm_weight, a.norm_bias),
        residual=None if a.residual is None else own(a.residual),
    )
    ctx.save_for_backward(
        *(value for value in kept if isinstance(value, Tensor)), *(output[:2] if needed else (None, None))
    )
    ctx.settings = tuple(None if isinstance(value, Tensor) else value for value in a)
    ctx.is_tensor = tuple(isinstance(value, Tensor) for value in a)


def backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    grad_kept: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments, in their order; None where there is none.

    Recomputes the padded input (cheap) rather than keeping it; the convolution runs only backwards.
    """
    from sf_compile import tf32

    *tensors, output, output_mean = ctx.saved_tensors
    remaining = iter(tensors)
    a = Arguments(
        *(
            next(remaining) if is_tensor else setting
            for is_tensor, setting in zip(ctx.is_tensor, ctx.settings, strict=True)
        )
    )
    grad = grad_output
    if a.statistics:
        through = statistics_gradient(output, output_mean, grad_mean, grad_variance)
        if through is not None:
            grad = (through if grad is None else grad + through).to(output.dtype)
    grad_z = grad_kept if a.keep_input else None
    grad_weight = grad_bias = None
    if grad is not None:
        if a.output_activation != "none":
            grad = _through_output_activation(grad, output, a)
        grad, weight, z = grad.to(a.dtype), a.weight.to(a.dtype), a.input.to(a.dtype)
        if a.normalizes:
            z = torch.ops.styleforge.normalize.default(
                a.input, *a.norm, a.residual, a.channels_last, 1, [0, 0, 0, 0], "zeros", None, a.dtype
            )
        padding, sizes, output_sizes = list(a.padding), [0, 0], [0, 0]
        if a.transposed:
            padding = [0, 0, 0, 0]
            sizes, output_sizes, cuts = reference.transposed_sizes(a.stride, a.padding)
            grad = torch.nn.functional.pad(grad, cuts)
        elif a.padding_mode == "zeros" and a.padding[::2] == a.padding[1::2] and min(a.padding) >= 0:
            # PyTorch's own padding: no copy, and a gradient of NaN is not multiplied by the zeros.
            padding, sizes = [0, 0, 0, 0], padding[2::-2]
        padded = reference.moved(z, a.upsample, padding, a.padding_mode)
        if _misread_by_onednn(a):
            grad, padded, weight = grad.contiguous(), padded.contiguous(), weight.contiguous()
        needs = ctx.needs_input_grad
        with tf32.switched(a.precision):
            grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, padded, weight, None if a.bias is None else list(a.bias.shape), list(a.stride),
                sizes, [1, 1], a.transposed, output_sizes, 1,
                [True, needs[1], a.bias is not None and needs[2]],
            )  # fmt: skip
        through = moved_gradient(grad_padded, a.input.shape, a.upsample, padding, a.padding_mode)
        grad_z = through if grad_z is None else grad_z + through
    if grad_z is None:
        return (None,) * len(a)
    gradients: dict[str, Tensor | None] = {}
    if grad_weight is not None:
        gradients["weight"] = grad_weight.to(a.weight.dtype)
    if grad_bias is not None and a.bias is not None:
        gradients["bias"] = grad_bias.to(a.bias.dtype)
    norm = normalize_gradients(grad_z, a.input, a.norm)
    gradients.update(input=norm.input.to(a.input.dtype), mean=norm.mean, variance=norm.variance)
    gradients.update(norm_weight=norm.weight, norm_bias=norm.bias)
    if a.residual is not None:
        gradients["residual"] = grad_z.to(a.residual.dtype)
    return tuple(gradients.get(field) for field in Arguments._fields)


def _misread_by_onednn(a: Arguments) -> bool:
    """Whether PyTorch 2.13's gradient of the weight writes behind its memory, on a CPU in channels_last.

    Seen of 1x1 kernels with a stride, over two images and more of 3 channels, not of 8: the process may die.
    """
    one = a.weight.shape[2] == 1 and a.weight.shape[3] == 1
    return a.input.device.type == "cpu" and one and tuple(a.stride) != (1, 1)


def _through_output_activation(grad: Tensor, output: Tensor | None, a: Arguments) -> Tensor:
    """The gradient of what ``a.output_activation`` made ``output`` of, recomputed where it must be known."""
    if output is not None and is_by_value(a.output_activation):
        return gradient_by_value(grad, output, a.output_activation).to(output.dtype)
    if parse(a.output_activation).function == "none":
        return activation_gradient(grad, grad, a.output_activation)
    plain = a._replace(output_activation="none", statistics=False, keep_input=False, input_scale=None)
    raw = torch.ops.styleforge.conv2d.default(*plain)[0]
    dtype = statistics_dtype(raw.dtype)
    return activation_gradient(grad.to(dtype), raw.to(dtype), a.output_activation).to(raw.dtype)
