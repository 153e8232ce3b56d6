"""Regions on a CPU: the ops called as functions compute what they do through the dispatcher."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, SHAPES, picture, relative_error
from cpu_cases import built, strided
from networks import Net, block, reflect
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sf_compile.cpu import kernels
from sf_compile.cpu.region import Direct
from sf_compile.graph.regions import Region
from sf_compile.models import TransformerNet
from sf_compile.ops import reference


def every_op(m: Net, x: Tensor) -> Any:
    """Each op that a region may hold but the trunk's, one behind another."""
    y = F.relu(m.norm(m.conv(reflect(x))))
    y = F.group_norm(m.conv(reflect(y)), 2)
    z = m.plain(F.leaky_relu(y, 0.1)) + y
    return m.running(m.same(z)), F.instance_norm(z)


def region_of(model: torch.nn.Module, x: Tensor) -> tuple[Direct, list[Any], Any]:
    """The region of a model that is all one, its inputs in a call, and what the call returns."""
    kept: list[Any] = []
    old = Region.__call__

    def call(self: Region, *inputs: Any) -> Any:
        kept.append((self.inner, inputs))
        return old(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Region, "__call__", call)
        out = torch.compile(model, backend="styleforge")(x)
    (inner, inputs), *_ = kept
    return Direct(inner), list(inputs), out


class Seen(TorchDispatchMode):
    """The fused ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "styleforge":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_functions_give_the_bits_of_the_ops(dtype, mode):
    model = Net(every_op).to(dtype).requires_grad_(False)
    with mode():
        direct, inputs, _ = region_of(model, torch.randn(2, 4, 12, 10, dtype=dtype))
        assert direct._functions is not direct._ops
        ours, ops = direct(*inputs), direct._ops(*inputs)
    assert len(ours) == len(ops)
    for a, b in zip(ours, ops, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        assert a.is_inference() == b.is_inference() and not a.requires_grad


def test_a_trunk_too():
    model = TransformerNet(8, 3).eval()
    with torch.no_grad():
        direct, inputs, _ = region_of(model, torch.rand(1, 3, 24, 20))
        assert any("residual_trunk" in str(node.target) for node in direct._ops.__self__.graph.nodes)
        assert torch.equal(direct(*inputs)[0], direct._ops(*inputs)[0])


def test_who_wants_to_see_the_ops_sees_them():
    model = Net(block)
    with torch.no_grad():
        direct, inputs, _ = region_of(model, torch.randn(1, 4, 12, 10))
        with Seen() as seen:
            direct(*inputs)
    assert "styleforge::conv2d" in seen.names
    traced = [value.requires_grad_(True) if value.is_leaf else value for value in inputs]
    assert all(out.grad_fn is not None for out in direct(*traced))
    with torch.no_grad():
        position = next(i for i, x in enumerate(inputs) if x.dim() == 4 and type(x) is Tensor)
        given = list(inputs)
        given[position] = torch.randn(given[position].shape, dtype=torch.cfloat).conj().imag
        assert given[position].is_neg()
        plain = list(given)
        plain[position] = given[position].resolve_neg()
        assert all(torch.equal(a, b) for a, b in zip(direct(*given), direct(*plain), strict=True))


def test_what_fits_not_is_refused_as_by_the_ops():
    with torch.no_grad():
        direct, inputs, _ = region_of(Net(block), torch.randn(1, 4, 12, 10))
        given = [x.double() if x.dim() == 4 and type(x) is Tensor else x for x in inputs]
        for call in (direct, direct._ops):
            with pytest.raises(RuntimeError, match=r"weight is torch\.float32 on cpu, the input"):
                call(*given)


def test_several_threads_at_once():
    with torch.no_grad():
        direct, inputs, _ = region_of(Net(every_op), torch.randn(2, 4, 12, 10))
        expected = direct(*inputs)

    def call(_: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(a, b) for a, b in zip(direct(*inputs), expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


@built
@pytest.mark.parametrize("how", [*LAYOUTS, "crop", "channels", "mixed"])
@pytest.mark.parametrize(
    "shape", [*(row.shape for row in SHAPES), (2, 37, 19, 33), (1, 16, 4, 4), (1, 64, 1, 50)]
)
def test_the_other_layout_of_any_strides(shape, how):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = strided(picture(shape, dtype, "contiguous"), how)
        for channels_last in (False, True):
            got, expected = kernels.layout(x, channels_last), reference.layout(x, channels_last)
            assert torch.equal(got, expected) and got.stride() == expected.stride() and got.dtype == dtype


@built
@pytest.mark.parametrize("groups", [None, 1, 3, 12])
@pytest.mark.parametrize("outer_eps", [None, 0.0, 1e-3])
@pytest.mark.parametrize("bessel", [1.0, 1.25, float("inf")])
def test_statistics_of_groups_are_the_references(groups, outer_eps, bessel):
    mean, variance = torch.randn(3, 12) * 5, torch.rand(3, 12)
    variance[1], mean[1] = 0.0, 2.0
    mine = kernels.norm_statistics(mean, variance.t().contiguous().t(), groups, bessel, outer_eps)
    exact = reference.norm_statistics(mean.double(), variance.double(), groups, bessel, outer_eps)
    for a, b in zip(mine, exact, strict=True):
        assert a.dtype == torch.float32 and a.is_contiguous()
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=0, equal_nan=True)


def test_a_compiled_network_takes_this_way(monkeypatch):
    calls: list[int] = []
    old = Direct.__call__
    monkeypatch.setattr(Direct, "__call__", lambda self, *inputs: (calls.append(1), old(self, *inputs))[1])
    model = Net(block)
    with torch.no_grad():
        x = torch.randn(1, 4, 12, 10)
        assert relative_error(torch.compile(model, backend="styleforge")(x), model(x)) < 2e-5
    assert calls
