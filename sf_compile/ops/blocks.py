"""Whole pieces of a style network as ops, for use without the compiler.

Each is a few calls of ``conv2d`` and ``normalize``, from which its gradient and its fake kernel follow. On a
GPU with a fused kernel a piece is one kernel a convolution, and the last norm is one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sf_compile.ops.conv2d import conv2d
from sf_compile.ops.library import LIBRARY
from sf_compile.ops.normalize import normalize


def _channels_last(x: Tensor) -> bool:
    """Whether eager PyTorch would keep the result of an operation on ``x`` in channels_last."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _inner_layout(x: Tensor) -> bool:
    """The layout of what only these ops see: channels_last where tensor cores want it."""
    return _channels_last(x) or (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16))


def _conv_reflection_pad(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], stride: list[int]
) -> Tensor:
    return conv2d(
        input, weight, bias, None, None, None, None, 1.0, "none", None, 1, padding, "reflect", stride, "none",
        False, False, _channels_last(input),
    )[0]  # fmt: skip


def _conv_instance_norm(
    input: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    padding: list[int], padding_mode: str, stride: list[int], activation: str,
) -> Tensor:  # fmt: skip
    raw, mean, variance, _ = conv2d(
        input, weight, None, None, None, None, None, 1.0, "none", None, 1, padding, padding_mode, stride,
        "none", True, False, _inner_layout(input),
    )  # fmt: skip
    return normalize(
        raw, mean, variance, norm_weight, norm_bias, eps, activation, None, _channels_last(input)
    )


def _residual_block(
    input: Tensor, weight1: Tensor, norm_weight1: Tensor | None, norm_bias1: Tensor | None, weight2: Tensor,
    norm_weight2: Tensor | None, norm_bias2: Tensor | None, eps: float, padding_mode: str,
) -> Tensor:  # fmt: skip
    def around(weight: Tensor) -> list[int]:
        rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
        return [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]

    inner = _inner_layout(input)
    raw, mean, variance, _ = conv2d(
        input, weight1, None, None, None, None, None, 1.0, "none", None, 1, around(weight1), padding_mode,
        [1, 1], "none", True, False, inner,
    )  # fmt: skip
    raw, mean, variance, _ = conv2d(
        raw, weight2, None, mean, variance, norm_weight1, norm_bias1, eps, "relu", None, 1, around(weight2),
        padding_mode, [1, 1], "none", True, False, inner,
    )  # fmt: skip
    return normalize(
        raw, mean, variance, norm_weight2, norm_bias2, eps, "none", input, _channels_last(input)
    )


for _schema, _function in (
    ("conv_reflection_pad(Tensor input, Tensor weight, Tensor? bias, int[4] padding, int[2] stride) "
     "-> Tensor", _conv_reflection_pad),
    ("conv_instance_norm(Tensor input, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, float eps, "
     "int[4] padding, str padding_mode, int[2] stride, str activation) -> Tensor", _conv_instance_norm),
    ("residual_block(Tensor input, Tensor weight1, Tensor? norm_weight1, Tensor? norm_bias1, Tensor weight2, "
     "Tensor? norm_weight2, Tensor? norm_bias2, float eps, str padding_mode) -> Tensor", _residual_block),
):  # fmt: skip
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_schema.split("(", 1)[0], _function, "CompositeImplicitAutograd")


def conv_reflection_pad(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, int, int, int] | None = None,
    stride: tuple[int, int] = (1, 1),
) -> Tensor:
    """``conv2d(reflection_pad2d(input, padding), weight, bias, stride)``.

    ``input`` (N, C, H, W), ``weight`` (O, C, kh, kw) and ``bias`` (O,) in one dtype: float16, bfloat16,
    float32 or float64. ``padding`` is left, right, top, bottom; by default half the kernel on every side.
    Returns (N, O, H', W') in the layout of ``input``. Raises RuntimeError, saying what is wrong, for shapes
    or dtypes that do not fit and for a padding that is not smaller than the picture.
    """
    return torch.ops.styleforge.conv_reflection_pad(
        input, weight, bias, _padding(weight, padding), list(stride)
    )


def conv_instance_norm(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    padding: tuple[int, int, int, int] | None = None,
    padding_mode: str = "reflect",
    stride: tuple[int, int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """``activation(instance_norm(conv2d(pad(input), weight, stride=stride)))``, without a convolution bias.

    A bias in front of an instance norm has no effect. ``norm_weight`` and ``norm_bias`` (O,) belong to the
    norm; ``padding_mode`` is "zeros", "reflect" or "replicate", ``activation`` one of
    ``sf_compile.activations``; the rest as in ``conv_reflection_pad``.
    """
    return torch.ops.styleforge.conv_instance_norm(
        input, weight, norm_weight, norm_bias, eps, _padding(weight, padding), padding_mode, list(stride),
        activation,
    )  # fmt: skip


def residual_block(
    input: Tensor,
    weight1: Tensor,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    weight2: Tensor,
    norm_weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps: float = 1e-5,
    padding_mode: str = "reflect",
) -> Tensor:
    """``input + norm2(conv2(pad(relu(norm1(conv1(pad(input)))))))`` with instance norms and equal sizes.

    ``weight1`` (M, C, kh, kw) and ``weight2`` (C, M, kh, kw); the norms' weights and biases (M,) and (C,) or
    None. Pads by half the kernel. Layout, dtypes and errors as in ``conv_reflection_pad``.
    """
    return torch.ops.styleforge.residual_block(
        input, weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2, eps, padding_mode
    )


def _padding(weight: Tensor, padding: tuple[int, int, int, int] | None) -> list[int]:
    if padding is not None:
        return list(padding)
    vertical, horizontal = weight.shape[-2] // 2, weight.shape[-1] // 2
    return [horizontal, horizontal, vertical, vertical]
