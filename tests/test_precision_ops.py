"""The ops told a precision or an output dtype, by themselves: what they compute in, write and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from precisions import STORED
from torch import Tensor

import sf_compile.ops  # noqa: F401  registers the ops
from sf_compile.options import Options

OPS = torch.ops.styleforge


def call(x: Tensor, weight: Tensor, *rest: Any, **changes: Any) -> Any:
    """``conv2d`` of ``x``, normalised and added to ``rest`` where there is one, with its last arguments."""
    residual = rest[0] if rest else None
    norm = (x.new_zeros(x.shape[1], dtype=torch.float32), x.new_ones(x.shape[1], dtype=torch.float32))
    transposed = changes.pop("transposed", False)
    arguments = (
        x, weight, changes.pop("bias", None), *norm, None, None, 1e-5, "relu", residual, 1, [1, 1, 1, 1],
        "zeros" if transposed else "reflect", [1, 1], changes.pop("output_activation", "none"), True, True,
        changes.pop("channels_last", False), transposed,
    )  # fmt: skip
    return OPS.conv2d.default(*arguments, changes.pop("precision", "auto"), changes.pop("out_dtype", None))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_conv2d_passes_opcheck_and_rounds_once(precision, out_dtype, transposed):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 4, 7, 6), (4, 4, 3, 3), (4,)))
    residual = torch.randn(2, 4, 7, 6, dtype=torch.float16)
    options = {"precision": precision, "out_dtype": out_dtype, "transposed": transposed, "bias": bias}
    out, mean, variance, kept = call(x, weight, residual, **options)
    stored = STORED[precision]
    assert (out.dtype, kept.dtype) == (out_dtype or stored, stored)
    assert mean.dtype == variance.dtype == torch.float32
    z = (torch.relu(x / (1 + 1e-5) ** 0.5) + residual).to(stored).double()
    assert torch.equal(kept, z.to(stored)) or relative_error(kept, z) < 2 * torch.finfo(stored).eps
    z, w, b = kept.double(), weight.to(stored).double(), bias.to(stored).double()
    if transposed:
        exact = F.conv_transpose2d(z, w, b, padding=1)
    else:
        exact = F.conv2d(F.pad(z, (1, 1, 1, 1), "reflect"), w, b)
    assert relative_error(out, exact) < torch.finfo(out.dtype).eps + 1e-6
    total = out.float().square().mean() + kept.float().mean()
    found = torch.autograd.grad(total, [x, weight, bias])
    assert [g.dtype for g in found] == [torch.float32] * 3
    arguments = (
        x, weight, bias, None, None, None, None, 1.0, "relu", residual, 1, [1, 1, 1, 1],
        "zeros" if transposed else "reflect", [1, 1], "none", True, True, True, transposed, precision,
        out_dtype,
    )  # fmt: skip
    torch.library.opcheck(OPS.conv2d.default, arguments)


def test_normalize_passes_opcheck_in_another_dtype():
    x, residual = torch.randn(2, 4, 7, 6, dtype=torch.float16), torch.randn(2, 4, 7, 6, requires_grad=True)
    vectors = [torch.rand(4) + 0.5 for _ in range(4)]
    plain = (x, *vectors, 1e-5, "relu", residual, True, 2, [1, 1, 1, 1], "reflect", None)
    arguments = (*plain, torch.float32)
    out = OPS.normalize.default(*arguments)
    assert out.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.sum(), residual)
    assert gradient.dtype == torch.float32
    torch.library.opcheck(OPS.normalize.default, arguments)
    with pytest.raises(RuntimeError, match=r"residual is torch\.float32"):
        OPS.normalize.default(*plain)


def test_auto_takes_no_mixture():
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32"):
        call(torch.rand(1, 4, 8, 8).half(), torch.rand(4, 4, 3, 3))


def test_unknown_precisions_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"precision cannot be 'float16'; did you mean 'fp16'\?"):
        Options(precision="float16")
    with pytest.raises(ValueError, match=r"did you mean 'bf16'\? Valid: auto, fp16, bf16, tf32, fp32"):
        Options.build({"precision": "bf61"})
    with pytest.raises(RuntimeError, match=r"precision must be one of auto, .*; got 'half'"):
        call(torch.rand(1, 4, 8, 8), torch.rand(4, 4, 3, 3), precision="half")
    with pytest.raises(RuntimeError, match=r"out_dtype must be float16, .* got torch\.int32"):
        call(torch.rand(1, 4, 8, 8), torch.rand(4, 4, 3, 3), out_dtype=torch.int32)


def test_an_op_computes_in_what_it_is_given_whatever_autocast_says():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    expected = call(x, weight, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x, weight, x)
        moved = OPS.normalize.default(x.half(), None, None, None, None, 1.0, "relu", None, False, 2, [1] * 4)
    assert all(map(torch.equal, found, expected)) and moved.dtype == torch.float16
