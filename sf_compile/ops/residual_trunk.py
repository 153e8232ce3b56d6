"""``styleforge::residual_trunk``: the residual blocks in the middle of a style network, one after another.

It is the calls of ``conv2d`` that it stands for, from which its gradient and its fake kernel follow. Where a
kernel runs all of them in one launch (``sf_compile.cuda.residual_trunk``), and nobody wants to see the calls
or needs a gradient, that one is launched instead.

With ``input_scales``, one for each convolution, the calls multiply 8-bit integers where theirs is not 0. The
kernel of one launch does without all the same: a picture that it takes is too small to gain anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_compile.ops.checks import require
from sf_compile.ops.conv2d import conv2d
from sf_compile.ops.conv2d_arguments import Arguments as Convolution
from sf_compile.ops.conv2d_arguments import check
from sf_compile.ops.library import CPU, CUDA, LIBRARY
from sf_compile.precision import storage

SCHEMA = (
    "residual_trunk(Tensor input, Tensor? mean, Tensor? variance, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, str activation, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
    "float inner_eps, str precision='auto', float[] input_scales=[]) "
    "-> (Tensor output, Tensor mean, Tensor variance, Tensor kept_input)"
)


_Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]
"""Mean, variance, weight, bias and eps."""


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order.

    ``input`` (N, C, H, W) is raw, and finished by ``mean`` to ``activation`` as ``conv2d`` does it. Two of
    ``weights`` (C, C, 3, 3) make a block, without biases; ``norm_weights`` and ``norm_biases`` (C,) belong to
    the instance norms between the convolutions, one fewer, all of ``inner_eps``. ``precision`` is the
    convolutions', and so are ``input_scales``: one for each, 0 for none, or an empty list for none at all.
    """

    input: Tensor
    mean: Tensor | None
    variance: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    activation: str
    weights: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    inner_eps: float
    precision: str = "auto"
    input_scales: Sequence[float] = ()

    @property
    def scales(self) -> list[float | None]:
        """The ``input_scale`` of each convolution."""
        return [scale or None for scale in self.input_scales or [0.0] * len(self.weights)]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        single = [value for value in self[:5] if value is not None]
        return [*single, *self.weights, *self.norm_weights, *self.norm_biases]


def _checked(arguments: tuple[Any, ...]) -> Arguments:
    """The arguments, of which each convolution's own are left to ``conv2d`` to check."""
    a = Arguments(*arguments)
    depth, weights, biases = len(a.weights), len(a.norm_weights), len(a.norm_biases)
    require(
        depth >= 2 and depth % 2 == 0 and weights == biases == depth - 1,
        lambda: f"styleforge::residual_trunk: a block has two convolutions, and every one but the last has a "
        f"norm after it; got {depth} with {weights} norm weights and {biases} norm biases",
    )
    require(
        len(a.input_scales) in (0, depth),
        lambda: f"styleforge::residual_trunk: {len(a.input_scales)} input_scales for {depth} convolutions",
    )
    return a


def _layer(
    x: Tensor, weight: Tensor, norm: _Norm, activation: str, residual: Tensor | None, keep: bool,
    scale: float | None, precision: str,
) -> Convolution:  # fmt: skip
    """One convolution, which finishes its input by ``norm``, ``activation`` and ``residual``."""
    return Convolution(
        x, weight, None, *norm, activation, residual, 1, [1, 1, 1, 1], "reflect", [1, 1], "none", True, keep,
        True, False, precision, None, scale,
    )  # fmt: skip


def _layers(convolve: Callable[..., Any], a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The trunk by one call of ``convolve`` after another."""
    layer = functools.partial(_layer, precision=a.precision)
    first, *scales = a.scales
    raw, mean, variance, z = convolve(*layer(a.input, a.weights[0], a[1:6], a.activation, None, True, first))
    following = zip(a.weights[1:], a.norm_weights, a.norm_biases, scales, strict=True)
    for number, (weight, norm_weight, norm_bias, scale) in enumerate(following, 1):
        norm = mean, variance, norm_weight, norm_bias, a.inner_eps
        if number % 2:
            raw, mean, variance, _ = convolve(*layer(raw, weight, norm, "relu", None, False, scale))
        else:
            raw, mean, variance, z = convolve(*layer(raw, weight, norm, "none", z, True, scale))
    return raw, mean, variance, z


def _on_cuda(convolve: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The trunk by one launch where a kernel runs it, else by ``convolve``; keeps nothing for a gradient."""
    from sf_compile.cuda import packing, residual_trunk

    a = _checked(arguments)
    check(_layer(a.input, a.weights[0], a[1:6], a.activation, None, True, a.scales[0], a.precision))
    finish = residual_trunk.Finish(*a[1:6], a.activation == "relu")
    norms = list(zip(a.norm_weights, a.norm_biases, strict=True))
    dtype = storage(a.precision, a.input.dtype)
    if a.activation in ("none", "relu") and a.input.dtype == dtype:
        weights = [packing.cast(weight, dtype) for weight in a.weights]
        if residual_trunk.refusal(a.input, finish, weights, norms, a.precision) is None:
            return residual_trunk.trunk(a.input, finish, weights, norms, a.inner_eps)
    return _layers(convolve, a)


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The trunk by calls of the convolution's CPU implementation; keeps nothing for a gradient."""
    return _layers(CPU["conv2d"], _checked(arguments))


def _may_run_at_once(a: Arguments) -> bool:
    """Whether nobody would miss the single calls: plain CUDA tensors, no gradient, no mode or tracer."""
    if not a.input.is_cuda:
        return False
    from sf_compile.cuda.repeated import watched

    tensors = a.tensors
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg() for x in tensors)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return plain and not needs_gradient and not watched()


def _residual_trunk(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = _checked(arguments)
    if _may_run_at_once(a):
        return _on_cuda(conv2d, *arguments)
    return _layers(conv2d, a)


LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("residual_trunk", _residual_trunk, "CompositeImplicitAutograd")
CPU["residual_trunk"] = _on_cpu
CUDA["residual_trunk"] = functools.partial(_on_cuda, CUDA["conv2d"])
residual_trunk = torch.ops.styleforge.residual_trunk.default
