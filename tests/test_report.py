import functools
import json
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sf_compile
from sf_compile import Options, Report
from sf_compile.backend import analyse, styleforge
from sf_compile.models import TransformerNet

PATTERNS = [
    *["pad+conv+norm+relu"] * 4,
    "pad+conv+norm+add",
    *["upsample+pad+conv+norm+relu"] * 2,
    "pad+conv",
]


class Mixed(nn.Module):
    """Something to fuse, something to refuse, and something that no rule is about."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.batch = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.relu(F.instance_norm(self.first(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        return torch.sigmoid(self.batch(self.grouped(x)))


def picture(*shape):
    return torch.rand(shape or (1, 3, 16, 12))


def operations(model, *inputs):
    """The nodes that compute something, of every graph that Dynamo makes."""
    graphs = []

    def collect(gm, example_inputs):
        graphs.append([n for n in gm.graph.nodes if n.op.startswith("call")])
        return gm.forward

    torch.compile(model, backend=collect)(*inputs)
    return graphs


def test_every_convolution_of_a_transformer_net_is_reported():
    report = sf_compile.explain(TransformerNet(4, 1), picture())
    assert isinstance(report, Report)
    assert [site.pattern for site in report.fused] == PATTERNS
    assert [site.nodes for site in report.fused] == [len(p.split("+")) for p in PATTERNS]
    assert {site.op for site in report.fused} == {"styleforge::conv2d"}
    assert [site.finish for site in report.fused] == ["deferred"] * 7 + ["none"]
    assert report.skipped == report.untouched == report.graph_breaks == ()
    assert report.options == Options()


def test_what_is_left_alone_is_named_with_the_reason():
    report = sf_compile.explain(Mixed(), picture())
    assert [site.pattern for site in report.fused] == ["pad+conv+norm+relu"]
    reasons = {skip.node: skip.reason for skip in report.skipped}
    assert "grouped convolution (groups=2)" in reasons.values()
    assert "batch norm in training updates its running statistics" in reasons.values()
    assert set(reasons) < set(report.untouched)
    assert "sigmoid" in report.untouched and "sigmoid" not in reasons


@pytest.mark.parametrize(
    "model", [TransformerNet(4, 1), Mixed(), Mixed().eval()], ids=["net", "training", "eval"]
)
def test_every_operation_is_either_fused_or_untouched(model):
    (calls,) = operations(model, picture())
    report = sf_compile.explain(model, picture())
    assert sum(site.nodes for site in report.fused) + len(report.untouched) == len(calls)
    assert set(report.untouched) <= {node.name for node in calls}
    assert {skip.node for skip in report.skipped} <= set(report.untouched)


@pytest.mark.parametrize("model", [TransformerNet(4, 1).eval(), Mixed().eval()], ids=["net", "mixed"])
@pytest.mark.parametrize("grad", [True, False])
def test_explain_says_what_the_backend_does(grad, model):
    analyses, rewritten = [], []

    def collecting(gm, example_inputs):
        analyses.append(analyse(gm, example_inputs, Options()))
        return styleforge(gm, example_inputs, options={"fallback": keep})

    def keep(gm, example_inputs):
        rewritten.append(gm)
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=collecting)(picture())
        report = sf_compile.explain(model, picture())
    decisions = analyses[0].plan.decisions
    assert [site.pattern for site in report.fused] == [d.site.pattern for d in decisions]
    assert [site.why for site in report.fused] == [d.why for d in decisions]
    misses = [(miss.node, miss.reason) for miss in analyses[0].matches.misses]
    assert [(skip.node, skip.reason) for skip in report.skipped] == misses
    ours = [n.target for n in rewritten[0].graph.nodes if "styleforge" in str(n.target)]
    convolutions = [site for site in report.fused if site.op == "styleforge::conv2d"]
    assert ours.count(torch.ops.styleforge.conv2d.default) == len(convolutions) > 0
    finished_at_their_end = [site for site in report.fused if site.finish == "here"]
    assert ours.count(torch.ops.styleforge.normalize.default) == len(finished_at_their_end)
    kept = [n for n in rewritten[0].graph.nodes if n.op.startswith("call") and n.name in report.untouched]
    assert len(kept) == len(report.untouched)


def test_to_dict_survives_json():
    report = sf_compile.explain(Mixed(), picture(), options={"layout": "contiguous"})
    data = json.loads(json.dumps(report.to_dict()))
    assert data == report.to_dict()
    names = {"fused", "skipped", "untouched", "graph_breaks", "options", "memory"}
    assert set(data) == names | {"cuda_graphs", "break_even", "in_float16"}
    assert data["fused"][0]["pattern"] == "pad+conv+norm+relu" and data["fused"][0]["nodes"] == 4
    assert data["skipped"][0]["node"] == report.skipped[0].node
    assert data["skipped"][0]["reason"] == report.skipped[0].reason
    assert data["untouched"] == list(report.untouched)
    assert data["options"] == {
        "fallback": "eager", "layout": "contiguous", "mode": "default", "precision": "auto",
        "cuda_graphs": None, "cuda_graphs_limit": 8, "cuda_graphs_memory": 0.25, "min_psnr": 38.0,
    }  # fmt: skip
    (memory,) = data["memory"]
    assert memory["input"] == picture().numel() * 4 and memory["peak"] > memory["output"] > 0
    assert data["cuda_graphs"] == ["none: not asked for"]


@pytest.mark.parametrize("fallback", [styleforge, functools.partial(styleforge, mode=None)])
def test_a_callable_fallback_is_named_in_the_dict(fallback):
    report = sf_compile.explain(nn.ReLU(), picture(), options={"fallback": fallback})
    assert "styleforge" in json.loads(json.dumps(report.to_dict()))["options"]["fallback"]


def test_the_text_counts_the_sites_and_gives_each_its_line():
    report = sf_compile.explain(Mixed(), picture())
    lines = str(report).splitlines()
    total = report.fused[0].nodes + len(report.untouched)
    assert lines[0] == f"styleforge: 1 fused site replaces 4 of {total} operations"
    (site,) = report.fused
    columns = [site.node, site.pattern, "4", "nodes", site.layout, "fp32", *site.why.split()]
    assert lines[1].split() == columns
    assert f"left alone, with a reason: {len(report.skipped)}" in lines
    for skip in report.skipped:
        assert any(line.split() == [skip.node, *skip.reason.split()] for line in lines)
    assert any(line.startswith("no rule is about: ") and "sigmoid" in line for line in lines)
    assert lines[-1] == "graph breaks: 0"
    assert not any(line != line.rstrip() for line in lines)
    text = str(sf_compile.explain(TransformerNet(4, 1), picture()))
    assert text.startswith("styleforge: 8 fused sites replace 32 of 32 operations\n")
    assert "left alone" not in text and "no rule" not in text


def test_a_model_with_nothing_to_fuse():
    report = sf_compile.explain(nn.Linear(3, 2), torch.rand(4, 3))
    assert (report.fused, report.skipped, report.graph_breaks) == ((), (), ())
    assert report.untouched == ("linear",)
    assert str(report) == (
        "styleforge: 0 fused sites replace 0 of 1 operations\nno rule is about: linear\ngraph breaks: 0"
    )


def test_graph_breaks_are_reported_and_each_graph_is_explained():
    net = TransformerNet(4, 1)

    def broken(x):
        y = net.relu(net.in1(net.conv1(x)))
        torch._dynamo.graph_break()
        return net.conv2(y)

    report = sf_compile.explain(broken, picture())
    found = [(site.pattern, site.graph) for site in report.fused]
    assert found == [("pad+conv+norm+relu", 0), ("pad+conv", 1)]
    assert len(report.graph_breaks) == 1 and "graph_break" in report.graph_breaks[0]
    assert "graph breaks: 1\n  " in str(report)
    assert len(sf_compile.explain(broken, picture()).graph_breaks) == 1


def test_options_change_the_report():
    net = TransformerNet(4, 1)
    for layout in ("contiguous", "channels_last"):
        report = sf_compile.explain(net, picture(), options={"layout": layout})
        assert report.options == Options(layout=layout)
        assert {site.layout for site in report.fused[:-1]} == {layout}
        assert report.fused[-1].layout == "contiguous"  # what the model returns has eager's strides
    assert report == sf_compile.explain(net, picture(), options=Options(layout="channels_last"))


def test_the_text_says_what_memory_a_call_needs_and_what_becomes_of_graphs():
    net = TransformerNet(4, 1).eval()
    text = str(sf_compile.explain(net, picture()))
    assert text.count("memory on a GPU: ") == 1 and "CUDA graph" not in text
    text = str(sf_compile.explain(net, picture(), options={"cuda_graphs": True}))
    assert "\nmemory with a CUDA graph: " in text
    assert "\nCUDA graphs: none: " in text and " is on the CPU\n" in text


def test_keyword_inputs_are_passed_on():
    def model(x, *, slope):
        return F.leaky_relu(x, slope)

    assert sf_compile.explain(model, picture(), slope=0.2).untouched == ("leaky_relu",)


def attributes(model):
    """Names of every module's attributes, but for the mark that torch.compile makes with any backend."""
    return {name: set(vars(module)) - {"_is_torch_compile"} for name, module in model.named_modules()}


@pytest.mark.parametrize("model", [TransformerNet(4, 1), Mixed()], ids=["net", "batch norm in training"])
def test_the_model_is_not_modified(model):
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modules = attributes(model)
    training = [module.training for module in model.modules()]
    sf_compile.explain(model, picture())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert attributes(model) == modules
    assert [module.training for module in model.modules()] == training


def test_explain_may_be_called_more_often_than_dynamo_recompiles():
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3))
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert len(sf_compile.explain(net, picture()).fused) == 1


def test_explain_takes_a_compiled_model_and_leaves_it_working():
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3))
    compiled = torch.compile(net, backend=styleforge)
    x = picture()
    compiled(x)
    assert [site.pattern for site in sf_compile.explain(compiled, x).fused] == ["pad+conv"]
    assert torch.allclose(compiled(x), net(x), atol=1e-6)


def test_an_error_of_the_model_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="Padding size should be less"):
        sf_compile.explain(TransformerNet(4, 1), picture(1, 3, 2, 2))


def test_a_report_is_frozen_data():
    report = sf_compile.explain(Mixed().eval(), picture())
    for part, name in ((report, "fused"), (report.fused[0], "pattern"), (report.skipped[0], "reason")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, None)
