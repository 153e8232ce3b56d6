"""Recording and replaying a run of ops, on a GPU made of Python."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
import stand_in_gpu
import torch
from stand_in_gpu import FUNCTION, expected, graph_of, install, step, whole
from torch import nn

from sf_compile.cuda import kernel_graph, repeated
from sf_compile.cuda.driver_calls import KernelLaunchError
from sf_compile.cuda.recorder import observing
from sf_compile.cuda.repeated import Repeated

SHAPE = (1, 2, 3, 4)


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch)


def chain():
    """Three steps with a weight, a skip connection, and two results of which one is read on the way."""

    def build(call, x, weight):
        first = call(step, x, weight)
        second = call(step, first, None, x)
        third = call(step, second, weight, first, 0.5, True)
        return third, second

    return graph_of(build, 2)


def chained(x, weight):
    first = expected(x, weight)
    second = expected(first, None, x)
    return expected(second, weight, first, 0.5), second


def parameter():
    return nn.Parameter(whole(SHAPE))


def check(run, x, weight):
    results = run(x, weight)
    assert type(results) is tuple
    for ours, wanted in zip(results, chained(x, weight), strict=True):
        assert torch.equal(ours, wanted) and ours.stride() == wanted.stride()
    return results


def test_the_third_call_is_replayed_wherever_its_inputs_lie(gpu):
    run, weight = Repeated(chain()), parameter()
    with torch.no_grad():
        for _ in range(2):
            check(run, whole(SHAPE), weight)
        assert (gpu.launched, gpu.replayed) == (12, 0)
        kept = [(x, check(run, x, weight)) for x in (whole(SHAPE) for _ in range(4))]
        assert (gpu.launched, gpu.replayed) == (12, 24)
    for x, results in kept:  # no result is written by a later call
        assert all(torch.equal(a, b) for a, b in zip(results, chained(x, weight), strict=True))
    assert gpu.configs[0] == ((2, 1, 1), (32, 1, 1), 16, 5, [], FUNCTION)


@pytest.mark.parametrize(("mode", "attributes"), [("cooperative", [(2, 1)]), ("overlapping", [(6, 1)])])
def test_a_replay_launches_as_the_kernel_wants_it(monkeypatch, mode, attributes):
    gpu, run, weight = install(monkeypatch), Repeated(chain()), parameter()
    (kernel,) = stand_in_gpu.KERNELS
    with torch.no_grad():
        for _ in range(2):
            run(whole(SHAPE), weight)
        kernel.mode = mode
        check(run, whole(SHAPE), weight)
    found = [config[4] for config in gpu.configs]
    assert len(found) == 6 and all(each == attributes for each in found[1:])
    assert found[0] == ([] if mode == "overlapping" else attributes), "there is nothing before it to overlap"


def test_inference_mode_replays_too_and_returns_its_kind_of_tensor(gpu):
    run, weight = Repeated(chain()), parameter()
    with torch.inference_mode():
        for _ in range(3):
            results = check(run, whole(SHAPE), weight)
    assert gpu.replayed == 6 and all(out.is_inference() for out in results)


def test_a_written_weight_is_packed_anew_and_recorded_anew(gpu):
    run, weight = Repeated(chain()), parameter()
    x = whole(SHAPE)
    with torch.no_grad():
        for _ in range(3):
            check(run, x, weight)
        weight.mul_(1.5)
        replayed = gpu.replayed
        check(run, x, weight)
        check(run, x, weight)
        assert gpu.replayed == replayed
        check(run, x, weight)
        assert gpu.replayed == replayed + 6
        weight.data = whole(SHAPE)
        for _ in range(3):
            check(run, x, weight)
        assert gpu.replayed == replayed + 12


def test_a_parameter_that_is_read_where_it_lies_may_be_written(gpu):
    """Its numbers are not copied anywhere; only where it lies is part of what is repeated."""
    run = Repeated(graph_of(lambda call, x, skip: [call(step, x, None, skip)], 2))
    skip, x = parameter(), whole(SHAPE)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(run(x, skip)[0], expected(x, None, skip))
        skip.add_(1)
        assert torch.equal(run(x, skip)[0], expected(x, None, skip)) and gpu.replayed == 4
        skip.data = whole(SHAPE)
        for _ in range(3):
            assert torch.equal(run(x, skip)[0], expected(x, None, skip))
        assert gpu.replayed == 6


def test_another_parameter_in_its_place_is_not_mistaken_for_it(gpu):
    run, x = Repeated(chain()), whole(SHAPE)
    with torch.no_grad():
        for _ in range(4):
            weight = parameter()  # often at the address of the one before, with its version and its id
            for _ in range(3):
                check(run, x, weight)
            del weight
    assert gpu.replayed == 4 * 6


def test_nothing_is_kept_of_a_parameter_that_is_gone(gpu):
    run, weight = Repeated(chain()), parameter()
    with torch.no_grad():
        for _ in range(3):
            run(whole(SHAPE), weight)
    (kind,) = run._kinds.values()
    held = [weakref.ref(tensor) for tensor in kind.recording.constants]
    assert held
    del kind, weight
    gc.collect()
    assert not run._kinds
    assert sum(ref() is not None for ref in held) == 1, "the stream's workspace"


def test_a_recording_holds_no_picture(gpu):
    run, weight, x = Repeated(chain()), parameter(), whole(SHAPE)
    with torch.no_grad():
        for _ in range(2):
            results = run(x, weight)
    pictures = [weakref.ref(tensor) for tensor in (x, *results)]
    del x, results
    assert all(picture() is None for picture in pictures)


@pytest.mark.parametrize(
    "other",
    [
        lambda: whole(1, 2, 3, 5), lambda: whole(1, 4, 2, 3),
        lambda: whole(1, 3, 4, 2).permute(0, 3, 1, 2), lambda: whole(25)[1:].view(SHAPE),
    ],
    ids=["size", "shape", "strides", "alignment"],
)  # fmt: skip
def test_another_kind_of_input_is_recorded_on_its_own(gpu, other):
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    with torch.no_grad():
        for make in (lambda: whole(SHAPE), other):
            before = gpu.replayed
            for _ in range(3):
                x = make()
                (out,) = run(x)
            assert gpu.replayed == before + 2
            if x.is_contiguous():
                assert torch.equal(out, expected(x))
        before = gpu.launched
        x = whole(SHAPE)
        assert torch.equal(run(x)[0], expected(x)) and gpu.launched == before


def test_numbers_and_streams_are_part_of_the_kind(gpu):
    run = Repeated(graph_of(lambda call, x, scale: [call(step, x, None, None, scale)], 2))
    with torch.no_grad():
        for stream, scale in ((5, 2.0), (5, 3.0), (6, 3.0)):
            gpu.stream, before = stream, gpu.replayed
            for _ in range(3):
                x = whole(SHAPE)
                assert torch.equal(run(x, scale)[0], expected(x, scale=scale))
            assert gpu.replayed == before + 2 and gpu.configs[-1][3] == stream


def test_the_least_recently_used_kinds_are_dropped(gpu):
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    with torch.no_grad():
        for width in (1, *range(2, 9), 1, 9):
            for _ in range(3):
                run(whole(1, 1, 1, width))
        assert len(run._kinds) == repeated._MOST_KINDS
        before = gpu.replayed
        run(whole(1, 1, 1, 1))
        assert gpu.replayed == before + 2
        run(whole(1, 1, 1, 2))
        assert gpu.replayed == before + 2


def foreign(x):
    return torch.relu(step(x))


def returns_its_input(x):
    step(x)
    return x


def claims(x):
    out = step(x)
    if observing.recorder is not None:
        observing.recorder.uses(out)
    return step(out)


HIDDEN = whole(SHAPE)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (foreign, "aten.relu.default runs in it"),
        (returns_its_input, "it returns a tensor that is no allocation of its own"),
        (lambda x: step(x, None, HIDDEN), "points into unknown memory"),
        (claims, "memory that outlives it was a tensor of its own before"),
        (torch.empty_like, "no kernel of ours writes what it returns"),
        (lambda x: step(x, HIDDEN), "aten.detach.default runs in it"),
    ],
    ids=[
        "another operation",
        "an input",
        "unknown memory",
        "reused memory",
        "unwritten",
        "a weight that is no parameter",
    ],
)
def test_what_launches_alone_would_not_repeat_is_not_replayed(gpu, function, reason, caplog):
    run = Repeated(graph_of(lambda call, x: [call(function, x)], 1))
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="sf_compile"):
        for _ in range(5):
            run(whole(SHAPE))
    assert gpu.replayed == 0
    lines = [record.getMessage() for record in caplog.records if "not replayed" in record.getMessage()]
    assert len(lines) == repeated._MOST_ATTEMPTS and all(reason in line for line in lines)


def test_inputs_that_share_memory_are_not_replayed(gpu, caplog):
    run = Repeated(graph_of(lambda call, x, y: [call(step, x, None, y)], 2))
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="sf_compile"):
        for _ in range(4):
            x = whole(SHAPE)
            assert torch.equal(run(x, x.view(SHAPE))[0], expected(x, None, x))
    assert gpu.replayed == 0 and "two of its inputs share memory" in caplog.text


def test_memory_that_is_used_twice_is_told_apart(gpu):
    """The recorded call frees and reuses; the same addresses mean different tensors in different launches."""

    def build(call, x):
        for scale in (2.0, 3.0, 0.5, 7.0, 0.25):
            x = call(step, x, None, None, scale)
        return [x]

    run = Repeated(graph_of(build, 1))
    with torch.no_grad():
        for _ in range(4):
            x, wanted = whole(SHAPE), None
            wanted = x
            for scale in (2.0, 3.0, 0.5, 7.0, 0.25):
                wanted = expected(wanted, scale=scale)
            assert torch.equal(run(x)[0], wanted)
    (kind,) = run._kinds.values()
    assert gpu.replayed == 20 and kind.recording.arena.bytes == 2 * 512 and len(kind.recording.outputs) == 1


def test_gradients_go_through_the_ops(gpu):
    run = Repeated(graph_of(lambda call, x: [call(torch.sin, x)], 1))
    for _ in range(4):
        x = whole(SHAPE).requires_grad_()
        (out,) = run(x)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x.cos())
    assert not run._kinds


def test_without_a_gradient_to_take_grad_mode_replays(gpu):
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    for _ in range(3):
        run(whole(SHAPE))
    assert gpu.replayed == 2


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_what_watches_or_captures_sees_the_ops(gpu, monkeypatch):
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    x = whole(SHAPE)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        assert gpu.replayed == 2
        with Watching():
            run(x)
        with torch.overrides.BaseTorchFunctionMode():
            run(x)
        with torch.autograd.forward_ad.dual_level():
            run(x)
        run(x.as_subclass(Subclass))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run(x)
    assert gpu.replayed == 2 and len(run._kinds) == 1


def test_threads_have_arguments_of_their_own(gpu):
    run, weight = Repeated(chain()), parameter()
    with torch.no_grad():
        for _ in range(2):
            run(whole(SHAPE), weight)
    wrong: list[Exception] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    check(run, whole(SHAPE), weight)
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and gpu.replayed == 3 * 20 * 6
    assert len(set(gpu.contexts)) == 4, "every thread enters the kernels' context"


def test_a_launch_that_fails_names_its_kernel(gpu):
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    with torch.no_grad():
        for _ in range(2):
            run(whole(SHAPE))
        gpu.fail = True
        with pytest.raises(KernelLaunchError, match=r"cuGraphLaunch of 2 launches \(step\).*LAUNCH_FAILED"):
            run(whole(SHAPE))
        gpu.fail = False
        x = whole(SHAPE)
        assert torch.equal(run(x)[0], expected(x))


def test_a_launch_whose_new_arguments_are_rejected_is_named_and_told_again(gpu):
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    kept = [whole(SHAPE) for _ in range(3)]
    with torch.no_grad():
        for x in kept:
            run(x)
        gpu.reject = True
        for _ in range(2):
            with pytest.raises(KernelLaunchError, match=r"step \(step.cu.*grid 2x1x1, block 32.*LAUNCH_FAIL"):
                run(kept[0])
        gpu.reject = False
        assert torch.equal(run(kept[0])[0], expected(kept[0]))


def test_only_what_moved_is_told_to_the_graph(gpu):
    run, weight = Repeated(chain()), parameter()
    with torch.no_grad():
        for _ in range(3):
            run(whole(SHAPE), weight)
        assert gpu.updated == 6, "at first nobody knows where anything lies"
        (kind,) = run._kinds.values()
        replay, size = kind.threads.replay, kind.recording.arena.bytes
        arena, results, xs = torch.empty(size, dtype=torch.uint8), [whole(SHAPE), whole(SHAPE)], []
        for told in (None, 0, 2):  # x is read by the first launch and by the fourth
            if told != 0:
                xs.append(whole(SHAPE))
            before = gpu.updated
            replay([tensor.data_ptr() for tensor in (arena, xs[-1], *results)])
            assert told is None or gpu.updated == before + told
            ours = [results[i] for i in kind.recording.returned]
            wanted = chained(xs[-1], weight)
            assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_graphs_go_with_what_they_were_made_for(gpu):
    run, weight = Repeated(chain()), parameter()
    with torch.no_grad():
        for _ in range(3):
            run(whole(SHAPE), weight)
    assert len(gpu.graphs) == len(gpu.executables) == 1 and len(gpu.nodes) == 6
    del weight
    gc.collect()
    assert not (gpu.graphs or gpu.executables or gpu.nodes)


def test_without_edges_that_overlap_nothing_is_replayed(gpu, monkeypatch, caplog):
    monkeypatch.setattr(kernel_graph, "refusal", lambda: "the driver is older than CUDA 12.3")
    run = Repeated(graph_of(lambda call, x: [call(step, x)], 1))
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="sf_compile"):
        for _ in range(4):
            x = whole(SHAPE)
            assert torch.equal(run(x)[0], expected(x))
    assert gpu.replayed == 0 and "not replayed: the driver is older than CUDA 12.3" in caplog.text


def test_the_log_shows_the_arena(gpu, caplog):
    run, weight = Repeated(chain()), parameter()
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="sf_compile"):
        for _ in range(3):
            run(whole(SHAPE), weight)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("6 launches will be replayed; 4 buffers of 2048 bytes in 1024\n")
    assert "launches   0 to   1" in line
