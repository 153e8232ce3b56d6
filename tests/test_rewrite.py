"""Stage 4: the rewritten graph computes what the model does, and there is nothing left to rewrite."""

from __future__ import annotations

from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import MODES, SHAPE, Rewritten, found, fuse, hand, targets
from networks import FUSES, TANGLED, Net, block, reflect
from torch import Tensor, fx, nn

from sf_compile.backend import analyse
from sf_compile.graph.rewrite import rewrite
from sf_compile.options import Options

OPS = torch.ops.styleforge
PATTERNS = {name: case.patterns for name, case in FUSES.items()}
BODIES = {name: case.body for name, case in FUSES.items()} | {body.__name__: body for body in TANGLED}
# Eager has no gradient for these: they write into what the reflection pad keeps for its backward.
WRITTEN = ("mutated_between", "barrier_before_the_convolution")


def outputs(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def gradients(model: nn.Module, out: Any, x: Tensor) -> list[Tensor | None]:
    """Of a loss that weighs every output pixel differently, to the input and every parameter."""
    wanted = [o for o in outputs(out) if o.requires_grad]
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in wanted]
    inputs = [x, *model.parameters()]
    return list(torch.autograd.grad(wanted, inputs, weights, allow_unused=True))


def assert_equal(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Equal values, to ``tolerance`` of the largest one, and equal strides."""
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))
        assert a.stride() == b.stride()


def assert_equal_gradients(ours: list[Tensor | None], theirs: list[Tensor | None], tolerance: float) -> None:
    """A bias in front of a norm gets rounding noise from eager: the largest gradient is the measure."""
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


def assert_finished(rewritten: Rewritten) -> None:
    """No matched node is left, the graph is sound, and a second round finds and changes nothing."""
    module, analysis = rewritten.module, rewritten.analysis
    module.graph.lint()
    nodes = set(module.graph.nodes)
    assert all(step.node not in nodes for site in analysis.matches.sites for step in site.steps)
    again = analyse(module, rewritten.inputs, Options())
    assert again.matches.sites == () and again.plan.decisions == ()
    code = again.normalized.as_module().code
    assert rewrite(again.normalized, again.plan).code == code == module.code


@pytest.mark.parametrize("name", BODIES)
def test_values_and_gradients_are_eager_s(name):
    model = Net(BODIES[name])
    compiled, made = fuse(model)
    x = torch.randn(SHAPE, requires_grad=True)
    # Some bodies write into what they are given: neither a leaf, nor one tensor for both runs.
    ours, theirs = compiled(x * 1.0), model(x * 1.0)
    assert_equal(ours, theirs)
    if name not in WRITTEN:
        assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    (rewritten,) = made
    assert found(rewritten.analysis) == list(PATTERNS.get(name, found(rewritten.analysis))) != []
    assert_finished(rewritten)


@pytest.mark.parametrize(
    ("name", "mode", "dynamic"),
    [
        ("residual network", "no_grad", False),
        ("residual network", "inference_mode", True),
        ("U-Net", "no_grad", True),
        ("U-Net", "inference_mode", False),
        ("pre-activation", "no_grad", True),
        ("unknown_reader", "inference_mode", True),
    ],
)
def test_values_without_gradients(name, mode, dynamic):
    model = Net(BODIES[name])
    compiled, made = fuse(model, dynamic=dynamic)
    with MODES[mode]():
        x = torch.randn(SHAPE)
        assert_equal(compiled(x), model(x))
    assert_finished(made[0])


@pytest.mark.parametrize("name", ["called twice", "two consumers", "autocast_part", "inference_part"])
def test_gradients_with_dynamic_shapes(name):
    model, x = Net(BODIES[name]), torch.randn(SHAPE, requires_grad=True)
    compiled, made = fuse(model, dynamic=True)
    ours, theirs = compiled(x), model(x)
    assert_equal(ours, theirs)
    assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-4)
    assert_finished(made[0])


@pytest.mark.parametrize("name", ["residual network", "U-Net", "every step"])
def test_float64_agrees_to_its_own_digits(name):
    model, x = Net(BODIES[name]).double(), torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    compiled, _ = fuse(model)
    ours, theirs = compiled(x), model(x)
    assert_equal(ours, theirs, 1e-12)
    assert_equal_gradients(gradients(model, ours, x), gradients(model, theirs, x), 1e-11)


@pytest.mark.parametrize("layout", ["auto", "contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["U-Net", "two consumers", "relu only", "norm, add"])
def test_channels_last_input(name, layout):
    model, x = Net(BODIES[name]), torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    compiled, _ = fuse(model, options=Options(layout=layout))
    with torch.no_grad():
        assert_equal(compiled(x), model(x))


def test_gradient_of_a_bias_in_front_of_a_norm():
    model, x = Net(block), torch.randn(SHAPE)
    compiled, made = fuse(model)
    compiled(x).square().sum().backward()
    assert not any(decision.drop_bias for decision in made[0].analysis.plan.decisions)
    bias, weight = model.conv.bias.grad, model.conv.weight.grad
    assert bias is not None and bias.abs().max() <= 1e-4 * weight.abs().max()


def test_weights_and_running_statistics_are_read_at_every_call():
    model, x = Net(FUSES["running statistics"].body), torch.randn(SHAPE)
    compiled, made = fuse(model)
    with torch.no_grad():
        compiled(x)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
        assert_equal(compiled(x), model(x))
    assert len(made) == 1


def test_dynamo_s_graph_and_the_model_are_not_changed():
    model, x, seen = Net(BODIES["U-Net"]), torch.randn(SHAPE), []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        before = (gm.code, [(node.name, sorted(node.meta)) for node in gm.graph.nodes])
        analysis = analyse(gm, example_inputs, Options())
        module = rewrite(analysis.normalized, analysis.plan)
        seen.append((before, (gm.code, [(node.name, sorted(node.meta)) for node in gm.graph.nodes])))
        assert module is not gm
        return module.forward

    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.compile(model, backend=backend)(x)
    ((before, after),) = seen
    assert before == after
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def rewritten_by_hand(build: Any) -> tuple[fx.Graph, list[fx.Node]]:
    """The rewritten graph, equal to the original on random input, and its calls of ``styleforge`` ops."""
    gm, inputs = hand(build)
    with torch.no_grad():
        analysis = analyse(gm, inputs, Options())
        module = rewrite(analysis.normalized, analysis.plan)
        assert_equal(module(*inputs), gm(*inputs))
    return module.graph, [node for node in module.graph.nodes if "styleforge" in str(node.target)]


def test_one_call_a_convolution():
    def build(g, x, r, w, v):
        y = g.call_function(F.pad, (g.call_function(F.interpolate, (x,), {"scale_factor": 2}), (0, 1, 2, 3)))
        y = g.call_function(torch.conv2d, (y, w, v), {"stride": (2, 1), "padding": (1, 0)})
        y = g.call_method("relu", (g.call_function(F.instance_norm, (y, None, None, v, v), {"eps": 1e-3}),))
        return g.call_function(torch.conv2d, (g.call_function(F.pad, (y, (1, 1, 1, 1), "reflect")), w))

    graph, (first, second) = rewritten_by_hand(build)
    assert targets(graph) == [OPS.conv2d.default, getitem, getitem, getitem, OPS.conv2d.default, getitem]
    x, _, w, v, raw, mean, variance, _ = (
        node for node in graph.nodes if node.op == "placeholder" or node.target is getitem
    )
    nothing = (None, None, None, None, 1.0, "none", None)
    assert [node.args[1] for node in (raw, mean, variance)] == [0, 1, 2]
    assert first.args == (
        x, w, None, *nothing, 2, [0, 1, 3, 4], "zeros", [2, 1], "none", True, False, True, False, "auto",
        None, None,
    )  # fmt: skip
    assert second.args == (
        raw, w, None, mean, variance, v, v, 1e-3, "relu", None, 1, [1, 1, 1, 1], "reflect", [1, 1], "none",
        False, False, False, False, "auto", None, None,
    )  # fmt: skip


def test_kept_input_is_the_residual():
    def build(g, x, r, w, v):
        y = g.call_function(F.instance_norm, (g.call_function(torch.conv2d, (x, w, v)),))
        z = g.call_function(F.pad, (y, (1, 1, 1, 1), "reflect"))
        z = g.call_function(F.instance_norm, (g.call_function(torch.conv2d, (z, w, v)),))
        z = g.call_function(torch.add, (y, z))
        return g.call_function(torch.conv2d, (g.call_function(F.pad, (z, (1, 1, 1, 1), "replicate")), w, v))

    _, (first, second, third) = rewritten_by_hand(build)
    assert [node.target for node in (first, second, third)] == [OPS.conv2d.default] * 3
    assert [node.args[16] for node in (first, second, third)] == [False, True, False]  # keep_input
    residual = third.args[9]
    assert (residual.target, residual.args) == (getitem, (second, 3))


def test_norms_at_the_end_of_a_site():
    def build(g, x, r, w, v):
        own = g.call_function(F.instance_norm, (x, None, None, v))
        running = g.call_method("relu", (g.call_function(F.batch_norm, (r, v, v)),))
        conv = g.call_function(torch.conv2d, (x, w, v), {"padding": "same"})
        conv = g.call_function(torch.add, (r, g.call_function(F.instance_norm, (conv,))))
        return own, running, conv

    graph, nodes = rewritten_by_hand(build)
    assert [node.target for node in nodes] == [
        OPS.instance_norm.default, OPS.normalize.default, OPS.conv2d.default, OPS.normalize.default
    ]  # fmt: skip
    x, r, _, v = (node for node in graph.nodes if node.op == "placeholder")
    assert nodes[0].args == (x, v, None, 1e-5, "none", None, False)
    assert nodes[1].args == (r, v, v, None, None, 1e-5, "relu", None, False)
    assert nodes[3].args[-3:] == ("none", r, False)


def test_nodes_outside_the_sites_are_untouched():
    model = Net(lambda m, x: torch.tanh(m.norm(m.conv(reflect(x))).softmax(1)[:, :2]).flatten(1))
    compiled, made = fuse(model)
    x = torch.randn(SHAPE)
    assert_equal(compiled(x), model(x))
    others = [t for t in targets(made[0].module.graph) if "styleforge" not in str(t) and t is not getitem]
    assert others[0] == "softmax" and torch.tanh in others and "flatten" in others


def test_code_is_generated_once(monkeypatch):
    compiled, made = fuse(Net(block))
    compiled(torch.randn(SHAPE))
    times = []
    recompile = fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda self: times.append(self) or recompile(self))
    analysis = analyse(made[0].gm, made[0].inputs, Options())
    assert analysis.plan.decisions and not times
    assert rewrite(analysis.normalized, analysis.plan) is times[0] and len(times) == 1
