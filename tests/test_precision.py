"""Every precision from a model of every dtype: dtypes, strides, errors, gradients, what is reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from networks import Net, reflect
from precisions import DTYPES, STORED, Keeping, assert_as_good, picture, small_net
from torch import Tensor, nn

import sf_compile.ops  # noqa: F401  registers the ops
from sf_compile import explain, options
from sf_compile.precision import PRECISIONS, name_of, storage

OPS = torch.ops.styleforge


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_a_model_of_every_dtype(precision, dtype):
    model = small_net().to(dtype)
    x = picture().to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    keeping = Keeping(precision=precision)
    with torch.no_grad():
        out = torch.compile(model, backend=keeping, fullgraph=True)(x)
        exact = copy.deepcopy(model).double()(x.double())
        computed = storage(precision, dtype)
        like = copy.deepcopy(model).to(computed)(x.to(computed))
        assert_as_good(out, like, model(x), exact)
    assert keeping.calls == ["conv2d.default"] * 10  # and no conversion beside them
    assert all(p.dtype == dtype and torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_only_what_enters_and_leaves_is_of_the_models_dtype():
    keeping = Keeping(precision="fp16")
    with torch.no_grad():
        torch.compile(small_net(), backend=keeping)(picture())
    calls = [node for node in keeping.graphs[-1].graph.nodes if node.target is OPS.conv2d.default]
    told = [node.args[-3:-1] for node in calls]
    assert told == [("fp16", None)] * 9 + [("fp16", torch.float32)]
    assert [node.args[17] for node in calls] == [True] * 9 + [False]  # channels_last, as in a float16 model


def both_readers(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    """Finished tensors with readers inside and outside of fused convolutions."""
    y = F.relu(m.norm(m.conv(reflect(x))))
    z = m.plain(m.conv(reflect(y))) + y  # y: kept, and added
    w = m.same(reflect(z))
    u = m.norm(torch.sin(y))  # y: read by PyTorch
    return w, z.mean(), m.plain(m.down(z)), u + y, m.norm(m.conv(reflect(x))) + m.skip(x)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_readers_get_the_models_dtype(precision, dtype):
    model, x = Net(both_readers).to(dtype), torch.randn(2, 4, 12, 10).to(dtype)
    with torch.no_grad():
        ours = torch.compile(model, backend=(keeping := Keeping(precision=precision)), fullgraph=True)(x)
        eager = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        rounded = copy.deepcopy(model).to(STORED[precision])(x.to(STORED[precision]))
    assert "conv2d.default" in keeping.calls
    for out, reference, value, like in zip(ours, eager, exact, rounded, strict=True):
        assert (out.dtype, out.stride()) == (reference.dtype, reference.stride())
        allowed = max(relative_error(like, value), relative_error(reference, value))
        assert relative_error(out, value) <= 4 * allowed  # few numbers: some of both errors is luck


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layout_that_eager_gives(layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = small_net().to(memory_format=memory_format)
    x = picture().contiguous(memory_format=memory_format)
    with torch.no_grad():
        out = torch.compile(model, backend="styleforge", options={"precision": "fp16"})(x)
        assert (out.stride(), out.dtype) == (model(x).stride(), torch.float32)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_of_the_parameters_dtypes(precision, dtype):
    model, x = small_net().to(dtype), (picture() / 255).to(dtype)
    target = torch.rand(1, 3, 24, 20)

    def gradients(run: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
        net.zero_grad()
        x = x.clone().requires_grad_()
        (run(x).float() - target).square().mean().mul(256).backward()  # as a GradScaler does
        return [x.grad, *(p.grad for p in net.parameters())]

    ours = gradients(torch.compile(model, backend="styleforge", options={"precision": precision}), model, x)
    wanted = [x, *model.parameters()]
    assert [g.dtype for g in ours] == [p.dtype for p in wanted] and all(g.isfinite().all() for g in ours)
    exact_net, like_net = copy.deepcopy(model).double(), copy.deepcopy(model).to(STORED[precision])
    exact = gradients(exact_net, exact_net, x.double())
    like = gradients(like_net, like_net, x.to(STORED[precision]))
    # As a whole: single biases in front of a norm have a gradient of nothing but rounding.
    flat = [torch.cat([g.double().flatten() for g in each[1:]]) for each in (ours, like, exact)]
    rounding = relative_error(flat[1].to(dtype), flat[2])
    assert relative_error(flat[0], flat[2]) <= 3 * rounding  # of terms that cancel behind a norm


@pytest.mark.parametrize("precision", PRECISIONS)
def test_explain_names_the_precision_of_every_layer(precision):
    report = explain(small_net(), picture(), options={"precision": precision})
    name = {"auto": "fp32", "tf32": "fp32"}.get(precision, precision)  # a CPU has no TF32
    assert [site.precision for site in report.fused] == [name] * 10
    assert str(report).count(f"  {name}  ") == 10
    assert {site["precision"] for site in report.to_dict()["fused"]} == {name}


def test_names_are_those_of_the_dtypes_and_options():
    assert (*PRECISIONS, "int8") == options.PRECISIONS
    assert [name_of(dtype) for dtype in DTYPES] == ["fp32", "fp16", "bf16", "fp64"]
    assert [storage(p, torch.float64) for p in PRECISIONS] == [torch.float64, *STORED.values()]
