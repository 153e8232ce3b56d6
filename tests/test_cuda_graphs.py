"""Which calls are captured, replayed or left alone; with graphs made of Python in CUDA's place."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref

import pytest
import torch
from torch import nn

from sf_compile.runtime import cuda_graphs
from sf_compile.runtime.cuda_graphs import Graphed
from sf_compile.runtime.graph_device import NotCapturable

LOGGER = "sf_compile.runtime.cuda_graphs"


class StandInGraph:
    """Calls again, with inputs and results of its own as a graph has them."""

    bytes = 100

    def __init__(self, run, inputs, own):
        self.run, self.own = run, own
        # Parameters are read where they are, and not kept alive.
        self.inputs = [weakref.ref(x) if isinstance(x, nn.Parameter) else lambda x=x: x for x in inputs]
        run(*inputs)
        self.addresses = [x.data_ptr() for x in inputs if isinstance(x, torch.Tensor)]
        self.replayed = 0
        self.lock = threading.Lock()

    def replay(self, inputs):
        with self.lock:
            self.replayed += 1
            assert len(inputs) == len(self.own)
            for own, x in zip(self.own, inputs, strict=True):
                own.copy_(x)
            fresh = self.run(*(x() for x in self.inputs))
            if isinstance(fresh, torch.Tensor):
                return fresh.clone()
            return type(fresh)(x.clone() if isinstance(x, torch.Tensor) else x for x in fresh)


class StandInDevice:
    def __init__(self):
        self.graphs, self.total, self.watched, self.precision = [], 10_000, False, "ieee"
        self.errors = []
        self.reason = None

    def refusal(self, tensors):
        return self.reason

    def busy(self):
        return self.watched

    def settings(self):
        return (self.precision,)

    def current(self, tensor):
        return contextlib.nullcontext()

    def memory(self, tensor):
        return self.total

    def release(self):
        self.released = True

    def own(self, inputs):
        return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in inputs]

    def capture(self, run, inputs, own):
        if self.errors:
            raise self.errors.pop(0)
        self.graphs.append(StandInGraph(run, inputs, own))
        return self.graphs[-1]

    @property
    def replayed(self):
        return sum(graph.replayed for graph in self.graphs)


@pytest.fixture
def device():
    return StandInDevice()


def run(x, weight=None, number=1):
    """A graph as Dynamo's: returns a tuple, of which one part may be none of its tensors."""
    out = x * number if weight is None else x * weight * number
    return out, None


def graphed(device, function=run, bound=(), limit=8, share=0.5):
    return Graphed(function, bound, limit, share, device)


def picture(*shape):
    return torch.rand(shape or (1, 3, 4, 5))


def check(call, *inputs):
    with torch.no_grad():
        out, none = call(*inputs)
        assert none is None and torch.equal(out, run(*inputs)[0])
    return out


def test_the_third_call_is_replayed_and_no_result_is_written_again(device):
    call, kept = graphed(device), []
    for _ in range(5):
        x = picture()
        kept.append((x, check(call, x)))
    assert len(device.graphs) == 1 and device.replayed == 3
    assert all(torch.equal(out, run(x)[0]) for x, out in kept)
    assert len({out.data_ptr() for _, out in kept}) == 5


@pytest.mark.parametrize(
    "other",
    [
        lambda: picture(1, 3, 4, 6),
        lambda: picture(2, 3, 4, 5),
        lambda: picture().double(),
        lambda: picture().contiguous(memory_format=torch.channels_last),
        lambda: picture(1, 3, 4, 10)[..., ::2],
    ],
    ids=["shape", "batch", "dtype", "strides", "not dense"],
)
def test_another_kind_of_input_has_a_graph_of_its_own(device, other):
    call = graphed(device)
    for _ in range(3):
        check(call, picture())
        check(call, other())
    assert len(device.graphs) == 2 and device.replayed == 2
    assert call.graphs == 2 and call.bytes == 200


def test_numbers_and_settings_are_a_part_of_the_kind(device):
    call = graphed(device)
    for number in (2, 2.0, 3.0):
        for _ in range(3):
            check(call, picture(), None, number)
    assert len(device.graphs) == 3
    device.precision = "tf32"
    check(call, picture(), None, 2)
    assert device.replayed == 3


def test_a_number_that_dynamo_keeps_in_a_tensor_is_a_part_of_the_kind(device):
    def scaled(x, number):
        return x * number.item(), None

    call = graphed(device, scaled)
    for number in (2.0, 3.0, 2.0):
        for _ in range(3):
            x = picture()
            with torch.no_grad():
                assert torch.equal(call(x, torch.tensor(number))[0], x * number)
    assert len(device.graphs) == 2 and device.replayed == 2 + 3


def test_weights_are_read_where_they_are(device):
    call, weight = graphed(device), nn.Parameter(picture())
    for _ in range(3):
        check(call, picture(), weight)
    (graph,) = device.graphs
    assert weight.data_ptr() in graph.addresses
    assert len(graph.own) == 1


def test_a_buffer_that_stays_where_it_is_is_bound_too(device):
    call, buffer = graphed(device, bound={1}), picture()
    for _ in range(3):
        check(call, picture(), buffer)
    assert len(device.graphs[0].own) == 1 and buffer.data_ptr() in device.graphs[0].addresses


@pytest.mark.parametrize("change", ["written", "moved", "replaced"])
def test_changed_weights_are_captured_anew(device, change):
    call, weight = graphed(device), nn.Parameter(picture())
    for _ in range(3):
        check(call, picture(), weight)
    with torch.no_grad():
        if change == "written":
            weight.mul_(2)
        elif change == "moved":
            weight.data = picture()
        else:
            weight = nn.Parameter(picture())
    for _ in range(4):
        check(call, picture(), weight)
    assert [graph.replayed for graph in device.graphs] == [1, 2]
    assert call.graphs == 1


def test_a_graph_goes_with_its_parameters(device):
    call, weight = graphed(device), nn.Parameter(picture())
    for _ in range(3):
        check(call, picture(), weight)
    assert call.graphs == 1
    del weight
    device.graphs.clear()
    gc.collect()
    assert call.graphs == 0


def test_two_models_that_share_a_compiled_graph_keep_a_graph_each(device):
    call, weights = graphed(device), [nn.Parameter(picture()) for _ in range(2)]
    for _ in range(4):
        for weight in weights:
            check(call, picture(), weight)
    assert [graph.replayed for graph in device.graphs] == [2, 2]


def test_weights_that_change_at_every_call_are_never_captured(device, caplog):
    call, weight = graphed(device), nn.Parameter(picture())
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(8):
            check(call, picture(), weight)
            with torch.no_grad():
                weight.add_(1)
    assert device.graphs == []
    assert [r.message for r in caplog.records] == [
        "styleforge: no CUDA graph: the weights change from call to call: a graph is captured once they rest"
    ]


def test_the_least_recently_used_graph_goes_first(device):
    call = graphed(device, limit=2)
    sizes = [(1, 3, 4, width) for width in (5, 6, 7)]
    for size in sizes[:2]:
        for _ in range(3):
            check(call, picture(*size))
    check(call, picture(*sizes[0]))  # used again
    for _ in range(2):
        check(call, picture(*sizes[2]))
    assert call.graphs == 2 and len(device.graphs) == 3
    before = device.replayed
    check(call, picture(*sizes[0]))
    check(call, picture(*sizes[2]))
    assert device.replayed == before + 2
    check(call, picture(*sizes[1]))  # begins anew
    assert device.replayed == before + 2


def test_sizes_that_come_once_take_no_graph_away(device):
    call = graphed(device, limit=1)
    for _ in range(2):
        check(call, picture())
    for width in range(10, 10 + 2 * cuda_graphs._UNCAPTURED):
        check(call, picture(1, 1, 1, width))
    check(call, picture())
    assert device.replayed == 1
    assert len(call._kinds) <= cuda_graphs._UNCAPTURED + 1


def test_memory_limits_graphs_too(device):
    device.total = 500  # of which graphs may hold half: two of 100
    call = graphed(device, limit=8, share=0.5)
    for width in (5, 6, 7):
        for _ in range(2):
            check(call, picture(1, 3, 4, width))
    assert call.graphs == 2 and call.bytes == 200


def test_a_graph_that_is_larger_than_all_may_be_is_not_kept(device, caplog):
    device.total = 100
    call = graphed(device, share=0.5)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(5):
            check(call, picture())
    assert call.graphs == 0 and len(device.graphs) == 1
    assert "more than cuda_graphs_memory=0.5" in caplog.text and len(caplog.records) == 1


def test_where_memory_is_short_a_new_graph_takes_the_place_of_the_others(device):
    call = graphed(device)
    for _ in range(3):
        check(call, picture())
    check(call, picture(1, 3, 4, 6))
    device.errors = [torch.OutOfMemoryError("none left")]
    check(call, picture(1, 3, 4, 6))
    assert call.graphs == 1
    check(call, picture(1, 3, 4, 6))
    assert [graph.replayed for graph in device.graphs] == [1, 1] and device.released


def test_where_there_is_no_room_for_another_input_the_call_runs_on_the_callers(device, caplog):
    def short(x):
        if x.data_ptr() != given.data_ptr():
            raise torch.OutOfMemoryError("none left")
        return x * 2

    call = graphed(device, short)
    with caplog.at_level(logging.WARNING, LOGGER), torch.no_grad():
        for _ in range(5):
            given = picture()
            assert torch.equal(call(given), given * 2)
    assert device.graphs == [] and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotCapturable("operation not permitted when stream is capturing"), "operation not permitted"),
        (torch.OutOfMemoryError("none left"), "the GPU has no memory left for a graph"),
    ],
)
def test_a_capture_that_fails_is_tried_again_once_and_said_once(device, caplog, error, said):
    device.errors = [error] * 10
    call = graphed(device)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(8):
            check(call, picture())
    assert device.graphs == []
    tries = 10 - len(device.errors)
    assert tries == cuda_graphs.MOST_ATTEMPTS * (2 if isinstance(error, torch.OutOfMemoryError) else 1)
    assert len(caplog.records) == 1 and said in caplog.records[0].message


def test_a_capture_that_another_thread_is_in_the_way_of_is_tried_again(device, caplog):
    device.errors = [NotCapturable("another thread is capturing", again=True)] * 5
    call = graphed(device)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(8):
            check(call, picture())
    assert len(device.graphs) == 1 and device.replayed == 1 and caplog.records == []


def test_calls_that_need_gradients_run_as_they_are(device, caplog):
    call, weight = graphed(device), nn.Parameter(picture())
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(4):
            out, _ = call(picture(), weight)
            assert out.requires_grad
    assert device.graphs == []
    assert [r.message for r in caplog.records] == [
        "styleforge: no CUDA graph: gradients are needed (call it under torch.no_grad())"
    ]
    for _ in range(3):
        check(call, picture(), weight)
    assert device.replayed == 1


def test_calls_that_are_captured_or_watched_by_others_just_run(device, caplog):
    call = graphed(device)
    for _ in range(3):
        check(call, picture())
    device.watched = True
    with caplog.at_level(logging.DEBUG, LOGGER):
        check(call, picture())
    assert device.replayed == 1 and caplog.records == []


def test_what_the_device_refuses_runs_as_it_is(device, caplog):
    device.reason = "an input is on the CPU"
    call = graphed(device)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(4):
            check(call, picture())
    assert device.graphs == [] and len(caplog.records) == 1


class Subclass(torch.Tensor):
    pass


def test_other_inputs_than_plain_tensors_run_as_they_are(device, caplog):
    call = graphed(device, lambda x: (x + 1, None))
    with caplog.at_level(logging.WARNING, LOGGER), torch.no_grad():
        for _ in range(4):
            call(picture().as_subclass(Subclass))
    assert device.graphs == [] and "neither a plain tensor nor a number" in caplog.text


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: (x.add_(1), None), "it writes to its inputs"),
        (lambda x: (x.view(-1), None), "it returns an input or a view of one"),
        (lambda x: (x, None), "it returns an input or a view of one"),
        (lambda x: [y := x * 2, y[0]], "two tensors of the same memory"),
    ],
    ids=["writes", "view", "input", "views of each other"],
)
def test_what_a_replay_would_get_wrong_is_left_alone(device, caplog, function, said):
    call = graphed(device, function)
    with caplog.at_level(logging.WARNING, LOGGER), torch.no_grad():
        for _ in range(4):
            x = picture()
            wanted = function(x.clone())
            for ours, other in zip(call(x), wanted, strict=True):
                assert ours is other or torch.equal(ours, other)
    assert device.graphs == []
    assert len(caplog.records) == 1 and said in caplog.records[0].message


def test_a_tensor_that_is_returned_twice_and_one_that_is_given_twice(device):
    def both(x, y):
        total = x + y
        return total, total

    call = graphed(device, both)
    with torch.no_grad():
        for _ in range(2):
            x = picture()
            call(x, x)
        x, y = picture(), picture()
        first, second = call(x, y)
    assert device.replayed == 1 and torch.equal(first, x + y) and torch.equal(second, x + y)


def test_inference_mode(device):
    call = graphed(device)
    with torch.inference_mode():
        for _ in range(3):
            out = check(call, picture())
    assert device.replayed == 1
    weight = None
    with torch.inference_mode():
        weight = nn.Parameter(picture())
    for _ in range(3):
        check(call, picture(), weight)
    assert out is not None and device.replayed == 1 and len(device.graphs) == 1


def test_threads_get_their_own_pictures(device):
    call, weight, wrong = graphed(device), nn.Parameter(picture()), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for i in range(40):
                x = torch.rand(1, 3, 4, 5 + i % 2, generator=generator)
                w = weight if i % 2 == 0 else None
                if not torch.equal(call(x, w)[0], run(x, w)[0]):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(device.graphs) == 2


def test_an_error_of_the_call_is_the_callers(device):
    def fails(x):
        raise ValueError("mine")

    call = graphed(device, fails)
    for _ in range(3):
        with pytest.raises(ValueError, match="mine"), torch.no_grad():
            call(picture())
