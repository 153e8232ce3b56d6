"""Which convolutions of a graph may multiply 8-bit integers, and graphs with given scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import reflect
from torch import Tensor, fx, nn

import sf_compile
from sf_compile.backend import analyse, flat_graph, grouped
from sf_compile.graph.quantize import candidates, with_scales
from sf_compile.models import TransformerNet
from sf_compile.options import Options

INT8 = Options(precision="int8")


def captured(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph that ``model`` becomes, op by op, and what it is called with for ``x``."""
    found = []

    def backend(gm, examples):
        inputs = [one if isinstance(one, nn.Parameter) else x for one in examples]
        found.append((flat_graph(analyse(gm, examples, INT8)), inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    return found[0]


def flat(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return captured(model, x)[0]


def picture() -> Tensor:
    return torch.rand(1, 3, 24, 20) * 255


def reasons(model: nn.Module) -> list[str]:
    """Of each convolution in turn, the first words of why it stays in float16; "" where it need not."""
    found = candidates(flat(model, picture()))
    return [" ".join((reason or "").split()[:2]) for reason in found.values()]


def test_the_trunk_of_a_transformer_net_and_what_follows():
    outer, few = "it does", "32 channels"
    found = reasons(TransformerNet(32, 2).eval())
    assert found == [outer, few, "64 channels", *[""] * 4, "", "64 channels", outer]


def test_rounding_must_cost_less_than_integers_gain():
    for width in (8, 16):
        assert not any(reason == "" for reason in reasons(TransformerNet(width, 2).eval()))


class Between(nn.Module):
    """A layer, one to look at, and its norm; ``change`` makes the middle of the layer's finished output."""

    def __init__(self, change, norm=nn.InstanceNorm2d, out: int = 128, **settings) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 128, 3, padding=1)
        self.first, self.change = nn.InstanceNorm2d(128, affine=True), change
        self.conv = nn.Conv2d(128, out, **{"kernel_size": 3, "bias": False, **settings})
        self.norm = norm(out)
        self.tail = nn.Conv2d(out, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.head(x)))
        return self.tail(reflect(F.relu(self.norm(self.change(self, x)))))


def plain(m: Between, x: Tensor) -> Tensor:
    return m.conv(reflect(x))


def doubled(m: Between, x: Tensor) -> Tensor:
    return m.conv(reflect(F.interpolate(x, scale_factor=2, mode="nearest")))


def tripled(m: Between, x: Tensor) -> Tensor:
    return m.conv(reflect(F.interpolate(x, scale_factor=3, mode="nearest")))


class Transposed(Between):
    """The same with a transposed convolution."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.conv(x))
        self.conv = nn.ConvTranspose2d(128, 128, 3, 2, 1, 1, bias=False)


CASES = (
    (Between(plain), ""),
    (Between(plain, out=120), ""),
    (Between(doubled, out=64), ""),
    (Between(tripled), "an upsampling other than by 2"),
    (Between(plain, out=112), ""),
    (Between(plain, out=48), "432 products of a number of its input gain less"),
    (Between(plain, stride=2), "288 products"),
    (Between(plain, out=512, stride=2), ""),
    (Between(plain, kernel_size=1), "128 products"),
    (Between(doubled, out=24), "384 products"),
    (Between(plain, out=36), "128 -> 36 channels are no multiples"),
    (Between(plain, norm=lambda c: nn.BatchNorm2d(c).eval()), "it does not stand between"),
    (Between(plain, norm=lambda c: nn.Identity()), "it does not stand between"),
    (Transposed(), "a transposed convolution"),
)


@pytest.mark.parametrize(("model", "why"), CASES, ids=range(len(CASES)))
def test_one_convolution(model, why):
    _, found, _ = candidates(flat(model.eval(), picture())).values()
    assert (found is None) if why == "" else found.startswith(why)


def test_a_graph_with_scales_is_a_copy():
    gm = flat(TransformerNet(32, 2).eval(), picture())
    before = str(gm.graph)
    sites = [site for site, reason in candidates(gm).items() if reason is None]
    scaled = with_scales(gm, {sites[0]: 0.25, sites[2]: 0.5})
    assert str(gm.graph) == before and set(candidates(scaled)) == set(candidates(gm))

    def scales(of):
        calls = [n for n in of.graph.nodes if n.target is torch.ops.styleforge.conv2d.default]
        return {n.meta["sites"][0]: n.args[-1] for n in calls if n.args[-1] is not None}

    assert scales(scaled) == {sites[0]: 0.25, sites[2]: 0.5}
    assert scales(with_scales(scaled, {sites[1]: 1.0})) == {sites[1]: 1.0}
    assert scales(gm) == scales(with_scales(scaled, {})) == {}


def test_a_trunk_is_told_the_scales_of_its_layers():
    gm = flat(TransformerNet(32, 2).eval(), picture())
    sites = list(candidates(gm))[3:7]

    def told(scales):
        joined, _ = grouped(with_scales(gm, scales), INT8)
        modules = [joined, *(m.inner for m in joined.children() if hasattr(m, "inner"))]
        (trunk,) = [n for m in modules for n in m.graph.nodes if "residual_trunk" in str(n.target)]
        return trunk.args[-1]

    assert told({}) == []
    assert told({sites[0]: 0.25, sites[3]: 0.5}) == [0.25, 0.0, 0.0, 0.5]


def test_explain_says_which_and_why():
    with torch.no_grad():
        report = sf_compile.explain(TransformerNet(32, 2).eval(), picture(), options=INT8)
        sixteen = sf_compile.explain(TransformerNet(32, 2).eval(), picture(), options={"precision": "fp16"})
    integers = [site.node for site in report.fused if site.precision == "int8"]
    others = [site.node for site in report.fused if site.precision == "fp16"]
    assert len(integers) == 5 and len(others) == 5
    assert [one.node for one in report.in_float16] == others
    assert "int8: the first call settles the scales of 5 convolutions" in str(report)
    assert all(f"{one.node} " in str(report) and one.reason in str(report) for one in report.in_float16)
    assert report.to_dict()["in_float16"][0] == {
        "node": others[0], "reason": "it does not stand between two instance norms", "graph": 0,
    }  # fmt: skip
    assert sixteen.in_float16 == () and "int8" not in str(sixteen)
    # Integers beside what is kept, and weights as integers too: of four layers in the trunk, one in parities.
    more, less = report.memory[0], sixteen.memory[0]
    assert more.peak > less.peak
    assert more.packed_weights - less.packed_weights == 4 * 128 * 128 * 9 + 64 * 128 * 16
