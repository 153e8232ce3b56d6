"""csrc/halo_conv.cu from run to run: the same bits, streams, threads, CUDA graphs, changed weights."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import replay_side_by_side
from halo_layers import (
    BARE,
    DOUBLING,
    HALVING,
    KEEP,
    LARGE_SKIP,
    PLAIN,
    SKIP,
    SMALL_DOUBLING,
    check,
    compile_all,
    equal,
    made,
    run,
)

from sf_compile import ops
from sf_compile.cuda import halo_conv, packing, workspace

LAYERS = {
    "plain": PLAIN,
    "a pass for the residual": LARGE_SKIP,
    "skip": SKIP,
    "halving": HALVING,
    "doubling": DOUBLING,
}
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]


@pytest.fixture(scope="module")
def compiled(hopper_kernels):
    compile_all((layer, torch.float16) for layer in (*LAYERS.values(), BARE, KEEP, SMALL_DOUBLING))


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return request.param


@pytest.mark.parametrize("size", [(1, 37, 53), (3, 135, 241)])
def test_the_same_bits_in_five_calls(layer, size):
    a = made(layer, size)
    first = run(a)
    assert all(equal(run(a), first) for _ in range(5))


def test_on_two_streams_at_once(layer):
    calls = [made(layer, (2, 64, 96)), made(layer, (1, 37, 253))]
    expected = [run(a) for a in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    results = []
    torch.cuda.synchronize()
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, run(calls[i])))
    torch.cuda.synchronize()
    assert all(equal(result, expected[i]) for i, result in results)


@pytest.mark.parametrize("own_stream", [True, False])
def test_from_two_threads_at_once(layer, own_stream):
    calls = [made(layer, (2, 64, 96)), made(layer, (1, 37, 253))]
    expected = [run(a) for a in calls]
    streams = [torch.cuda.Stream() if own_stream else torch.cuda.current_stream() for _ in calls]
    torch.cuda.synchronize()
    start, failures = threading.Barrier(2), []

    def work(i):
        try:
            with torch.cuda.stream(streams[i]):
                start.wait()
                results = [run(calls[i]) for _ in range(20)]
                streams[i].synchronize()
                assert all(equal(result, expected[i]) for result in results)
        except (AssertionError, RuntimeError) as error:
            failures.append((i, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("warm", [True, False])
def test_captured_into_a_cuda_graph(layer, warm):
    a = made(layer, (2, 37, 53))
    inputs = [torch.randn_like(a.input) for _ in range(3)]
    fresh = a._replace(weight=a.weight.clone())  # never packed before
    graph = torch.cuda.CUDAGraph()
    if warm:
        run(fresh)
    with torch.cuda.graph(graph):
        first = run(fresh)
        second = run(fresh)
    for x in inputs:
        a.input.copy_(x)
        for picture in (*first, *second):
            picture.fill_(float("nan"))
        graph.replay()
        expected = run(a)
        assert equal(first, expected) and equal(second, expected)
    assert equal(run(fresh), expected)


def test_two_graphs_of_one_stream_replayed_side_by_side():
    calls = [made(PLAIN, (2, 64, 96)), made(DOUBLING, (1, 37, 253))]
    expected = [run(a) for a in calls]
    graphs, results = [], []
    for a in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([run(a) for _ in range(5)])
        graphs.append(graph)
    replay_side_by_side(graphs)
    for outputs, wanted in zip(results, expected, strict=True):
        assert all(equal(result, wanted) for result in outputs)


@pytest.mark.parametrize(
    "layers", [(PLAIN, LARGE_SKIP), (SKIP,), (KEEP,)], ids=["alternating", "skip", "keep"]
)
def test_a_chain_in_which_each_layer_waits_for_the_one_before(layers):
    """Kernels may start before their predecessors have finished, but not read before."""
    made_layers = [made(layer, (1, 135, 241)) for layer in layers]

    def chain(wait):
        first = made_layers[0]
        x, mean, variance, kept = first.input, first.mean, first.variance, made_layers[-1].residual
        for a in made_layers * 6:
            residual = None if a.residual is None else kept
            x, mean, variance, z = ops.conv2d(
                *a._replace(input=x, mean=mean, variance=variance, residual=residual)
            )
            kept = z if a.keep_input else kept
            wait()
        return x, mean, variance, kept

    expected = chain(torch.cuda.synchronize)
    assert all(result.isfinite().all() for result in expected)
    for _ in range(5):
        assert equal(chain(lambda: None), expected)


# ---- weights -----------------------------------------------------------------------------------------------


def test_a_weight_is_packed_once_for_each_version(layer, monkeypatch):
    packs = []
    pack = halo_conv.pack
    monkeypatch.setattr(halo_conv, "pack", lambda *given: packs.append(0) or pack(*given))
    a = made(layer, (1, 37, 53))
    a = a._replace(weight=torch.nn.Parameter(a.weight))
    with torch.no_grad():
        for _ in range(3):
            run(a)
        assert len(packs) == 1
        a.weight.mul_(-2)
        check(a)
        assert len(packs) == 2
        a.weight.data = torch.randn_like(a.weight) / 40
        check(a)
        assert len(packs) == 3


def test_weights_of_inference_mode(layer):
    a = made(layer, (1, 37, 53))
    with torch.inference_mode():
        b = a._replace(weight=a.weight.clone())
        assert b.weight.is_inference()
        assert equal(run(b), run(a))
        b.weight.mul_(-2)
        check(b)


def test_a_new_weight_on_a_busy_stream():
    """Packing is done on the stream: a kernel that fetches its weights early must not see them unfinished."""
    for _ in range(3):
        a = made(DOUBLING, (1, 37, 53))
        torch.cuda._sleep(20_000_000)
        weight = torch.nn.Parameter(a.weight * 1.5, requires_grad=False)
        results = run(a._replace(weight=weight))
        torch.cuda.synchronize()
        assert equal(results, run(a._replace(weight=weight.clone())))


def test_weights_packed_inside_a_graph_are_not_taken_for_finished():
    a = made(PLAIN, (1, 37, 53))
    a = a._replace(weight=torch.nn.Parameter(a.weight, requires_grad=False))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = packing.packed(a.weight, "test", torch.clone)
    assert not inside.finished and inside.launch_mode == "ordinary"
    outside = packing.packed(a.weight, "test", torch.clone)
    assert outside.finished and outside.weight is not inside.weight
    assert packing.packed(a.weight, "test", torch.clone).weight is outside.weight
    graph.replay()
    assert torch.equal(inside.weight, a.weight)


# ---- the workspace -----------------------------------------------------------------------------------------


def sums() -> torch.Tensor:
    """The memory in which the current stream's statistics meet."""
    stream = torch.cuda.current_stream().cuda_stream
    return workspace._of_stream[torch.cuda.current_device(), stream, "channel sums"][-1]


def test_launches_of_other_shapes_share_the_sums_without_leaking():
    calls = [
        made(PLAIN, (3, 37, 53)),
        made(SMALL_DOUBLING, (1, 9, 9)),
        made(SKIP, (2, 37, 53)),
        made(HALVING, (1, 5, 6)),
        made(BARE, (8, 8, 32)),
    ]
    for _ in range(2):
        for a in (*calls, *reversed(calls)):
            check(a)
            assert not sums().any(), "every launch leaves zeros to the next one"


def test_workspace_by_stream_purpose_and_size():
    device = torch.device("cuda", torch.cuda.current_device())
    address = workspace.zeroed(device, "test", 100)
    assert workspace.zeroed(device, "test", 4096) == address
    assert workspace.zeroed(device, "another test", 100) != address
    with torch.cuda.stream(torch.cuda.Stream()):
        assert workspace.zeroed(device, "test", 100) != address
    workspace.zeroed(device, "test", 1 << 20)
    memory = workspace._of_stream[device.index, torch.cuda.current_stream().cuda_stream, "test"][-1]
    assert memory.numel() >= 1 << 20 and not memory.any()
    assert workspace.zeroed(device, "test", 100) == memory.data_ptr(), "the larger one is kept"


def test_workspace_of_a_graph_is_its_own():
    device = torch.device("cuda", torch.cuda.current_device())
    eager = workspace.zeroed(device, "test", 100)
    addresses = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            addresses.append(workspace.zeroed(device, "test", 100))
            assert workspace.zeroed(device, "test", 100) == addresses[-1]
        addresses.append(graph)  # keeps its memory
    assert len({eager, addresses[0], addresses[2]}) == 3
    assert workspace.zeroed(device, "test", 100) == eager
