"""Convolutions without a norm: fused on a GPU, in 16-bit, in networks that make pictures.

There is no GPU here: the graphs are made of fake tensors on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from architectures.white_box import WhiteBox
from graphs import fuse
from torch import Tensor, fx, nn

from sf_compile.graph.match import match
from sf_compile.graph.normalize import NormalizedGraph, normalize, value_of
from sf_compile.graph.plan import Plan, plan
from sf_compile.graph.rewrite import rewrite
from sf_compile.graph.sites import Matches
from sf_compile.options import Options


class Found(NamedTuple):
    """A graph, and what is decided about it."""

    normalized: NormalizedGraph
    matches: Matches
    plan: Plan


def found_in(make: Callable[[], nn.Module], dtype: torch.dtype, device: str = "cuda") -> Found:
    """What is decided about a network and one picture of that dtype there."""
    seen: list[Found] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graph = normalize(gm, inputs)
        values = [v for node in graph.graph.nodes if (v := value_of(node)) is not None]
        try:
            for value in values:
                value.fake_device = torch.device(device)
            matches = match(graph)
            seen.append(Found(graph, matches, plan(graph, matches, Options())))
        finally:
            for value in values:
                value.fake_device = torch.device("cpu")
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(make().eval().to(dtype), backend=backend, fullgraph=True)(
            torch.rand(1, 3, 32, 40).to(dtype)
        )
    return seen[0]


def patterns_of(seen: Any) -> list[str]:
    return [site.pattern for site in seen.matches.sites]


def convolutions(seen: Any) -> int:
    return sum(site.conv is not None for site in seen.matches.sites)


class Chain(nn.Module):
    """Three convolutions, the last of them bare, and whatever comes between and behind them."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.wide = nn.BatchNorm2d(8), nn.Conv2d(8, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def vgg(m: Chain, x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(m.second(F.relu(m.first(x)))), 2)


def segmenting(m: Chain, x: Tensor) -> Tensor:
    y = F.relu(m.norm(m.second(F.relu(m.first(x)))))
    return m.last(F.interpolate(y, scale_factor=2, mode="bilinear"))


def bilinear(m: Chain, x: Tensor) -> Tensor:
    return m.last(F.leaky_relu(m.second(F.interpolate(F.relu(m.first(x)), scale_factor=2, mode="bilinear"))))


def transposing(m: Chain, x: Tensor) -> Tensor:
    return m.last(F.relu(m.up(F.relu(m.first(x)))))


def shuffled(m: Chain, x: Tensor) -> Tensor:
    return m.last(F.relu(F.pixel_shuffle(m.wide(F.relu(m.first(x))), 2)))


HALF, SINGLE = torch.float16, torch.float32
CASES = {
    "picture to picture": (bilinear, HALF, "cuda", ["conv+relu", "conv+leaky_relu", "conv"]),
    "the same in bfloat16": (bilinear, torch.bfloat16, "cuda", ["conv+relu", "conv+leaky_relu", "conv"]),
    "the same in float32": (bilinear, SINGLE, "cuda", []),
    "the same on a CPU": (bilinear, HALF, "cpu", []),
    "transposed": (transposing, HALF, "cuda", ["conv+relu", "conv_transpose+relu", "conv"]),
    "pixel shuffle": (shuffled, HALF, "cuda", ["conv+relu", "conv", "relu+conv"]),
    "features of a classifier": (vgg, HALF, "cuda", []),
    "batch norms and nothing else": (segmenting, HALF, "cuda", []),
}


@pytest.mark.parametrize("name", CASES)
def test_where_a_bare_convolution_is_fused(name):
    body, dtype, device, patterns = CASES[name]
    seen = found_in(lambda: Chain(body), dtype, device)
    assert patterns_of(seen) == patterns
    if not patterns:
        reasons = {miss.reason for miss in seen.matches.misses}
        assert any("nothing around it" in r or "a graph of no other sites" in r for r in reasons)


def test_the_white_box_cartoon_is_fused_in_16_bit_on_a_gpu():
    seen = found_in(lambda: WhiteBox(8, 2), HALF)
    assert convolutions(seen) == 14
    called = [str(node.target) for node in rewrite(seen.normalized, seen.plan).graph.nodes]
    assert called.count("styleforge.conv2d.default") == 14
    assert not any("conv2d" in name for name in called if not name.startswith("styleforge"))


NETWORKS = [lambda: WhiteBox(8, 2), lambda: Chain(transposing), lambda: Chain(shuffled)]


@pytest.mark.parametrize("make", NETWORKS)
def test_what_a_gpu_would_run_is_right_on_a_cpu(make, monkeypatch):
    """The same sites, with numbers: the rule about devices and dtypes is lifted."""
    monkeypatch.setattr("sf_compile.graph.match._Finder.ends_in_a_kernel", lambda finder, site: True)
    model, x = make().eval(), torch.randn(1, 3, 32, 40)
    compiled, made = fuse(model)
    results = []
    for run in (compiled, model):
        out = run(x)
        loss = out.square().sum()
        results.append([out, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert convolutions(made[0].analysis) >= 3
