"""Runs of fused ops as one call, on live graphs."""

from __future__ import annotations

import logging

import pytest
import torch
from graphs import capture, named, rewritten_graph
from networks import Net, reflect
from torch import fx, nn

import sf_compile
from sf_compile.backend import styleforge
from sf_compile.graph.regions import Region, group
from sf_compile.models import TransformerNet
from sf_compile.options import Options


def regions_of(model, x, **options):
    """The rewritten graph of ``model`` and its regions, in the current grad mode."""
    return rewritten_graph(capture(model, x), Options(**options))


def calls(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op.startswith("call")]


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 255


def test_a_transformer_net_is_one_region():
    model, x = TransformerNet(8).eval(), picture(1, 3, 16, 20)
    with torch.no_grad():
        gm, regions = regions_of(model, x)
    (region,) = regions
    assert len(region.sites) == len(set(region.sites)) == 16
    assert sum("styleforge.conv2d" in call for call in calls(region.inner.graph)) == 6
    assert sum("styleforge.residual_trunk" in call for call in calls(region.inner.graph)) == 1
    assert calls(gm.graph)[0] == "region_0" and len(calls(gm.graph)) == 2  # and what is taken of the tuple
    assert gm.region_0 is region
    sites = ", ".join(region.sites)
    assert str(region) == f"7 ops in one call, of {sites}" and sites.startswith("conv2d, conv2d_1, ")


def two_runs(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.plain(m.conv(reflect(torch.relu(m.norm(m.conv(reflect(x)))))))
    y = torch.cat((y, torch.sigmoid(x)), 1)[:, :4]
    return torch.relu(m.norm(m.conv(reflect(m.plain(m.conv(reflect(y)))))))


def side_results(m: Net, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.relu(m.norm(m.conv(reflect(x))))
    z = m.plain(m.conv(reflect(y))) + y
    return z, y, torch.sigmoid(y)


def one_op(m: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(torch.relu(m.norm(torch.sigmoid(x))))


def style_between(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Adaptive norms, whose scales a layer makes of a style that is there from the beginning."""
    style, y = x.mean((2, 3)), torch.relu(m.norm(m.conv(reflect(x))))
    for _ in range(2):
        scale = torch.tanh(style @ m.skip.weight[:, :, 0, 0]).view(-1, 4, 1, 1)
        y = m.plain(m.conv(reflect(y))) * scale + scale
    return m.conv(reflect(y))


def written_between(m: Net, x: torch.Tensor) -> torch.Tensor:
    """What is made of a tensor before and after a write into it."""
    y, style = torch.relu(m.norm(m.conv(reflect(x)))), x * 2
    y = m.plain(m.conv(reflect(y))) * style.mean((2, 3), keepdim=True)
    style.view(-1).mul_(2)
    return m.plain(m.conv(reflect(y))) * style.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("body", "sizes"),
    [(two_runs, [3, 3]), (side_results, [3]), (one_op, []), (style_between, [4]), (written_between, [3, 2])],
)
@pytest.mark.parametrize("grad", [True, False])
def test_other_operations_part_regions_and_results_stay_the_same(body, sizes, grad):
    model, x = Net(body), torch.randn(2, 4, 12, 10)
    with torch.set_grad_enabled(grad):
        _, regions = regions_of(model, x)
        assert [len(region.sites) for region in regions] == sizes
        flat = torch.compile(model, backend=styleforge, options={"fallback": lambda gm, inputs: gm.forward})
        wanted = flat(x)
        torch._dynamo.reset()
        ours = torch.compile(model, backend=styleforge)(x)
    ours, wanted = (out if isinstance(out, tuple) else (out,) for out in (ours, wanted))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
        assert mine.requires_grad == theirs.requires_grad == grad


def test_gradients_are_those_of_the_ops_one_by_one():
    model, x = TransformerNet(4, 1).eval(), (torch.rand(1, 3, 16, 20) * 255).requires_grad_()
    gradients = []
    for options in ({"fallback": lambda gm, inputs: gm.forward}, {}):
        torch._dynamo.reset()
        out = torch.compile(model, backend=styleforge, options=options)(x)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "fallback", ["inductor", lambda gm, inputs: gm.forward], ids=["inductor", "callable"]
)
def test_a_compiler_gets_the_ops_themselves(fallback):
    with torch.no_grad():
        gm, regions = regions_of(TransformerNet(4, 1).eval(), picture(1, 3, 16, 20), fallback=fallback)
    assert regions == [] and not any(isinstance(module, Region) for module in gm.modules())
    assert sum("styleforge" in call for call in calls(gm.graph)) == 8


def test_a_region_whose_tuple_is_read_elsewhere_stays_as_it_is():
    x = torch.randn(1, 4, 6, 6)
    graph = fx.Graph()
    inputs = graph.placeholder("x")
    for _ in range(2):
        statistics = graph.call_function(torch.ops.styleforge.instance_statistics.default, (inputs,))
        statistics.meta["sites"] = ("norm",)
    graph.output(statistics)
    gm = fx.GraphModule(nn.Module(), graph)
    wanted = gm(x)
    assert group(gm, lambda inner: inner) == []
    assert all(torch.equal(a, b) for a, b in zip(gm(x), wanted, strict=True))


def test_the_runner_is_what_is_called():
    seen = []

    def runner(inner):
        return lambda *inputs: seen.append(len(inputs)) or inner(*inputs)

    gm, _ = regions_of(TransformerNet(4, 1).eval(), picture(1, 3, 16, 20), fallback=lambda gm, inputs: gm)
    (region,) = group(gm, runner)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    gm(*(torch.randn(node.meta["example_value"].shape) for node in placeholders))
    assert seen == [len([node for node in region.inner.graph.nodes if node.op == "placeholder"])]
    assert named(gm.graph, "region_0").op == "call_module"


def test_five_sizes_of_a_dynamic_graph():
    model = TransformerNet(4, 1).eval()
    with torch.no_grad():
        fused = torch.compile(model, backend=styleforge, dynamic=True)
        for height in (16, 20, 24, 28, 32):
            x = picture(1, 3, height, 20)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-3)


def test_the_log_and_explain_name_the_sites_of_a_region(caplog):
    model, x = TransformerNet(4, 1).eval(), picture(1, 3, 16, 20)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="sf_compile"):
        torch.compile(model, backend=styleforge)(x)
        report = sf_compile.explain(model, x)
        alone = sf_compile.explain(model, x, options={"fallback": "inductor"})
    assert "region 0: 8 ops in one call, of conv2d, conv2d_1, " in caplog.text
    assert [site.region for site in report.fused] == [0] * 8
    assert "one call runs 8 sites: conv2d, conv2d_1, " in str(report)
    assert [site.region for site in alone.fused] == [None] * 8 and "one call" not in str(alone)
