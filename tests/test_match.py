"""Stage 2: what is fused, what is left alone and why. Live Dynamo graphs, and graphs built by hand."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import MODES, SHAPE, capture, found, fuse, hand
from networks import FUSES, Net, autocast_part, block, double, grad_switched_inside, mutated_between, reflect
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sf_compile.backend import analyse
from sf_compile.graph import norm_patterns as norms
from sf_compile.graph import patterns
from sf_compile.graph.match import match
from sf_compile.graph.normalize import normalize
from sf_compile.graph.rewrite import rewrite
from sf_compile.graph.values import Miss
from sf_compile.options import Options


# Each once more with static shapes, in grad mode, in test_rewrite.py; the largest at five sizes below.
@pytest.mark.parametrize("name", [name for name in FUSES if name != "residual network"])
def test_fuses(name):
    with torch.no_grad():
        analysis = capture(Net(FUSES[name].body), torch.randn(SHAPE), dynamic=True)
    assert tuple(found(analysis)) == FUSES[name].patterns
    nodes = [step.node for site in analysis.matches.sites for step in site.steps]
    assert len(nodes) == len(set(nodes)), "a node belongs to two sites"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["every step", "U-Net"])
def test_fuses_in_every_grad_mode(name, mode, dynamic):
    with MODES[mode]():
        analysis = capture(Net(FUSES[name].body), torch.randn(SHAPE), dynamic=dynamic)
    assert tuple(found(analysis)) == FUSES[name].patterns


def test_a_site_describes_itself():
    (site,) = capture(Net(FUSES["every step"].body), torch.randn(SHAPE)).matches.sites
    kinds = ["Upsample", "Pad", "Conv", "Norm", "Activate", "Add"]
    assert [type(step).__name__ for step in site.steps] == kinds
    assert (site.upsample.factor, site.pad.padding, site.pad.mode) == (2, (1, 1, 1, 1), "reflect")
    assert (site.conv.stride, site.conv.padding, site.norm.mean) == ((1, 1), (0, 0), None)
    assert site.anchor is site.conv.node and site.output is site.add.node
    assert site.input.op == "placeholder" and site.add.residual.target is F.interpolate
    assert repr(site).startswith("upsample+pad+conv+norm+relu+add[interpolate ")


def training(norm: type[nn.Module]) -> Any:
    layer = norm(4, track_running_stats=True)
    return lambda m, x: layer(m.conv(reflect(x)))


# body, the reason given, and the patterns found all the same
SKIPS = {
    "bilinear": (
        lambda m, x: m.same(F.interpolate(x, scale_factor=2, mode="bilinear")), "mode 'bilinear'", []
    ),
    "nearest-exact": (
        lambda m, x: m.norm(m.same(F.interpolate(x, scale_factor=2, mode="nearest-exact"))),
        "only nearest is an index map", ["conv+norm"],
    ),
    "recomputed scale": (
        lambda m, x: m.same(F.interpolate(x, scale_factor=2, recompute_scale_factor=True)),
        "recompute_scale_factor", [],
    ),
    "scale 1.5": (
        lambda m, x: m.conv(reflect(F.interpolate(x, scale_factor=1.5))), "whole number", ["pad+conv"]
    ),
    "scale 2.05": (lambda m, x: m.same(F.interpolate(x, scale_factor=2.05)), "whole number", []),
    "scale 9": (lambda m, x: m.same(F.interpolate(x, scale_factor=9)), "whole number of 2 to 8", []),
    "two scales": (lambda m, x: m.same(F.interpolate(x, scale_factor=(2, 3))), "whole number", []),
    "downsampled": (lambda m, x: m.same(F.interpolate(x, size=(6, 5))), "whole number", []),
    "circular": (
        lambda m, x: m.norm(m.conv(F.pad(x, (1, 1, 1, 1), "circular"))), "mode 'circular'", ["conv+norm"]
    ),
    "padded with ones": (
        lambda m, x: m.norm(m.conv(F.pad(x, (1, 1), value=1.0))), "the value 1.0", ["conv+norm"]
    ),
    "padded channels": (
        lambda m, x: m.skip(F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:5]), "padding of 3 dimensions", []
    ),
    "crop": (lambda m, x: m.norm(m.conv(F.pad(x, (-1, 1, 0, 0)))), "negative padding", ["conv+norm"]),
    "pad of a tensor of 3": (lambda m, x: m.same(F.pad(x[0], (1, 1))[None]), "padding of a 3-dim", []),
    "reflection before zeros": (
        lambda m, x: m.norm(m.same(reflect(x))), "reflect padding in front", ["conv+norm"]
    ),
    "pad with two readers": (
        lambda m, x: (y := reflect(x), m.norm(m.conv(y))), "also read by output", ["conv+norm"]
    ),
    "pad of two convolutions": (
        lambda m, x: (y := reflect(x), m.norm(m.conv(y)) + m.conv(y))[1], "also read by conv2d_1",
        ["conv+norm+add"],
    ),
    "upsampling with two readers": (
        lambda m, x: (y := double(x), m.norm(m.conv(reflect(y)))), "also read by output", ["pad+conv+norm"]
    ),
    "pad not before a convolution": (lambda m, x: m.norm(reflect(x)), "its reader is not a conv", ["norm"]),
    "upsampling not before a convolution": (
        lambda m, x: m.norm(double(x)), "its reader is not a conv", ["norm"]
    ),
    "groups": (
        lambda m, x: m.norm(F.conv2d(reflect(x), m.conv.weight[:, :1], groups=4)), "(groups=4)", ["norm"]
    ),
    "dilation": (
        lambda m, x: m.norm(F.conv2d(reflect(x), m.conv.weight, dilation=2)), "dilation=(2, 2)", ["norm"]
    ),
    "same padding, even kernel": (
        lambda m, x: m.norm(F.conv2d(x, m.conv.weight[:, :, :2], padding="same")), "an even kernel", ["norm"]
    ),
    "no batch dimension": (lambda m, x: m.plain(m.same(x[0])[None]), "convolution of a 3-dim", ["norm"]),
    "instance norm in 1-d": (lambda m, x: F.instance_norm(x[0]), "instance norm of a 3-dim", []),
    "batch norm of vectors": (
        lambda m, x: F.batch_norm(x[:, :, 0, 0], m.batch.running_mean, m.batch.running_var),
        "batch norm of a 2-dim", [],
    ),
    "plain convolution": (lambda m, x: F.relu(m.same(x)) + x, "nothing around it", []),
    "training batch norm": (training(nn.BatchNorm2d), "batch norm in training", ["pad+conv"]),
    "training instance norm": (training(nn.InstanceNorm2d), "updates its running statistics", ["pad+conv"]),
    "doubled": (lambda m, x: (y := m.norm(m.same(x)), y + y)[1], "adds a tensor to itself", ["conv+norm"]),
    "written in between": (mutated_between, "exp_ writes in place", ["conv+norm+add"]),
    "grad switched": (
        grad_switched_inside, "_set_grad_enabled_1 writes in place, or switches",
        ["pad+conv", "norm", "conv+norm"],
    ),
}  # fmt: skip


SIZED = ("scale 2.05", "two scales", "pad with two readers", "grad switched")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    ("name", "dynamic"), [(name, False) for name in SKIPS] + [(name, True) for name in SIZED]
)
def test_skips(name, dynamic):
    body, reason, remain = SKIPS[name]
    analysis = capture(Net(body), torch.randn(SHAPE), dynamic=dynamic)
    reasons = [miss.reason for miss in analysis.matches.misses]
    assert any(reason in given for given in reasons), reasons
    assert found(analysis) == remain
    fused = {step.node.name for site in analysis.matches.sites for step in site.steps}
    assert not fused & {miss.node for miss in analysis.matches.misses}


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_takes_nothing_from_a_site(dynamic):
    assert found(capture(Net(autocast_part), torch.randn(SHAPE), dynamic=dynamic)) == [
        "pad+conv+norm", "norm", "pad+conv"
    ]  # fmt: skip


def test_autocast_that_is_already_on():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        analysis = capture(Net(block), torch.randn(SHAPE))
    # The addition is of a float32 picture: it is PyTorch's, and float32.
    assert found(analysis) == ["pad+conv+norm+relu", "pad+conv+norm"]
    assert not analysis.matches.misses


def full_chain(g: fx.Graph, x: fx.Node, r: fx.Node, w: fx.Node, v: fx.Node) -> fx.Node:
    y = g.call_function(F.interpolate, (x,), {"scale_factor": 2.0})
    y = g.call_function(F.pad, (y, (2, 2, 2, 2)), {"mode": "replicate"})
    y = g.call_function(F.conv2d, (y, w, v), {"stride": 2})
    y = g.call_function(F.batch_norm, (y, v, v))
    return g.call_function(operator.add, (r, g.call_method("relu_", (y,))))


@pytest.mark.parametrize("symbolic", [False, True])
def test_graph_built_by_hand(symbolic):
    gm, inputs = hand(full_chain)
    inputs[1] = torch.randn(2, 4, 13, 11)
    if symbolic:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = [mode.from_tensor(x, static_shapes=x.dim() < 4 or x.shape[3] == 3) for x in inputs]
        assert isinstance(inputs[0].shape[3], torch.SymInt)
    (site,) = match(normalize(gm, inputs)).sites
    assert site.pattern == "upsample+pad+conv+norm+relu+add" and site.add.residual.name == "r"
    assert match(normalize(gm)).sites == ()  # nothing is known of its tensors


# The regions around a convolution, as (device, enabled), and whether it is multiplied at all.
REGIONS = [
    ((), False),
    ((("cpu", True),), True),
    ((("cuda", True),), False),
    ((("cpu", True), ("cuda", False)), True),
    ((("cpu", True), ("cpu", False)), False),
]


@pytest.mark.parametrize(("regions", "multiplied"), REGIONS)
def test_what_only_autocast_brings_to_one_dtype(regions, multiplied):
    """A shape may be recorded of a convolution that eager refuses, as PyTorch 2.11 does for a GPU's."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    modes = [
        graph.call_function(torch.amp.autocast_mode._enter_autocast, (device, torch.bfloat16, on, None))
        for device, on in regions
    ]
    padded = graph.call_function(F.pad, (x, (1, 1, 1, 1)), {"mode": "reflect"})
    y = graph.call_function(F.conv2d, (padded, w))
    for mode in reversed(modes):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
    graph.output(y)
    x.meta["example_value"] = y.meta["example_value"] = torch.empty(SHAPE, dtype=torch.bfloat16)
    padded.meta["example_value"] = torch.empty(2, 4, 14, 12, dtype=torch.bfloat16)
    w.meta["example_value"] = torch.empty(4, 4, 3, 3, dtype=torch.float16)
    matches = match(normalize(fx.GraphModule({}, graph)))
    assert [site.pattern for site in matches.sites] == (["pad+conv"] if multiplied else [])
    reason = "convolution that mixes dtypes: torch.bfloat16, torch.float16"
    assert (reason in [miss.reason for miss in matches.misses]) is not multiplied


PICTURE, VECTOR, WEIGHT = torch.empty(SHAPE), torch.empty(4), torch.empty(4, 4, 3, 3)
TWICE = torch.empty(2, 4, 24, 20)
AS_IS = ((1, 1), (0, 0), (1, 1), 1)
NORMED = ("x", None, None, None, None, True, 0.1, 1e-5)
# rule, arguments (letters name nodes), the recorded output, the reason
RULES = [
    (patterns.conv, ("x", "w", None, *AS_IS), None, "convolution without a recorded shape"),
    (patterns.conv, ("x", "w", None, *AS_IS), PICTURE.to(torch.int8), "convolution in torch.int8"),
    (patterns.conv, ("x", "w", None, *AS_IS), PICTURE.to("meta"), "convolution on device 'meta'"),
    (patterns.conv, ("x", "w", None, *AS_IS), PICTURE.to_sparse(), "of a torch.sparse_coo tensor"),
    (patterns.conv, ("x", None, None, *AS_IS), PICTURE, "without a weight in the graph"),
    (patterns.conv, ("x", "u", None, *AS_IS), PICTURE, "of something without a recorded shape"),
    (patterns.conv, ("x", "h", None, *AS_IS), PICTURE, "mixes dtypes: torch.bfloat16, torch.float32"),
    (patterns.conv, ("x", "w", None, "u", *AS_IS[1:]), PICTURE, "stride u is not a constant"),
    (patterns.conv, ("x", "w", None, (1, 1), "u", (1, 1), 1), PICTURE, "padding u is not a constant"),
    (patterns.conv, ("x", "w", None, (1, 1), (0, 0), (1, 1), "u"), PICTURE, "grouped convolution"),
    (patterns.pad, ("x", "u", "reflect", None), PICTURE, "not constants"),
    (patterns.pad, ("x", (1, "u", 1, 1), "reflect", None), PICTURE, "not constants"),
    (patterns.pad, ("x", (1, 1, 1, 1), "reflect", None), PICTURE[0], "padding of a 3-dimensional tensor"),
    (patterns.upsample, ("x", None, 2, "nearest", None, None, False), PICTURE[0, 0], "2-dimensional"),
    (patterns.upsample, ("x", None, 2, "nearest", None, None, True), PICTURE, "antialias"),
    (patterns.upsample, ("x", None, "u", "nearest", None, None, False), TWICE, "whole number"),
    (norms.instance_norm, (*NORMED[:5], "u", 0.1, 1e-5), PICTURE, "use_input_stats is not a constant"),
    (norms.instance_norm, ("x", "v", "v", None, None, True, 0.1, 1e-5), PICTURE, "updates its running"),
    (norms.instance_norm, NORMED, PICTURE.bfloat16(), "instance norm that changes the dtype"),
    (norms.batch_norm, ("x", None, None, None, None, False, 0.1, 1e-5), PICTURE, "batch norm in training"),
    (norms.batch_norm, ("x", "v", "v", None, None, "u", 0.1, 1e-5), PICTURE, "batch norm in training"),
]


@pytest.mark.parametrize(("rule", "args", "out", "reason"), RULES)
def test_rule_says_why_not(rule, args, out, reason):
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xwvhu"}  # u: nothing is recorded of it
    for name, value in zip("xwvh", (PICTURE, WEIGHT, VECTOR, WEIGHT.bfloat16()), strict=True):
        nodes[name].meta["example_value"] = value

    def fill(value: Any) -> Any:
        return tuple(map(fill, value)) if isinstance(value, tuple) else nodes.get(value, value)

    node = graph.call_function(rule, fill(args))
    if out is not None:  # (None: nothing was recorded)
        node.meta["example_value"] = out
    miss = rule(node)
    assert isinstance(miss, Miss) and miss.node == node.name
    assert reason in miss.reason


@pytest.mark.parametrize("name", ["residual block", "U-Net", "upsample by size", "upsample by module"])
def test_dynamic_shapes_get_no_guard_from_the_pipeline(name):
    added = []

    def backend(gm, example_inputs):
        environment = torch._guards.TracingContext.get().fake_mode.shape_env
        before = len(environment.guards)
        analysis = analyse(gm, example_inputs, Options())
        module = rewrite(analysis.normalized, analysis.plan)
        added.append(len(environment.guards) - before)
        return module.forward

    torch.compile(Net(FUSES[name].body), backend=backend, dynamic=True)(torch.randn(SHAPE))
    assert added == [0]


@pytest.mark.parametrize(
    ("name", "dynamic"), [("residual network", True), ("U-Net", None), ("two consumers", None)]
)
def test_five_sizes_cost_at_most_three_graphs(name, dynamic):
    model = Net(FUSES[name].body)
    compiled, made = fuse(model, dynamic=dynamic)
    with torch.no_grad():
        for size in ((12, 8), (16, 8), (8, 20), (24, 12), (20, 28)):
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(made) <= 3
    assert all(tuple(found(rewritten.analysis)) == FUSES[name].patterns for rewritten in made)
