"""Stage 1: every spelling lands on the canonical one, and the copy computes what the original does."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import MODES, SHAPE, capture, fuse, hand, named, targets
from networks import Net, double, reflect
from torch import fx, nn
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.utils.checkpoint import checkpoint

from sf_compile.graph import spelling
from sf_compile.graph.normalize import normalize, writes
from sf_compile.graph.values import AUTOCAST

CONV2D, PAD, RELU, ADD = spelling.CONV2D, spelling.PAD, spelling.RELU, spelling.ADD
INTERPOLATE, INSTANCE_NORM, BATCH_NORM = spelling.INTERPOLATE, spelling.INSTANCE_NORM, spelling.BATCH_NORM


def checked(build: Any) -> tuple[fx.GraphModule, fx.GraphModule, Any]:
    """(original, copy, ``normalize``'s result), the original unchanged and the copy equal to it."""
    gm, inputs = hand(build)
    before = (gm.code, str(gm.graph), [dict(node.meta) for node in gm.graph.nodes])
    normalized = normalize(gm, inputs)
    assert before == (gm.code, str(gm.graph), [dict(node.meta) for node in gm.graph.nodes])
    ours, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
    copy = normalized.as_module()
    torch.testing.assert_close(copy(*ours), gm(*theirs), rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # in-place operations that were kept
    return gm, copy, normalized


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return (graph.call_method if isinstance(target, str) else graph.call_function)(target, args, kwargs)


def function(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a graph that returns ``target(...)``; the letters x, r, w, v name the inputs."""

    def build(graph: fx.Graph, x: fx.Node, r: fx.Node, w: fx.Node, v: fx.Node) -> fx.Node:
        nodes = {"x": x, "r": r, "w": w, "v": v}
        fill = lambda value: nodes.get(value, value) if isinstance(value, str) else value  # noqa: E731
        return call(graph, target, *map(fill, args), **{key: fill(value) for key, value in kwargs.items()})

    return build


CONV = ("x", "w", "v", (1, 1), (0, 0), (1, 1), 1)
SAME = ("x", "w", None, (1, 1), "same", (1, 1), 1)
INSTANCE = ("x", None, None, "v", None, True, 0.1, 1e-5)
BATCH = ("x", "v", "v", None, None, False, 0.1, 1e-5)
TWICE = ("x", None, 2, "nearest", None, None, False)
SIZED = ("x", (24, 20), None, "nearest", None, None, False)
SPELLINGS = [
    (CONV2D, CONV, function(torch.conv2d, "x", "w", "v")),
    (CONV2D, CONV, function(F.conv2d, input="x", weight="w", bias="v", stride=1, padding=[0, 0], dilation=1)),
    (CONV2D, SAME, function(torch.conv2d, "x", "w", padding="same")),
    (CONV2D, (*CONV[:3], (2, 1), (3, 3), (2, 2), 1), function(torch.conv2d, "x", "w", "v", [2, 1], 3, 2, 1)),
    (PAD, ("x", (1, 2, 0, 3), "reflect", None), function(F.pad, "x", [1, 2, 0, 3], mode="reflect")),
    (PAD, ("x", (1, 1, 1, 1), "replicate", None), function(PAD, "x", (1, 1, 1, 1), "replicate")),
    (PAD, ("x", (1, 1), "constant", 0.5), function(F.pad, "x", pad=(1, 1), value=0.5)),
    (INTERPOLATE, TWICE, function(F.interpolate, "x", scale_factor=2)),
    (INTERPOLATE, TWICE, function(F.interpolate, "x", None, 2, "nearest")),
    (INTERPOLATE, SIZED, function(F.interpolate, input="x", size=(24, 20))),
    (INTERPOLATE, (*SIZED[:3], "bilinear", False, None, True),
     function(F.interpolate, "x", (24, 20), mode="bilinear", align_corners=False, antialias=True)),
    (INSTANCE_NORM, INSTANCE, function(F.instance_norm, "x", weight="v")),
    (INSTANCE_NORM, ("x", "v", "v", None, None, False, 0.2, 1e-3),
     function(F.instance_norm, "x", "v", "v", use_input_stats=False, momentum=0.2, eps=1e-3)),
    (BATCH_NORM, BATCH, function(F.batch_norm, "x", "v", "v")),
    (BATCH_NORM, BATCH, function(F.batch_norm, input="x", running_var="v", running_mean="v", training=False)),
    (RELU, ("x",), function(torch.relu, "x")),
    (RELU, ("x",), function(F.relu, "x", inplace=False)),
    (RELU, ("x",), function("relu", "x")),
    (ADD, ("x", "r"), function(torch.add, "x", "r")),
    (ADD, ("x", "r"), function(torch.add, "x", other="r", alpha=1)),
    (ADD, ("x", "r"), function(operator.add, "x", "r")),
    (ADD, ("x", "r"), function("add", "x", "r")),
    (ADD, ("x", "r"), function("__add__", "x", "r")),
    (ADD, ("x", "r"), function("__radd__", "x", other="r")),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "build"), SPELLINGS)
def test_spelling_is_canonical(target, args, build):
    _, copy, normalized = checked(build)
    (node,) = (node for node in copy.graph.nodes if node.op.startswith("call"))
    assert (node.op, node.target, node.kwargs) == ("call_function", target, {})
    assert tuple(a.name if isinstance(a, fx.Node) else a for a in node.args) == args
    assert node in normalized.canonical


@pytest.mark.parametrize(
    ("module", "target"),
    [
        (nn.Conv2d(4, 4, 3, bias=False), CONV2D),
        (nn.ReflectionPad2d(1), PAD),
        (nn.ReplicationPad2d((1, 0, 2, 0)), PAD),
        (nn.ZeroPad2d(1), PAD),
        (nn.Upsample(scale_factor=2), INTERPOLATE),
        (nn.UpsamplingNearest2d(size=(24, 20)), INTERPOLATE),
        (nn.InstanceNorm2d(4), INSTANCE_NORM),
        (nn.BatchNorm2d(4).eval(), BATCH_NORM),
        (nn.ReLU(), RELU),
        (lambda x: x + x.clone(), ADD),
        (lambda x: x * 2 + double(x)[:, :, ::2, ::2], ADD),
    ],
)
def test_module_as_dynamo_spells_it(module, target):
    normalized = capture(module, torch.randn(SHAPE)).normalized
    assert [node.target for node in normalized.graph.nodes if node in normalized.canonical][-1] is target


@pytest.mark.parametrize(
    ("target", "kwargs"), [(F.relu, {"inplace": True}), (torch.relu_, {}), (F.relu_, {}), ("relu_", {})]
)
def test_inplace_relu_of_a_fresh_tensor(target, kwargs):
    def build(g, x, r, w, v):
        y = call(g, torch.conv2d, x, w, v)
        earlier = call(g, F.pad, y, (1, 1))
        call(g, target, y, **kwargs)
        # Written through its old name, the tensor is read again by a concatenation and the output.
        return earlier, call(g, torch.cat, [y, y]), y

    _, copy, normalized = checked(build)
    assert targets(copy.graph) == [CONV2D, PAD, RELU, torch.cat] and normalized.barriers == ()
    relu = next(node for node in copy.graph.nodes if node.target is RELU)
    assert named(copy.graph, "cat").args[0] == [relu, relu]
    assert named(copy.graph, "pad").args[0] is relu.args[0]
    assert named(copy.graph, "output").args[0][2] is relu


@pytest.mark.parametrize("target", [operator.iadd, "add_", "__iadd__"])
def test_inplace_add_of_a_fresh_tensor(target):
    def build(g, x, r, w, v):
        y = call(g, torch.relu, x)
        return call(g, target, y, r), y

    _, copy, normalized = checked(build)
    assert targets(copy.graph) == [RELU, ADD] and normalized.barriers == ()
    first, second = named(copy.graph, "output").args[0]
    assert first is second and first.target is ADD


def branch_first(m, x):
    x = m.skip(x)
    y = m.norm(m.conv(reflect(x)))
    y += x
    return y


def skip_first(m, x):
    x = m.skip(x)
    x += m.norm(m.conv(reflect(x)))
    return x


@pytest.mark.parametrize("body", [branch_first, skip_first])
@pytest.mark.parametrize("dynamic", [False, True])
def test_iadd_of_a_residual_either_way(body, dynamic):
    analysis = capture(Net(body), torch.randn(SHAPE), dynamic=dynamic)
    assert analysis.normalized.barriers == ()
    assert [site.pattern for site in analysis.matches.sites] == ["pad+conv+norm+add"]


def no_grad_between(g, x, r, w, v):
    y = call(g, torch.relu, x)
    call(g, torch._C._set_grad_enabled, False)
    call(g, "relu_", y)
    call(g, torch._C._set_grad_enabled, True)
    return y


# A graph in which the tensor written to may be seen by others, or the write is no known operation.
REFUSED = {
    "graph input": lambda g, x, r, w, v: (call(g, "relu_", x), x),
    "unknown producer": lambda g, x, r, w, v: call(g, "relu_", call(g, torch.sin, x)),
    "view method": lambda g, x, r, w, v: (
        y := call(g, RELU, x), call(g, "view", y, -1), call(g, "add_", y, r)
    ),
    "view function": lambda g, x, r, w, v: (
        y := call(g, RELU, x), call(g, operator.getitem, y, 0), call(g, operator.iadd, y, r)
    ),
    "two names of one tensor": lambda g, x, r, w, v: (
        y := call(g, RELU, x), call(g, "exp_", y), call(g, "add_", y, r)
    ),
    "scaled add_": lambda g, x, r, w, v: call(g, "add_", call(g, RELU, x), r, alpha=2),
    "written under no_grad": no_grad_between,
    "producer with out=": lambda g, x, r, w, v: (call(g, "relu_", call(g, torch.add, x, r, out=r)), r),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_inplace_is_kept(name):
    gm, copy, normalized = checked(REFUSED[name])
    wrote = [node.name for node in gm.graph.nodes if writes(node)]
    assert [node.name for node in normalized.barriers if writes(node)] == wrote != []
    assert all(named(copy.graph, name) not in normalized.canonical for name in wrote)


def test_inplace_under_no_grad_keeps_the_gradient():
    def body(m, x):
        y = m.norm(x)
        with torch.no_grad():
            y.relu_()
        return y * 2

    x, model = torch.randn(SHAPE, requires_grad=True), Net(body)
    compiled, made = fuse(model)
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    assert made and ours.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


torch.library.define("sf_tests::bump", "(Tensor(a!) x) -> ()")
WRITES = [
    ("call_method", "mul_", (2,), {}, True),
    ("call_method", "__setitem__", (0, 1.0), {}, True),
    ("call_method", "__itruediv__", (2,), {}, True),
    ("call_method", "__add__", (2,), {}, False),
    ("call_method", "sum", (), {}, False),
    ("call_function", operator.isub, (1,), {}, True),
    ("call_function", operator.setitem, (0, 1.0), {}, True),
    ("call_function", operator.getitem, (0,), {}, False),
    ("call_function", torch.sigmoid_, (), {}, True),
    ("call_function", torch.sigmoid, (), {}, False),
    ("call_function", torch.mul, (2,), {"out": 1}, True),
    ("call_function", F.leaky_relu, (0.2, True), {}, True),
    ("call_function", F.leaky_relu, (0.2,), {"inplace": True}, True),
    ("call_function", F.leaky_relu, (0.2,), {}, False),
    ("call_function", F.leaky_relu, (0.2,), {"no such argument": True}, False),
    ("call_function", torch.ops.aten.mul_.Tensor, (2,), {}, True),
    ("call_function", torch.ops.aten.mul.Tensor, (2,), {}, False),
    ("call_function", torch.ops.aten.relu, (), {}, False),
    ("call_function", torch.ops.sf_tests.bump, (), {}, True),
    ("call_function", triton_kernel_wrapper_mutation, (), {}, True),
    ("call_module", "layer", (), {}, True),
    ("placeholder", "y_", (), {}, False),
]


@pytest.mark.parametrize(("op", "target", "args", "kwargs", "expected"), WRITES)
def test_writes(op, target, args, kwargs, expected):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.create_node(op, target, () if op == "placeholder" else (x, *args), kwargs)
    assert writes(node) is expected


def regions(m, x):
    y = m.norm(m.same(x))
    with torch.no_grad():
        y = y * 2
    with torch.inference_mode():
        z = x * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.same(y)
        with torch.autocast("cpu", enabled=False):
            y = torch.sin(y.float())
    return torch.cos(y), z


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_mode_switches_are_barriers(dynamic, mode):
    with MODES[mode]():
        normalized = capture(Net(regions), torch.randn(SHAPE), dynamic=dynamic).normalized
    names = [node.name.rstrip("_0123456789") for node in normalized.barriers]
    assert names.count("_enter_autocast") == 2
    assert ("_enter_inference_mode" in names and "_exit_inference_mode" in names) or mode == "inference_mode"
    assert ("_set_grad_enabled" in names) == (mode == "grad")
    inside = [node.target for node in normalized.graph.nodes if AUTOCAST in node.meta]
    assert CONV2D in inside and torch.sin in inside
    assert torch.cos not in inside and INSTANCE_NORM not in inside


@pytest.mark.parametrize(
    "build",
    [
        function(operator.sub, 1, "x"),
        function(torch.mul, "x", "r"),
        function(torch.div, "x", 2, rounding_mode="floor"),
        function(torch.add, "x", "r", alpha=2),
        function(torch.add, "r", 1, out="r"),
        lambda g, x, r, w, v: call(g, torch.add, x, call(g, "sum", r, 3, True)),
        lambda g, x, r, w, v: call(g, operator.add, x, call(g, "double", r)),
        lambda g, x, r, w, v: call(g, operator.add, call(g, "size", x, 2), 1),
    ],
)
def test_other_additions_are_not_canonical(build):
    gm, copy, normalized = checked(build)
    assert normalized.canonical == frozenset() and str(copy.graph) == str(gm.graph)


def test_graph_without_values_is_copied_as_it_is():
    gm, _ = hand(function(torch.conv2d, "x", "w", "v"))
    normalized = normalize(gm)
    assert normalized.canonical == frozenset() and str(normalized.graph) == str(gm.graph)
    assert normalized.as_module() is not gm and normalized.graph is not gm.graph


@pytest.mark.parametrize("dynamic", [False, True])
def test_checkpointed_part_is_left_whole(dynamic):
    def body(m, x):
        return checkpoint(lambda y: m.norm(m.same(y)), m.plain(m.same(x)), use_reentrant=False)

    analysis = capture(Net(body), torch.randn(SHAPE), dynamic=dynamic)
    assert [site.pattern for site in analysis.matches.sites] == ["conv+norm"]
