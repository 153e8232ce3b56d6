"""On the networks that people have: the backend fuses what it should, and changes nothing."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from cases import psnr, relative_error
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from sf_compile.backend import Analysis, analyse, styleforge
from sf_compile.graph.normalize import value_of
from sf_compile.options import Options

CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d)
NORMS = (F.instance_norm, F.batch_norm, F.group_norm, F.layer_norm)
FLOOR = 5e-7  # a few roundings of float32: with so few operations eager's own error is a matter of luck


class Seen(NamedTuple):
    """One compiled network: its results, and what the pipeline decided about its graph."""

    eager: tuple[Tensor, ...]
    channels_last: tuple[Tensor, ...]
    ours: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]
    gm: fx.GraphModule
    analysis: Analysis
    dense: int
    state_kept: bool

    @property
    def inside(self) -> set[str]:
        """Names of the nodes that fused sites replace."""
        return {step.node.name for site in self.analysis.plan.decisions for step in site.site.steps}

    def calls(self, targets: tuple[Any, ...]) -> list[fx.Node]:
        return [node for node in self.gm.graph.nodes if node.target in targets]


class DenseCalls(TorchFunctionMode):
    """Counts the ungrouped convolutions that eager PyTorch is asked for."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            self.count += is_dense(func, args[0], args[1], out)
        return out


class ChannelsLast(TorchFunctionMode):
    """Every convolution in channels_last, between tensors that are as eager has them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS and args[0].dim() == 4:
            turned = (x.contiguous(memory_format=torch.channels_last) for x in args[:2])
            return func(*turned, *args[2:], **(kwargs or {})).contiguous()
        return func(*args, **(kwargs or {}))


def is_dense(function: Any, input: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether every channel of the result reads every channel of the input."""
    return weight.shape[1] == (out if function is torch.conv_transpose2d else input).shape[1]


def is_of_pictures(node: fx.Node) -> bool:
    """Whether it is a convolution or norm of (N, C, H, W), and not a layer norm of tokens."""
    over = len(node.args[1]) if node.target is F.layer_norm else 3
    return value_of(node).dim() == 4 and over == 3


def run(model: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = model(*inputs)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def in_float64(model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return run(copy.deepcopy(model).double(), [x.double() for x in inputs])


@cache
def seen(name: str) -> Seen:
    """The network of that row, run in eager PyTorch, in float64, and compiled, once for all tests."""
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    model, inputs = row.build(), row.inputs()
    graphs: list[tuple[fx.GraphModule, Analysis]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append((gm, analyse(gm, example_inputs, Options())))
        return styleforge(gm, example_inputs)

    with torch.no_grad():
        with DenseCalls() as dense:
            eager = run(model, inputs)
        with ChannelsLast():
            channels_last = run(model, inputs)
        exact = in_float64(model, inputs)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        ours = run(torch.compile(model, backend=backend, fullgraph=True), inputs)
    after = model.state_dict()
    kept = list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    ((gm, analysis),) = graphs
    return Seen(eager, channels_last, ours, exact, gm, analysis, dense.count, kept)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_results_are_eagers_and_the_model_is_untouched(name):
    network = seen(name)
    assert network.state_kept
    assert len(network.ours) == len(network.eager)
    results = (network.ours, network.eager, network.channels_last, network.exact)
    for ours, eager, channels_last, exact in zip(*results, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (eager.shape, eager.dtype, eager.stride())
        allowed = relative_error(eager, exact)
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            # There oneDNN adds up wide contiguous layers in another order than those in channels_last.
            allowed = max(allowed, relative_error(channels_last, exact))
        assert relative_error(ours, exact) <= 1.25 * allowed + FLOOR


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_convolution_and_norm_that_should_be_is_in_a_site(name):
    row, network = ARCHITECTURES[name], seen(name)
    dense = [
        node.name
        for node in network.calls(CONVOLUTIONS)
        if is_dense(node.target, value_of(node.args[0]), value_of(node.args[1]), value_of(node))
    ]
    assert len(dense) == network.dense == row.dense
    sites = [decision.site for decision in network.analysis.plan.decisions]
    fused = len(network.inside & set(dense))
    norms = sum(site.norm is not None for site in sites)
    reasons = sorted({miss.reason for miss in network.analysis.matches.misses})
    assert (min(fused, row.fused), min(norms, row.norms)) == (row.fused, row.norms), reasons


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_left_alone_has_a_reason(name):
    network = seen(name)
    misses = {miss.node: miss.reason for miss in network.analysis.matches.misses}
    known = [node for node in network.calls(CONVOLUTIONS + NORMS) if is_of_pictures(node)]
    # Normalizing may have put what a model spells in several operations into one.
    remaining = {node.name for node in network.analysis.normalized.graph.nodes}
    left = {node.name for node in known} & remaining - network.inside
    assert left - set(misses) == set()
    for words in ARCHITECTURES[name].declined:
        assert any(words in reason for reason in misses.values()), sorted(set(misses.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_pictures_on_a_gpu(name):
    row = ARCHITECTURES[name]
    model, inputs = row.build().cuda(), [x.cuda().half() for x in row.inputs(scale=2)]
    with torch.no_grad():
        exact = in_float64(model, inputs)
        eager = run(model.half(), inputs)
        ours = run(torch.compile(model, backend=styleforge), inputs)
    for got, plain, picture in zip(ours, eager, exact, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (plain.shape, plain.dtype, plain.stride())
        if plain.dim() < 4:  # a few scores, of which one rounding is a decibel
            error = (got.double() - picture).abs().max()
            assert error <= 1.25 * (plain.double() - picture).abs().max() + 4e-3 * picture.abs().max()
        elif plain.isfinite().all():
            peak = float(picture.max() - picture.min())
            assert psnr(got, picture, peak) > psnr(plain, picture, peak) - 1
