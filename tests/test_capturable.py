"""Which graphs of Dynamo can be captured, by what is in them."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from sf_compile.backend import analyse, capture_of, compile_graph, styleforge
from sf_compile.graph import capturable
from sf_compile.graph.break_even import LargeEnough
from sf_compile.graph.normalize import normalize
from sf_compile.models import TransformerNet
from sf_compile.options import Options
from sf_compile.runtime.out_of_memory import Explained


def conv(x, weight):
    return F.relu(F.instance_norm(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight)))


def graph_on(function, *shapes, device="cuda", dtype=torch.float16):
    """Dynamo's graph of a function of tensors, as if these lay on ``device``."""
    found = []

    def backend(gm, inputs):
        found.append(gm)
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.dim():
                with FakeTensorMode(allow_non_fake_inputs=True):
                    node.meta["example_value"] = torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device=device
                    )
        return gm.forward

    torch.compile(function, backend=backend)(*(torch.rand(shape) for shape in shapes))
    return found[0]


def refusal(function, *shapes, **where):
    return capturable.refusal(normalize(graph_on(function, *shapes, **where)))


PICTURE, WEIGHT = (1, 3, 8, 9), (4, 3, 3, 3)


def test_an_ordinary_graph_can_be_captured():
    assert refusal(conv, PICTURE, WEIGHT) is None


def test_a_graph_on_the_cpu_cannot():
    assert refusal(conv, PICTURE, WEIGHT, device="cpu").endswith("is on the CPU")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: (x.mul_(2), conv(x, w))[1], "may write to an input"),
        (lambda x, w: (x[0].add_(2), conv(x, w))[1], "may write to an input"),
        (lambda x, w: (x.view(-1).zero_(), conv(x, w))[1], "may write to an input"),
        (lambda x, w: (x.__setitem__(0, 1.0), conv(x, w))[1], "may write to an input"),
        (lambda x, w: (torch.add(x, 1, out=x), conv(x, w))[1], "may write to an input"),
        (lambda x, w: (conv(x, w) * 2).mul_(3), None),
        (lambda x, w: F.relu(conv(x, w), inplace=True), None),
    ],
)
def test_writing_is_for_tensors_of_its_own(function, reason):
    found = refusal(function, PICTURE, WEIGHT)
    assert found is None if reason is None else reason in found


def test_an_operation_that_waits_is_named():
    class Waits(nn.Module):
        def forward(self, x, w):
            return conv(x, w) * torch.unique(x).shape[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = refusal(Waits(), PICTURE, WEIGHT)
    assert found is not None and ("depends on numbers in a tensor" in found or "waits for the GPU" in found)


def test_parameters_and_buffers_are_bound():
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    gm = graph_on(net, PICTURE)
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    bound = capturable.bound(gm.graph)
    assert len(names) - len(bound) == 1
    assert any("running_mean" in names[i] for i in bound) and any("weight" in names[i] for i in bound)


def test_what_the_backend_makes_of_it(caplog):
    gm = graph_on(conv, PICTURE, WEIGHT, device="cpu")
    inputs = [torch.rand(PICTURE), torch.rand(WEIGHT)]
    on = Options(cuda_graphs=True)
    assert capture_of(analyse(gm, inputs, Options()), Options()).refusal == "not asked for"
    assert "is on the CPU" in str(capture_of(analyse(gm, inputs, on), on))
    with caplog.at_level(logging.WARNING, "sf_compile.backend"):
        run = compile_graph(gm, inputs, on)
        assert isinstance(run, LargeEnough) and isinstance(run.fused, Explained)
    assert [r.name for r in caplog.records if "no CUDA graph: " in r.message] == ["sf_compile.backend"]
    plain = graph_on(lambda x: x + 1, PICTURE)
    assert capture_of(analyse(plain, [], on), on).refusal == "nothing is fused, and the graph runs as it came"


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_on_a_cpu_the_modes_run_plainly(mode):
    net, x = TransformerNet(4, 1).eval(), torch.rand(1, 3, 16, 12)
    compiled = torch.compile(net, backend=styleforge, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(compiled(x), net(x), atol=1e-4)
