"""Regions on a GPU: what is replayed is what the ops one by one compute, bit for bit."""

from __future__ import annotations

import statistics
import threading
import time

import pytest
import torch
from cases import replay_side_by_side

from sf_compile.backend import analyse, styleforge
from sf_compile.cuda import repeated
from sf_compile.graph.rewrite import rewrite
from sf_compile.graph.trunks import join
from sf_compile.models import TransformerNet
from sf_compile.options import Options

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper_kernels")]


@pytest.fixture
def replays(monkeypatch):
    """Grows by one with every call that is replayed."""
    calls, replay = [], repeated._replay

    def counted(*args):
        calls.append(threading.get_ident())
        return replay(*args)

    monkeypatch.setattr(repeated, "_replay", counted)
    return calls


def network(width: int = 16, blocks: int = 2) -> TransformerNet:
    return TransformerNet(width, blocks).eval().to("cuda", torch.float16)


def picture(*shape: int) -> torch.Tensor:
    return (torch.rand(shape, device="cuda") * 255).half()


def fused(model):
    return torch.compile(model, backend=styleforge)


def one_by_one(model):
    """The same ops, without regions."""

    def backend(gm, inputs):
        analysis = analyse(gm, inputs, Options())
        module = rewrite(analysis.normalized, analysis.plan)
        join(module)
        return module.forward

    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("shape", [(1, 3, 37, 53), (1, 3, 64, 64), (1, 3, 100, 200), (2, 3, 40, 48)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_replay_is_what_the_ops_compute(shape, memory_format, mode, replays):
    model = network()
    ours, ops = fused(model), one_by_one(model)
    with mode():
        kept = []
        for _ in range(6):  # every picture stays alive, so each lies elsewhere
            x = picture(*shape).contiguous(memory_format=memory_format)
            kept.append((x, ours(x)))
        assert len(replays) == 4
        for x, out in kept:  # and no result is written by a later call
            wanted = ops(x)
            assert torch.equal(out, wanted) and out.stride() == wanted.stride()


def test_changed_weights_take_effect(replays):
    model = network()
    ours, ops, x = fused(model), one_by_one(model), picture(1, 3, 64, 64)
    first = model.conv1.conv2d
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.InstanceNorm2d))
    with torch.no_grad():
        for change, replayed in (
            (lambda: None, 2),
            (lambda: model.load_state_dict(network().state_dict()), 2),
            (lambda: first.weight.mul_(1.5), 2),
            (lambda: norm.weight.add_(0.25), 4),  # kernels read it where it lies
            (lambda: setattr(first, "weight", torch.nn.Parameter(first.weight * 0.5)), 2),
        ):
            change()
            before = len(replays)
            results = [ours(x) for _ in range(4)]
            wanted = ops(x)
            assert all(torch.equal(out, wanted) for out in results)
            assert len(replays) == before + replayed


def test_streams_and_threads(replays):
    model = network()
    ours, ops = fused(model), one_by_one(model)
    inputs = [picture(1, 3, 160, 128) for _ in range(2)]
    with torch.no_grad():
        expected = [ops(x) for x in inputs]
        for _ in range(3):
            ours(inputs[0])
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int, own_stream: bool) -> None:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(20):
                if not torch.equal(ours(inputs[index]), expected[index]):
                    wrong.append(index)

    for own_stream in (True, False):
        threads = [threading.Thread(target=work, args=(i, own_stream)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # On a stream of its own a thread begins with two calls that are not replayed.
    assert wrong == [] and len(replays) == 1 + 2 * 18 + 2 * 20


def test_captured_into_a_cuda_graph(replays):
    model = network()
    ours, ops, inputs = fused(model), one_by_one(model), [picture(1, 3, 64, 96) for _ in range(2)]
    graphs, outputs = [], []
    with torch.no_grad():
        for _ in range(3):
            ours(inputs[0])
        before = len(replays)
        for x in inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append(ours(x))
            graphs.append(graph)
        assert len(replays) == before
        replay_side_by_side(graphs)
        assert all(torch.equal(out, ops(x)) for x, out in zip(inputs, outputs, strict=True))
        assert torch.equal(ours(inputs[0]), outputs[0])


def test_gradients_are_taken_through_the_ops(replays):
    model = TransformerNet(8, 1).eval().to("cuda", torch.float16)
    ours, ops = fused(model), one_by_one(model)
    x = (torch.rand(1, 3, 32, 40, device="cuda") * 255).half().requires_grad_()
    gradients = []
    for function in (ours, ours, ours, ops):
        gradients.append(torch.autograd.grad(function(x).float().mean(), x)[0])
    assert replays == []
    assert all(torch.isfinite(g).all() for g in gradients)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-2, atol=1e-3)


def test_a_device_that_is_not_the_current_one(replays):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = network().to("cuda:1")
    ours, ops, x = fused(model), one_by_one(model), picture(1, 3, 64, 64).to("cuda:1")
    with torch.no_grad():
        results = [ours(x) for _ in range(4)]
        wanted = ops(x)
    assert torch.cuda.current_device() == 0 and len(replays) == 2
    assert all(torch.equal(out, wanted) for out in results)


def peak(function, x) -> int:
    """Bytes allocated at most during a call, beyond what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_replay_takes_no_more_memory_than_the_ops_and_its_result():
    model = network(32, 5)
    ours, ops, x = fused(model), one_by_one(model), picture(1, 3, 512, 512)
    with torch.no_grad():
        for _ in range(3):
            ours(x)
            ops(x)
        out = ours(x)  # is allocated at the beginning of a replay, where the ops do so last
        assert peak(ours, x) <= peak(ops, x) + out.numel() * out.element_size()


def host_time(function, x) -> float:
    """Median host microseconds of a call that finds the GPU idle."""
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function(x)
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def test_a_replayed_call_costs_the_host_less_than_half(capsys):
    model = network(32, 5)
    ours, ops, x = fused(model), one_by_one(model), picture(1, 3, 512, 512)
    with torch.no_grad():
        for _ in range(3):
            ours(x)
            ops(x)
        replayed, separate = host_time(ours, x), host_time(ops, x)
    with capsys.disabled():
        print(f"\nhost time of a call: {replayed:.0f} us replayed, {separate:.0f} us op by op")
    assert replayed < separate / 2
