"""Small pictures on a CPU run as they came: from what size on they are fused, and that both are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from graphs import rewritten_graph
from networks import Net, block, reflect
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sf_compile
from sf_compile.backend import analyse, break_even_of, capture_of, styleforge
from sf_compile.cpu.forms import is_winograd
from sf_compile.graph.break_even import BreakEven
from sf_compile.models import TransformerNet
from sf_compile.options import Options

pytestmark = pytest.mark.small_pictures


class Ours(TorchDispatchMode):
    """Counts the calls of fused ops."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "styleforge"
        return func(*args, **(kwargs or {}))


class Watched:
    """The backend; ``ops`` is how many fused ops the last call ran."""

    def __init__(self) -> None:
        self.graphs = self.ops = 0

    def __call__(self, gm: Any, example_inputs: list[Any]) -> Any:
        run = styleforge(gm, example_inputs)
        self.graphs += 1

        def call(*inputs: Any) -> Any:
            with Ours() as ours:
                out = run(*inputs)
            self.ops = ours.count
            return out

        return call


def found(model: nn.Module, *inputs: Tensor, **settings: Any) -> BreakEven | None:
    """What the backend decides about the one graph of ``model``."""
    decided: list[BreakEven | None] = []
    options = Options(**settings)

    def backend(gm: Any, example_inputs: list[Any]) -> Any:
        analysis = analyse(gm, example_inputs, options)
        capture = capture_of(analysis, options)
        rewritten, _ = rewritten_graph(analysis, options)
        decided.append(break_even_of(analysis, capture, rewritten, options))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    (one,) = decided
    return one


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_small_pictures_are_eagers_bits_and_large_ones_are_fused(one_thread):
    model, watched = TransformerNet(8, 2).eval(), Watched()
    least = found(model, torch.rand(1, 3, 48, 48))
    side = math.isqrt(int(least.numbers) // 3)
    assert 32 < side < 160
    compiled = torch.compile(model, backend=watched)
    with torch.no_grad():
        small, large = torch.rand(1, 3, 32, 32), torch.rand(1, 3, side + 8, side + 8)
        assert torch.equal(compiled(small), model(small)) and watched.ops == 0
        assert 0 < relative_error(compiled(large), model(large)) < 1e-4 and watched.ops > 5
        many = torch.rand(32, 3, 32, 32)  # a batch of small ones is large
        assert relative_error(compiled(many), model(many)) < 1e-4 and watched.ops > 5


def test_gradients_on_either_side(one_thread):
    model, watched = Net(block), Watched()
    compiled = torch.compile(model, backend=watched)
    for side, fuses in ((8, False), (160, True)):
        x = torch.randn(1, 4, side, side, requires_grad=True)
        ours, theirs = (torch.autograd.grad(f(x).pow(2).sum(), x)[0] for f in (compiled, model))
        assert relative_error(ours, theirs) < 1e-4
        assert (watched.ops > 0) == fuses


def test_more_threads_make_more_of_a_picture_small(monkeypatch):
    least = BreakEven(1000.0, (0,))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert least.is_reached([torch.empty(1, 1, 25, 40)]) and not least.is_reached([torch.empty(1, 1, 9, 111)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert least.is_reached([torch.empty(4, 1, 25, 40)]) and not least.is_reached([torch.empty(3, 1, 25, 40)])
    assert "4 threads" in str(least) and "4000 numbers" in str(least)


class ByHand(nn.Module):
    """A layer norm in several passes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()


def test_a_norm_over_groups_saves_less():
    """PyTorch's own is one pass over a group; its instance norm copies the weights, and is a batch norm."""

    def least(norm: nn.Module) -> float:
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), norm, nn.ReLU()]
        model = nn.Sequential(*layers, *layers, *layers, *layers)
        return found(model, torch.rand(1, 8, 64, 64)).numbers

    assert least(nn.GroupNorm(2, 8)) > 1.5 * least(nn.InstanceNorm2d(8, affine=True))
    assert least(ByHand()) == least(nn.InstanceNorm2d(8))


def wide(channels: int) -> nn.Module:
    """A layer without a norm between two reflection pads, in which nothing but Winograd's form saves much."""
    return nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.ReLU(),
        nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3),
    )  # fmt: skip


def test_what_a_network_is_made_of_decides():
    x = torch.rand(1, 8, 24, 24)
    narrow = found(wide(8), x)
    assert math.isinf(narrow.numbers) and not narrow.is_reached([torch.empty(1, 8, 4096, 4096)])
    assert "nothing is saved" in str(narrow)
    if is_winograd((3, 3), (1, 1), 64, 64):
        least = found(wide(64), torch.rand(1, 64, 24, 24)).numbers
        computed = wide(64)
        for i in (1, 4):
            nn.utils.parametrizations.weight_norm(computed[i])
        assert least < 64 * 48 * 48 and found(computed, torch.rand(1, 64, 24, 24)).numbers > 2 * least
    assert found(TransformerNet(32), x[:, :3]).numbers < found(TransformerNet(8), x[:, :3]).numbers


def test_it_does_not_depend_on_the_size_that_came_first():
    model = TransformerNet(8, 2).eval()
    ones = [found(model, torch.rand(1, 3, side, side)).numbers for side in (32, 96)]
    assert ones[0] == pytest.approx(ones[1], rel=0.15)


def test_only_float32_as_the_model_has_it_is_decided():
    model, x = Net(block), torch.randn(1, 4, 12, 12)
    assert found(model, x) is not None
    assert found(model, x, precision="bf16") is None
    assert found(model, x, fallback=lambda gm, inputs: gm.forward) is None
    assert found(Net(block).double(), x.double()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert found(model, x) is None


def test_sizes_get_no_guard():
    model, watched, plain = Net(lambda m, x: F.relu(m.norm(m.conv(reflect(x))))), Watched(), []
    for backend in (watched, lambda gm, inputs: (plain.append(gm), gm.forward)[1]):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, dynamic=True)
        with torch.no_grad():
            for side in (9, 12, 100, 200, 16):
                x = torch.randn(1, 4, side, side + 3)
                assert relative_error(compiled(x), model(x)) < 2e-5
    assert watched.graphs == len(plain)


def test_explain_says_so():
    with torch.no_grad():
        report = sf_compile.explain(TransformerNet(8, 2).eval(), torch.rand(1, 3, 32, 32))
    (text,) = report.break_even
    assert "run as they came" in text and text in str(report) and report.to_dict()["break_even"] == [text]
