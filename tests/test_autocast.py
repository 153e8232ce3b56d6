"""Networks under autocast, inside and outside of what is compiled: dtypes, errors, training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from networks import Net, reflect
from precisions import Keeping, assert_as_good, picture, small_net
from torch import Tensor, fx, nn

import sf_compile.ops  # noqa: F401  registers the ops
from sf_compile import explain
from sf_compile.graph.match import match
from sf_compile.graph.normalize import normalize
from sf_compile.graph.plan import plan
from sf_compile.graph.rewrite import rewrite
from sf_compile.options import Options


def around(model: nn.Module, dtype: torch.dtype, **settings: Any) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype, **settings):
            return model(x)

    return run


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_transformer_net_under_autocast(dtype, inside, cache):
    model, x, keeping = small_net(), picture(), Keeping()
    eager = around(model, dtype, cache_enabled=cache)
    with torch.no_grad():
        if inside:
            out = torch.compile(eager, backend=keeping, fullgraph=True)(x)
        else:
            out = around(torch.compile(model, backend=keeping, fullgraph=True), dtype, cache_enabled=cache)(x)
        reference, exact = eager(x), copy.deepcopy(model).double()(x.double())
    assert_as_good(out, reference, reference, exact)
    assert [name for name in keeping.calls if "autocast" not in name] == ["conv2d.default"] * 10
    # The next layer of a style network is not finished by a pass of its own, whatever its parameters' dtype.
    assert keeping.calls.count("_enter_autocast") == int(inside)


def nested(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.relu(m.norm(m.conv(reflect(x))))
        with torch.autocast("cpu", enabled=False):
            z = m.norm(m.conv(reflect(y.float())))
        w = m.plain(m.conv(reflect(z)))
        return y, z, w, m.same(w)


def region_in_the_middle(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    y = F.relu(m.norm(m.conv(reflect(x))))
    with torch.autocast("cpu", torch.bfloat16):
        z = m.plain(m.conv(reflect(y)))
        w = F.relu(m.norm(m.conv(reflect(z)))) + z
    return y, m.conv(reflect(w.float())) + reflect(w)[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("body", [nested, region_in_the_middle])
@pytest.mark.parametrize("grad", [False, True])
def test_regions_in_parts_of_a_network(body, grad):
    model, x = Net(body), torch.randn(2, 4, 12, 10)
    keeping = Keeping()
    with torch.set_grad_enabled(grad):
        ours = torch.compile(model, backend=keeping, fullgraph=True)(x)
        eager = model(x)
    assert "conv2d.default" in keeping.calls
    for out, reference in zip(ours, eager, strict=True):
        assert (out.dtype, out.stride()) == (reference.dtype, reference.stride())
        assert relative_error(out, reference) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_precision_asked_for_goes_before_autocast(precision):
    model, x, dtype = small_net(), picture(), torch.bfloat16
    compiled = torch.compile(model, backend="styleforge", options={"precision": precision})
    with torch.no_grad():
        out, reference = around(compiled, dtype)(x), around(model, dtype)(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert (out.dtype, out.stride()) == (reference.dtype, reference.stride())
    assert relative_error(out, exact) < relative_error(reference, exact) / 3


def test_calls_inside_and_outside_of_autocast_do_not_meet():
    model, x = small_net(), picture()
    compiled = torch.compile(model, backend="styleforge")
    with torch.no_grad():
        for _ in range(2):
            assert compiled(x).dtype == torch.float32
            assert around(compiled, torch.bfloat16)(x).dtype == torch.bfloat16
            assert around(compiled, torch.float16)(x).dtype == torch.float16


def test_training_under_autocast_with_a_scaler():
    twins = [small_net().train() for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    x, target = picture() / 255, torch.rand(1, 3, 24, 20)
    losses: list[list[float]] = []
    for model, run in ((twins[0], twins[0]), (twins[1], torch.compile(twins[1], backend="styleforge"))):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = run(x)
                loss = F.mse_loss(out.float(), target)
            scaler.scale(loss).backward()
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(float(loss))
        assert scaler.get_scale() == 256.0  # no step was skipped
    assert losses[1][-1] < losses[1][0]
    for eager, ours in zip(*losses, strict=True):
        assert abs(eager - ours) < 0.03 * eager


def test_explain_names_autocasts():
    def mixed(m: Net, x: Tensor) -> Any:
        y = m.norm(m.conv(reflect(x)))
        with torch.autocast("cpu", torch.bfloat16):
            y = m.conv(reflect(F.relu(y)))
        return m.conv(reflect(y.float()))

    report = explain(Net(mixed), torch.randn(2, 4, 12, 10))
    assert [site.precision for site in report.fused] == ["fp32", "bf16", "fp32"]


def autocast_on_a_gpu(norm: Any, then: torch.dtype) -> fx.GraphModule:
    """conv, norm and relu, read by a convolution and a sine, in the dtypes that a GPU's autocast gives."""
    graph, half, full = fx.Graph(), torch.float16, torch.float32

    def node(kind: str, dtype: torch.dtype, target: Any, args: Any, shape: tuple[int, ...]) -> Any:
        made = getattr(graph, kind)(target, *([args] if kind == "call_function" else []))
        made.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return made

    x, w, v = (
        node("placeholder", full, name, (), shape)
        for name, shape in (("x", (1, 8, 8, 8)), ("w", (8, 8, 3, 3)), ("v", (8,)))
    )
    small, wide = (1, 8, 8, 8), (1, 8, 10, 10)
    y = node("call_function", full, F.pad, (x, (1, 1, 1, 1), "reflect"), wide)
    y = node("call_function", half, torch.conv2d, (y, w, v), small)
    y = node("call_function", then, norm, (y, 4, v, v) if norm is F.group_norm else (y,), small)
    y = node("call_function", then, F.relu, (y,), small)
    z = node("call_function", then, F.pad, (y, (1, 1, 1, 1), "reflect"), wide)
    z = node("call_function", half, torch.conv2d, (z, w), small)
    graph.output((z, node("call_function", then, torch.sin, (y,), small)))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("extra", [True, False])
def test_a_norm_that_autocast_has_in_float32(extra):
    """On a GPU a group norm is one: others read float32 of it, convolutions 16 bits."""
    gm = autocast_on_a_gpu(F.group_norm, torch.float32)
    if not extra:
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        output.args = ((output.args[0][0],),)
        gm.graph.eliminate_dead_code()
    normalized = normalize(gm)
    decisions = plan(normalized, match(normalized), Options()).decisions
    assert [d.precision for d in decisions] == ["fp16", "fp16"]
    assert [d.finish for d in decisions] == (["here", "none"] if extra else ["deferred", "none"])
    out = rewrite(normalized, plan(normalized, match(normalized), Options()))(
        x := torch.randn(1, 8, 8, 8), w := torch.randn(8, 8, 3, 3), v := torch.randn(8)
    )
    assert [value.dtype for value in out] == [torch.float16, torch.float32][: 1 + extra]
    y = F.conv2d(reflect(x).half(), w.half(), v.half())
    y = F.relu(F.group_norm(y.float(), 4, v, v))
    assert relative_error(out[0], F.conv2d(reflect(y).half(), w.half())) < 2e-3
    if extra:
        assert relative_error(out[1], y.sin()) < 2e-3


def test_an_instance_norm_keeps_autocasts_16_bits_and_is_kept():
    normalized = normalize(autocast_on_a_gpu(F.instance_norm, torch.float16))
    with torch.autocast("cpu", torch.float16):  # outside of it eager would refuse the second convolution
        first, second = plan(normalized, match(normalized), Options()).decisions
    assert (first.finish, first.keep, first.outside, second.dtype) == ("deferred", True, (), torch.float16)
