"""The pieces of a style network as ops of their own, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, picture, relative_error
from torch import Tensor

from sf_compile import ops

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def weights(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    scale = 1.0 if len(shape) == 1 else (shape[1] * shape[2] * shape[3]) ** -0.5
    return (torch.randn(shape, device=device) * scale).to(dtype)


def padded_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple, mode: str, stride=1):
    x = F.pad(x, padding, mode={"zeros": "constant"}.get(mode, mode))
    return F.conv2d(x, weight, bias, stride)


def calls(dtype: torch.dtype, device: str, layout: str, c: int = 16, h: int = 12, w: int = 17) -> list[tuple]:
    """(op, arguments, the same in plain PyTorch) of each piece."""
    x = picture((2, c, h, w), dtype, layout, device)
    vectors = [weights(dtype, device, c) for _ in range(4)]
    first, second = (weights(dtype, device, c, c, 3, 3) for _ in range(2))
    strided, bias = weights(dtype, device, 8, c, 5, 3), weights(dtype, device, 8)

    def block(x, w1, g1, b1, w2, g2, b2):
        y = F.relu(F.instance_norm(padded_conv(x, w1, None, (1, 1, 1, 1), "reflect"), weight=g1, bias=b1))
        return x + F.instance_norm(padded_conv(y, w2, None, (1, 1, 1, 1), "reflect"), weight=g2, bias=b2)

    def normed(x, w, g, b):
        return F.relu(F.instance_norm(padded_conv(x, w, None, (1, 1, 1, 1), "zeros", 2), weight=g, bias=b))

    return [
        (ops.conv_reflection_pad, (x, strided, bias), lambda *a: padded_conv(*a, (1, 1, 2, 2), "reflect")),
        (ops.conv_reflection_pad, (x, strided, None, (2, 0, 3, 1), (2, 2)),
         lambda x, w, *_: padded_conv(x, w, None, (2, 0, 3, 1), "reflect", 2)),
        (ops.conv_instance_norm,
         (x, first, vectors[0], vectors[1], 1e-5, (1, 1, 1, 1), "zeros", (2, 2), "relu"),
         lambda x, w, g, b, *_: normed(x, w, g, b)),
        (ops.conv_instance_norm, (x, first),
         lambda x, w: F.instance_norm(padded_conv(x, w, None, (1, 1, 1, 1), "reflect"))),
        (ops.residual_block, (x, first, vectors[0], vectors[1], second, vectors[2], vectors[3]), block),
    ]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_close_to_float64_as_eager_in_the_inputs_layout(dtype, layout, device, strict_float32):
    for op, arguments, eager in calls(dtype, device, layout):
        exact = eager(*(v.double() if isinstance(v, Tensor) else v for v in arguments))
        expected, out = eager(*arguments), op(*arguments)
        assert out.dtype == dtype and out.is_contiguous(memory_format=LAYOUTS[layout])
        allowed = 1.25 * relative_error(expected, exact) + 4 * torch.finfo(dtype).eps
        assert relative_error(out, exact) <= allowed, op


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(5))
def test_gradcheck_and_opcheck(index, device):
    op, arguments, _ = calls(torch.float64, device, "contiguous", 2, 5, 6)[index]
    arguments = [v.requires_grad_() if isinstance(v, Tensor) else v for v in arguments]
    tensors = [v for v in arguments if isinstance(v, Tensor)]
    others = arguments[len(tensors) :]
    if op is ops.conv_reflection_pad and arguments[2] is None:
        tensors, others = arguments[:2], arguments[2:]
    nondeterminism = 1e-10 if device == "cuda" else 0.0
    assert torch.autograd.gradcheck(lambda *t: op(*t, *others), tensors, nondet_tol=nondeterminism)
    compiled = torch.compile(lambda *t: op(*t, *others), backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(*tensors), op(*arguments)) < 1e-12


def test_bad_arguments_say_what_was_wrong():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    with pytest.raises(RuntimeError, match="weight must be"):
        ops.residual_block(x, weight[:, :3], None, None, weight, None, None)
    with pytest.raises(RuntimeError, match="must be smaller than the picture"):
        ops.conv_reflection_pad(x, weight, None, (8, 0, 0, 0))
    with pytest.raises(RuntimeError, match="padding_mode must be one of"):
        ops.conv_instance_norm(x, weight, padding_mode="circular")
    with pytest.raises(RuntimeError, match="activation must be one of"):
        ops.conv_instance_norm(x, weight, activation="tan")
