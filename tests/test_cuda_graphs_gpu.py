"""CUDA graphs on a GPU: bit for bit what plain calls compute, whatever happens around them."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sf_compile
from sf_compile.backend import styleforge
from sf_compile.cuda import capture
from sf_compile.models import TransformerNet
from sf_compile.runtime import cuda_graphs

pytestmark = pytest.mark.gpu
LOGGER = "sf_compile.runtime.cuda_graphs"


@pytest.fixture
def replays(monkeypatch):
    """Grows by one with every replay of a graph."""
    calls, replay = [], capture.CapturedCall.replay

    def counted(self, inputs):
        calls.append(self)
        return replay(self, inputs)

    monkeypatch.setattr(capture.CapturedCall, "replay", counted)
    return calls


def network(width=16, blocks=2, dtype=torch.float16):
    return TransformerNet(width, blocks).eval().to("cuda", dtype)


def picture(*shape, dtype=torch.float16):
    return (torch.rand(shape or (1, 3, 64, 96), device="cuda") * 255).to(dtype)


def plain(model):
    return torch.compile(model, backend=styleforge)


def graphed(model, **options):
    return torch.compile(model, backend=styleforge, options={"cuda_graphs": True, **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (1, 3, 37, 53), (3, 3, 40, 48)])
def test_the_bits_of_a_plain_call(dtype, mode, shape, replays):
    model = network(dtype=dtype)
    ours, ops = graphed(model), plain(model)
    with mode():
        kept = []
        for _ in range(6):
            x = picture(*shape, dtype=dtype)
            kept.append((x, ours(x)))
        assert len(replays) == 4
        for x, out in kept:  # no result is written by a later call
            wanted = ops(x)
            assert torch.equal(out, wanted) and out.stride() == wanted.stride()
            assert out.is_inference() == wanted.is_inference()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_modes_of_torch_compile_mean_graphs(mode, replays):
    model, x = network(), picture()
    ours = torch.compile(model, backend=styleforge, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            out = ours(x)
        assert torch.equal(out, plain(model)(x))
    assert len(replays) == 1


def test_the_mode_without_graphs_has_none(replays):
    ours, x = torch.compile(network(), backend=styleforge, mode="max-autotune-no-cudagraphs"), picture()
    with torch.no_grad():
        for _ in range(4):
            ours(x)
    assert replays == []


def test_sizes_batches_and_layouts_come_and_go(replays):
    model = network()
    ours, ops = graphed(model), plain(model)
    shapes = [(1, 3, 64, 64), (1, 3, 100, 80), (2, 3, 64, 64), (4, 3, 48, 64)]
    with torch.no_grad():
        for _ in range(4):
            for shape in shapes:
                for x in (
                    picture(*shape),
                    picture(*shape).contiguous(memory_format=torch.channels_last),
                    picture(*shape[:3], 2 * shape[3])[..., ::2],
                    picture(*shape).transpose(2, 3),
                ):
                    assert torch.equal(ours(x), ops(x))
    assert len(replays) > 0


def test_an_expanded_input(replays):
    model = network()
    ours, ops = graphed(model), plain(model)
    with torch.no_grad():
        for _ in range(4):
            x = picture(1, 1, 64, 64).expand(1, 3, 64, 64)
            assert torch.equal(ours(x), ops(x))
    assert len(replays) == 2


def test_an_input_that_is_not_aligned(replays):
    model = network()
    ours, ops = graphed(model), plain(model)
    with torch.no_grad():
        for _ in range(4):
            x = picture(3 * 64 * 64 + 1)[1:].view(1, 3, 64, 64)
            torch.testing.assert_close(ours(x), ops(x), rtol=1e-2, atol=1.0)
    assert len(replays) == 2


def test_the_least_recently_used_graph_goes_and_its_memory_comes_back(replays):
    torch._dynamo.reset()
    model = network(32, 2)
    ours, ops = graphed(model, cuda_graphs_limit=2), plain(model)
    widths = [64, 96, 128, 160, 192]
    with torch.no_grad():
        for width in widths:
            for _ in range(3):
                x = picture(1, 3, 256, width)
                assert torch.equal(ours(x), ops(x))
        assert len(replays) == len(widths)
        graphs = [weakref.ref(graph) for graph in replays]
        replays.clear()
        gc.collect()
        # The first width has a compiled graph of its own; one that takes any width has the others.
        assert sum(graph() is not None for graph in graphs) == 1 + 2
        before = len(replays)
        x = picture(1, 3, 256, widths[-1])
        assert torch.equal(ours(x), ops(x)) and len(replays) == before + 1
        x = picture(1, 3, 256, widths[1])
        assert torch.equal(ours(x), ops(x)) and len(replays) == before + 1


def test_changed_weights_take_effect(replays):
    model = network()
    ours, ops, x = graphed(model), plain(model), picture()
    first = model.conv1.conv2d
    norm = next(m for m in model.modules() if isinstance(m, nn.InstanceNorm2d))
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.load_state_dict(network().state_dict()),
            lambda: first.weight.mul_(1.5),
            lambda: norm.weight.add_(0.25),
            lambda: setattr(first.weight, "data", first.weight.data * 0.5),
            lambda: setattr(first, "weight", nn.Parameter(first.weight * 0.5)),
        ):
            change()
            before = len(replays)
            results = [ours(x) for _ in range(4)]
            wanted = ops(x)
            assert all(torch.equal(out, wanted) for out in results)
            assert len(replays) == before + 2


def test_threads_and_streams(replays):
    model = network()
    ours, ops = graphed(model), plain(model)
    inputs = [picture(1, 3, 160, 128) for _ in range(3)]
    with torch.no_grad():
        expected = [ops(x) for x in inputs]
        for _ in range(3):
            ours(inputs[0])
    torch.cuda.synchronize()
    wrong, errors = [], []

    def work(index, own_stream):
        stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                for _ in range(30):
                    if not torch.equal(ours(inputs[index]), expected[index]):
                        wrong.append(index)
        except RuntimeError as error:
            errors.append(error)

    for own_stream in (True, False):
        threads = [threading.Thread(target=work, args=(i, own_stream)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == [] and wrong == [] and len(replays) == 1 + 2 * 3 * 30


def test_threads_that_meet_at_the_first_calls(replays):
    model = network()
    ours, ops = graphed(model), plain(model)
    inputs = [picture(1, 3, 96, 64 + 32 * (i % 2)) for i in range(4)]
    with torch.no_grad():
        expected = [ops(x) for x in inputs]
        ours(inputs[0])  # Dynamo compiles in one thread
        ours(inputs[1])
    torch.cuda.synchronize()
    wrong, errors, start = [], [], threading.Barrier(4)

    def work(index):
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                start.wait()
                for _ in range(20):
                    if not torch.equal(ours(inputs[index]), expected[index]):
                        wrong.append(index)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and wrong == [] and len(replays) > 40


def test_streams_without_a_wait_between_them(replays):
    model = network(32, 5)
    ours, ops = graphed(model), plain(model)
    inputs = [picture(1, 3, 256, 256) for _ in range(8)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        expected = [ops(x) for x in inputs]
        for _ in range(3):
            ours(inputs[0])
        torch.cuda.synchronize()
        for _ in range(5):
            results = []
            for i, x in enumerate(inputs):
                with torch.cuda.stream(streams[i % 2]):
                    results.append(ours(x))
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_inside_a_graph_of_the_users_own(replays):
    model = network()
    ours, ops, x = graphed(model), plain(model), picture()
    with torch.no_grad():
        for _ in range(4):
            ours(x)
        before = len(replays)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ours(x)
        assert len(replays) == before
        wanted = ops(x)
        for _ in range(2):
            out.zero_()
            graph.replay()
            assert torch.equal(out, wanted)
        assert torch.equal(ours(x), wanted) and len(replays) == before + 1


def test_training_runs_plainly_and_says_so_once(replays, caplog):
    model = TransformerNet(8, 1).to("cuda", torch.float32)
    ours, x = graphed(model), picture(1, 3, 32, 40, dtype=torch.float32)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(4):
            loss = ours(x).float().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert replays == [] and any(g is not None and torch.isfinite(g).all() for g in gradients)
    assert [r.message for r in caplog.records if r.name == LOGGER] == [
        "styleforge: no CUDA graph: gradients are needed (call it under torch.no_grad())"
    ]
    with torch.no_grad():
        for _ in range(3):
            out = ours(x)
    assert torch.isfinite(out).all()


def test_several_models(replays):
    models = [network(8 * (i + 1), 1) for i in range(3)] + [network(8, 1)]
    ours, ops = [graphed(m) for m in models], [plain(m) for m in models]
    with torch.no_grad():
        for _ in range(5):
            x = picture()
            for call, wanted in zip(ours, ops, strict=True):
                assert torch.equal(call(x), wanted(x))
    assert len(replays) == 3 * 4


class Foreign(nn.Module):
    """Operations of PyTorch before, between and after what is fused."""

    def __init__(self):
        super().__init__()
        self.inner = TransformerNet(8, 1)
        self.linear = nn.Linear(16, 16)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 120.0))

    def forward(self, x):
        y = self.inner(x - self.mean)
        y = self.norm(F.interpolate(y, size=(16, 16), mode="bilinear"))
        return self.linear(y), torch.sort(y, dim=1).values


def test_operations_of_pytorch_are_captured_too(replays):
    model = Foreign().eval().to("cuda", torch.float16)
    ours, ops = graphed(model), plain(model)
    with torch.no_grad():
        for _ in range(5):
            x = picture(1, 3, 64, 64)
            for out, wanted in zip(ours(x), ops(x), strict=True):
                assert torch.equal(out, wanted)
        assert len(replays) == 3
        model.mean.add_(1)  # a buffer
        for _ in range(3):
            x = picture(1, 3, 64, 64)
            assert torch.equal(ours(x)[0], ops(x)[0])


def test_a_capture_that_fails_leaves_pytorch_working(replays, caplog, monkeypatch):
    model = network()
    ours, ops, x = graphed(model), plain(model), picture()
    original = cuda_graphs.Graphed._captured

    def waiting(self, key, arguments, own):
        run = self._run

        def synchronises(*inputs):
            torch.cuda.current_stream().synchronize()
            return run(*inputs)

        self._run = synchronises
        try:
            return original(self, key, arguments, own)
        finally:
            self._run = run

    monkeypatch.setattr(cuda_graphs.Graphed, "_captured", waiting)
    with torch.no_grad(), caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(5):
            assert torch.equal(ours(x), ops(x))
    assert replays == []
    assert len([r for r in caplog.records if r.name == LOGGER]) == 1
    monkeypatch.undo()
    torch.rand(8, device="cuda")  # the generator is not stuck in the capture
    assert torch.cuda.memory_allocated() > 0
    other = graphed(network(8, 1))
    with torch.no_grad():
        for _ in range(4):
            other(x)
    torch.cuda.empty_cache()


def test_in_autocast():
    model = network(dtype=torch.float32)
    ours, ops, x = graphed(model), plain(model), picture(dtype=torch.float32)
    with torch.no_grad():
        for _ in range(5):
            with torch.autocast("cuda", torch.float16):
                assert torch.equal(ours(x), ops(x))


def test_memory_that_graphs_hold_is_counted():
    torch._dynamo.reset()
    found = []
    original = cuda_graphs.Graphed._make_room

    def seen(self, newest, most):
        found.append((self.bytes, most))
        original(self, newest, most)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cuda_graphs.Graphed, "_make_room", seen)
        model, x = network(32, 5), picture(1, 3, 512, 512)
        report = sf_compile.explain(model, x)
        ours = graphed(model)
        for _ in range(3):
            ours(x)
    ((size, most),) = found
    assert most == 0.25 * torch.cuda.get_device_properties(0).total_memory
    # The pool is made of whole segments of the allocator.
    assert report.memory[0].peak * 0.9 < size < report.memory[0].peak + 64 * 2**20


def test_a_device_that_is_not_the_current_one(replays):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = network().to("cuda:1")
    ours, ops, x = graphed(model), plain(model), picture(1, 3, 64, 64).to("cuda:1")
    with torch.no_grad():
        results = [ours(x) for _ in range(4)]
        wanted = ops(x)
    assert torch.cuda.current_device() == 0 and len(replays) == 2
    assert all(torch.equal(out, wanted) for out in results)
