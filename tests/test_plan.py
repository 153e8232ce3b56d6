"""Stage 3: where each norm happens, in which layout, and which bias is left out."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from graphs import MODES, SHAPE, capture, hand
from networks import FUSES, Net, block, preactivation, reflect

from sf_compile.backend import analyse
from sf_compile.graph.plan import Plan, describe
from sf_compile.options import Options


def planned(body, mode="no_grad", layout="auto", x=None, dynamic=None) -> Plan:
    with MODES[mode]():
        x = torch.randn(SHAPE) if x is None else x
        return capture(Net(body), x, dynamic=dynamic, options=Options(layout=layout)).plan


HERE, LATER = "normalised at its end: ", "normalised on the way into "
OWN = "its output is the convolution's own"
NOBODY = HERE + "no fused convolution reads it"
# body, and for each site in order: finish, deferred_to, keep, why
DEFERRALS = {
    "to the next convolution": (
        FUSES["called twice"].body,
        [("deferred", 1, False, LATER + "conv2d_1"), ("here", None, False, NOBODY)],
    ),
    "kept for a residual": (
        lambda m, x: block(m, m.plain(m.conv(reflect(x)))),
        [("deferred", 1, True, LATER + "conv2d_1, and kept"), ("deferred", 2, False, LATER + "conv2d_2"),
         ("here", None, False, NOBODY)],
    ),
    "kept for a second convolution": (
        networks.read_by_two_convolutions,
        [("deferred", 1, True, LATER + "conv2d_1, and kept"), ("deferred", 2, False, LATER + "conv2d_2"),
         ("none", None, False, OWN), ("here", None, False, NOBODY)],
    ),
    "of a norm without a convolution": (
        preactivation, [("deferred", 1, False, LATER + "conv2d"), ("here", None, False, NOBODY)],
    ),
    "of a norm with running statistics": (
        networks.running_norm_on_the_way_in,
        [("deferred", 1, False, LATER + "conv2d"), ("none", None, False, OWN)],
    ),
    "not of a convolution without a norm": (FUSES["reflect"].body, [("none", None, False, OWN)]),
    "an unknown operation reads it first": (
        networks.unknown_reader,
        [("here", None, False, HERE + "sigmoid reads it before conv2d_1"), ("here", None, False, NOBODY)],
    ),
    "an unknown operation reads it later": (
        networks.reader_after_the_convolution,
        [("deferred", 1, True, LATER + "conv2d_1, and kept"), ("none", None, False, OWN)],
    ),
    "a later reader wants another layout": (
        networks.reader_in_another_layout,
        [("here", None, False, HERE + "sigmoid reads it in another layout"),
         ("deferred", 2, False, LATER + "conv2d_2"), ("here", None, False, NOBODY)],
    ),
    "a write lies between": (
        networks.barrier_before_the_convolution,
        [("here", None, False, HERE + "mul_ lies between it and conv2d_1"), ("none", None, False, OWN)],
    ),
    "a mode switch lies between": (
        networks.mode_switch_before_the_convolution,
        [("here", None, False, HERE + "_enter_autocast lies between it and conv2d_1"),
         ("none", None, False, OWN)],
    ),
    "on the way into a plain convolution": (
        networks.read_by_a_plain_convolution,
        [("deferred", 1, False, LATER + "conv2d_1"), ("none", None, False, OWN)],
    ),
    "its reader is not fused": (
        lambda m, x: torch.sigmoid(F.relu(m.norm(m.conv(reflect(x))))), [("here", None, False, NOBODY)]
    ),
}  # fmt: skip


SIZED = ("kept for a residual", "an unknown operation reads it later", "a mode switch lies between")


@pytest.mark.parametrize(
    ("name", "dynamic"), [(name, False) for name in DEFERRALS] + [(name, True) for name in SIZED]
)
def test_where_the_norm_happens(name, dynamic):
    body, expected = DEFERRALS[name]
    decisions = planned(body, dynamic=dynamic).decisions
    assert [(d.finish, d.deferred_to, d.keep, d.why) for d in decisions] == expected


OPS = {
    "norm": ["styleforge::instance_norm"],
    "batch norm, relu": ["styleforge::instance_norm", "styleforge::normalize"],
    "pre-activation": ["styleforge::instance_statistics", "styleforge::conv2d"],
    "residual block": ["styleforge::conv2d", "styleforge::conv2d"],
}


@pytest.mark.parametrize("name", OPS)
def test_ops(name):
    assert [decision.op for decision in planned(FUSES[name].body).decisions] == OPS[name]


# x is read by the first convolution and added at the end: block's first output alone stays inside.
@pytest.mark.parametrize(
    ("dtype", "layout", "inside"),
    [
        (torch.float32, "auto", True),
        (torch.bfloat16, "auto", True),
        (torch.float64, "auto", False),
        (torch.float32, "contiguous", False),
        (torch.bfloat16, "contiguous", False),
        (torch.float64, "channels_last", True),
    ],
)
def test_layout_inside_a_region_and_at_its_border(dtype, layout, inside):
    with torch.inference_mode():
        model, x = Net(block).to(dtype), torch.randn(SHAPE, dtype=dtype)
        decisions = capture(model, x, options=Options(layout=layout)).plan.decisions
    assert [decision.channels_last for decision in decisions] == [inside, False]


@pytest.mark.parametrize("layout", ["auto", "contiguous", "channels_last"])
@pytest.mark.parametrize("body", [FUSES["own padding"].body, FUSES["stride"].body, FUSES["relu only"].body])
def test_border_has_eager_strides(body, layout):
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    (decision,) = planned(body, layout=layout, x=x).decisions
    with torch.no_grad():
        eager = Net(body)(x)
    assert decision.channels_last == (not eager.is_contiguous())


def test_concatenated_tensors_keep_eager_strides():
    decisions = planned(FUSES["U-Net"].body, layout="channels_last").decisions
    assert [decision.channels_last for decision in decisions] == [False, False, False]


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("residual block", [True, True]),
        ("batch norm in eval", [False]),
        ("running statistics", [False]),
        ("reflect", [False]),
        ("kernel of 1", [False]),  # it has no bias
        ("norm", [False]),
    ],
)
@pytest.mark.parametrize("mode", ["grad", "inference_mode"])
def test_bias_is_dropped_only_where_nobody_can_tell(name, dropped, mode):
    decisions = planned(FUSES[name].body, mode).decisions
    expected = [False] * len(dropped) if mode == "grad" else dropped
    assert [decision.drop_bias for decision in decisions] == expected


def test_frozen_bias_is_dropped_in_grad_mode():
    model = Net(block).requires_grad_(False)
    decisions = capture(model, torch.randn(SHAPE, requires_grad=True)).plan.decisions
    assert [decision.drop_bias for decision in decisions] == [True, True]


def test_plan_prints_as_a_table():
    plan = planned(block)
    lines = str(plan).splitlines()
    assert len(lines) == 2
    words = "conv2d pad+conv+norm+relu styleforge::conv2d channels_last fp32 " + LATER + "conv2d_1"
    assert lines[0].split() == words.split()
    assert lines[1].startswith("conv2d_1 ") and "contiguous" in lines[1] and NOBODY in lines[1]
    assert str(Plan(())) == "(nothing to fuse)"


def test_decision_as_plain_data():
    first, _ = planned(block).decisions
    assert describe(first) == {
        "op": "styleforge::conv2d",
        "finish": "deferred",
        "layout": "channels_last",
        "precision": "fp32",
        "why": LATER + "conv2d_1",
    }


def test_graph_built_by_hand():
    def build(g, x, r, w, v):
        y = g.call_function(F.instance_norm, (g.call_function(torch.conv2d, (x, w, v)),))
        z = g.call_function(F.instance_norm, (g.call_function(torch.conv2d, (y, w)),))
        return g.call_method("relu", (z,))

    gm, inputs = hand(build)
    plan = analyse(gm, inputs, Options()).plan
    assert [(d.finish, d.drop_bias) for d in plan.decisions] == [("deferred", True), ("here", False)]
    assert [d.channels_last for d in plan.decisions] == [True, False]
