"""``styleforge::conv2d``: a convolution that finishes its producer's norm and starts its own.

An instance norm needs the whole feature map before it can scale one pixel, so it is split: this
op returns its *raw* output with the mean and variance of every (image, channel), and the op that
reads it normalises on the way in:

    z      = act((input - mean) / sqrt(variance + eps) * norm_weight + norm_bias) + residual
    output = output_activation(conv2d(pad(upsample_nearest(z)), weight, bias, stride))

The activations are those of ``sf_compile.activations``.
Every step in front of the convolution is optional, so this one schema also covers a convolution
that reads a finished picture. ``keep_input`` returns ``z`` as well, for another reader of it (the
skip path of a residual block). A convolution bias in front of an instance norm has no effect and
is best left out by the caller.

A ``transposed`` convolution has no pad in front of it: ``padding`` is what is cut off each side of its whole
result, of (H - 1) stride + kh rows, and may be negative on the right and below: the result then goes on.

What is computed in is ``precision``, one of ``sf_compile.precision``. Where that is not "auto", the input,
the residual, weight and bias may be of any dtype: z, weight and bias are rounded to its storage, once, and
everything that is returned has that dtype, but for ``output``, if it is given an ``out_dtype``.

With an ``input_scale`` the products are of 8-bit integers (``sf_compile.ops.quantization``): z is rounded to
multiples of that scale, the weights of each output channel to multiples of theirs. Gradients are those
without it. Its kernels are for compute capability 9.0; other GPUs compute without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.ops import quantization, reference
from sf_compile.ops.activation_gradients import activation_gradient, gradient_by_value
from sf_compile.ops.checks import (
    FLOATING,
    PADDING_MODES,
    check_activation,
    check_choice,
    check_dtype,
    check_image,
    check_moves,
    check_norm,
    check_residual,
    require,
    statistics_dtype,
)
from sf_compile.ops.instance_statistics import statistics_gradient
from sf_compile.ops.library import empty_image, register
from sf_compile.ops.normalize import Norm, moved_gradient, normalize_gradients
from sf_compile.precision import PRECISIONS, storage

SCHEMA = (
    "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? mean, Tensor? variance, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, str activation, Tensor? residual, "
    "int upsample, int[4] padding, str padding_mode, int[2] stride, str output_activation, "
    "bool statistics, bool keep_input, bool channels_last, bool transposed=False, str precision='auto', "
    "ScalarType? out_dtype=None, float? input_scale=None) "
    "-> (Tensor output, Tensor mean, Tensor variance, Tensor kept_input)"
)


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order.

    Shapes: ``input`` and ``residual`` (N, C, H, W), ``weight`` (O, C, kh, kw), or (C, O, kh, kw) if
    ``transposed``, ``bias`` (O,), ``mean``, ``variance``, ``norm_weight`` and ``norm_bias`` (N, C) or
    (C,). ``padding`` is left, right, top, bottom.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    activation: str
    residual: Tensor | None
    upsample: int
    padding: list[int]
    padding_mode: str
    stride: list[int]
    output_activation: str
    statistics: bool
    keep_input: bool
    channels_last: bool
    transposed: bool = False
    precision: str = "auto"
    out_dtype: torch.dtype | None = None
    input_scale: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the convolution's operands are rounded to, and what is kept is stored in."""
        return storage(self.precision, self.input.dtype)

    @property
    def output_dtype(self) -> torch.dtype:
        """The output's."""
        return self.out_dtype or self.dtype

    @property
    def out_channels(self) -> Any:
        """Channels of the output."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def normalizes(self) -> bool:
        """Whether anything is applied to ``input`` before it is upsampled and padded."""
        return self.mean is not None or self.residual is not None or self.activation != "none"

    @property
    def norm(self) -> Norm:
        """What is applied to ``input`` before the residual is added."""
        return Norm(self.mean, self.variance, self.norm_weight, self.norm_bias, self.eps, self.activation)


def check(a: Arguments) -> tuple[Any, Any]:
    """Check everything that fake and real calls share; return the output's height and width."""
    input, weight, bias = a.input, a.weight, a.bias
    check_image("conv2d", input)
    check_norm("conv2d", input, a.mean, a.variance, a.norm_weight, a.norm_bias)
    check_activation("conv2d", "activation", a.activation)
    check_activation("conv2d", "output_activation", a.output_activation)
    check_choice("conv2d", "padding_mode", a.padding_mode, PADDING_MODES)
    check_choice("conv2d", "precision", a.precision, PRECISIONS)
    check_dtype("conv2d", "out_dtype", a.out_dtype)
    converts = a.precision != "auto"
    check_residual("conv2d", input, a.residual, converts)
    require(
        weight.dim() == 4 and weight.shape[0 if a.transposed else 1] == input.shape[1],
        lambda: f"styleforge::conv2d: weight must be "
        f"{f'({input.shape[1]}, out' if a.transposed else f'(out, {input.shape[1]}'}, kh, kw), got "
        f"{tuple(weight.shape)}",
    )
    require(
        (weight.dtype == input.dtype or (converts and weight.dtype in FLOATING))
        and weight.device == input.device,
        lambda: f"styleforge::conv2d: weight is {weight.dtype} on {weight.device}, the input "
        f"{input.dtype} on {input.device}",
    )
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == a.out_channels,
            lambda: f"styleforge::conv2d: bias must be ({a.out_channels},), got {tuple(bias.shape)}",
        )
        require(
            (bias.dtype == input.dtype or (converts and bias.dtype in FLOATING))
            and bias.device == input.device,
            lambda: f"styleforge::conv2d: bias is {bias.dtype} on {bias.device}, the input "
            f"{input.dtype} on {input.device}",
        )
    require(
        len(a.stride) == 2 and min(a.stride) >= 1,
        lambda: f"styleforge::conv2d: stride must be 2 numbers of 1 or more, got {list(a.stride)}",
    )
    require(
        not a.keep_input or a.normalizes,
        lambda: "styleforge::conv2d: keep_input needs a norm, an activation or a residual to apply",
    )
    quantization.check(a)
    if a.transposed:
        return _transposed_size(a)
    height, width = check_moves("conv2d", input, a.upsample, a.padding, a.padding_mode)
    require(
        height >= weight.shape[2] and width >= weight.shape[3],
        lambda: f"styleforge::conv2d: kernel {tuple(weight.shape[2:])} is larger than the padded picture, "
        f"{height} x {width}",
    )
    return (height - weight.shape[2]) // a.stride[0] + 1, (width - weight.shape[3]) // a.stride[1] + 1


def _transposed_size(a: Arguments) -> tuple[Any, Any]:
    """The output's height and width, once what is only asked of a transposed convolution is checked."""
    height, width = check_moves("conv2d", a.input, a.upsample, [0, 0, 0, 0], a.padding_mode)
    left, right, top, bottom = a.padding
    require(
        a.padding_mode == "zeros" and min(left, top) >= 0 and right > -a.stride[1] and bottom > -a.stride[0],
        lambda: f"styleforge::conv2d: a transposed convolution of stride {list(a.stride)} has no padding "
        f"{a.padding_mode!r} {list(a.padding)}",
    )
    rows = (height - 1) * a.stride[0] + a.weight.shape[2]
    columns = (width - 1) * a.stride[1] + a.weight.shape[3]
    require(
        rows - top - bottom >= 1 and columns - left - right >= 1,
        lambda: f"styleforge::conv2d: padding {list(a.padding)} cuts off all of {rows} x {columns}",
    )
    return rows - top - bottom, columns - left - right


def absent(input: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for an output that was not asked for: an empty tensor."""
    return input.new_empty((0,), dtype=dtype)


def composed(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op out of the reference's pieces, one PyTorch call after another, on any device."""
    if a.input_scale is not None:
        return quantization.composed(a)
    z = a.input.to(a.dtype)
    if a.normalizes:
        z = reference.normalize(a.input, *a.norm, a.residual, dtype=a.dtype)
    z = reference.layout(z, a.channels_last)
    # A result of another dtype is rounded to that alone, not to the operands' before.
    dtype = a.dtype if a.output_dtype == a.dtype else torch.float32
    weight = a.weight.to(a.dtype).to(dtype)
    bias = None if a.bias is None else a.bias.to(a.dtype).to(dtype)
    if a.transposed:
        upsampled = reference.upsample_nearest(z.to(dtype), a.upsample)
        out = reference.conv_transpose2d(
            upsampled, weight, bias, a.stride, a.padding, a.output_activation
        )
    else:
        padded = reference.moved(z.to(dtype), a.upsample, a.padding, a.padding_mode)
        out = reference.conv2d(padded, weight, bias, a.stride, a.output_activation)
    out = reference.layout(out.to(a.output_dtype), a.channels_last)
    if a.statistics:
        mean, variance = reference.statistics(out)
    else:
        mean = absent(a.input, statistics_dtype(a.output_dtype))
        variance = absent(a.input, statistics_dtype(a.output_dtype))
    return out, mean, variance, z if a.keep_input else absent(a.input, a.dtype)


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sf_compile.cpu import convolution, kernels

    a = Arguments(*arguments)
    check(a)
    tensors = (a.weight, a.bias, a.residual)
    dtypes = {a.dtype, a.output_dtype, a.input.dtype, *(t.dtype for t in tensors if t is not None)}
    plain = len(dtypes) == 1 and a.input_scale is None
    return convolution.conv2d(a) if plain and kernels.take(a.input) else composed(a)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sf_compile.cuda import convolution

    a = Arguments(*arguments)
    check(a)
    return convolution.conv2d(a)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Arguments(*arguments)
    height, width = check(a)
    n, c = a.input.shape[0], a.out_channels
    dtype = statistics_dtype(a.output_dtype)
    shape = (n, c) if a.statistics else (0,)
    kept = absent(a.input, a.dtype)
    if a.keep_input:
        kept = empty_image(a.input.shape, a.input, a.channels_last, a.dtype)
    return (
        empty_image((n, c, height, width), a.input, a.channels_last, a.output_dtype),
        a.input.new_empty(shape, dtype=dtype),
        a.input.new_empty(shape, dtype=dtype),
        kept,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = Arguments(*inputs)
    ctx.set_materialize_grads(False)
    # A result that is not needed is not kept: it may be written to before the backward pass.
    needed = a.statistics or a.output_activation != "none"
    ctx.save_for_backward(
        *(value for value in a if isinstance(value, Tensor)), *(output[:2] if needed else (None, None))
    )
    ctx.settings = tuple(None if isinstance(value, Tensor) else value for value in a)
    ctx.is_tensor = tuple(isinstance(value, Tensor) for value in a)


def _backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    grad_kept: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Recomputes the padded input (cheap) rather than keeping it; the convolution runs only backwards."""
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


def _through_output_activation(grad: Tensor, output: Tensor, a: Arguments) -> Tensor:
    """The gradient of what ``a.output_activation`` made ``output`` of, recomputed where it must be known."""
    through = gradient_by_value(grad, output, a.output_activation)
    if through is None:
        plain = a._replace(output_activation="none", statistics=False, keep_input=False, input_scale=None)
        raw = torch.ops.styleforge.conv2d.default(*plain)[0]
        dtype = statistics_dtype(raw.dtype)
        through = activation_gradient(grad.to(dtype), raw.to(dtype), a.output_activation)
    return through.to(output.dtype)


register(
    SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, backward=_backward, setup_context=_setup_context
)
conv2d = torch.ops.styleforge.conv2d.default
