"""Replays stay right when weights come and go, calls are interrupted, and threads start together."""

from __future__ import annotations

import threading
import time

import pytest
import stand_in_gpu
import torch
from stand_in_gpu import expected, graph_of, install, step, whole
from torch import nn

from sf_compile.cuda import packing, repeated
from sf_compile.cuda.repeated import Repeated

SHAPE = (1, 2, 3, 4)


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch)


def one_step() -> Repeated:
    return Repeated(graph_of(lambda call, x, weight: [call(step, x, weight)], 2))


def recorded(run: Repeated, weight: nn.Parameter) -> None:
    for _ in range(3):
        run(whole(SHAPE), weight)


@torch.no_grad()
def test_a_packed_weight_that_somebody_else_renewed_is_not_taken_for_the_old_one(gpu):
    weight, run = nn.Parameter(whole(SHAPE)), one_step()
    recorded(run, weight)
    assert gpu.replayed == 2
    # As on a GPU when another network asks after `weight.data` was exchanged for a while: the same memory,
    # another weight's numbers, and the parameter as it was.
    (kept,) = packing._packed[weight].values()
    kept.weight.fill_(99)
    packing._packed[weight]["stand-in"] = kept._replace(address=0)
    x = whole(SHAPE)
    assert torch.equal(run(x, weight)[0], expected(x, weight)) and gpu.replayed == 2


@torch.no_grad()
def test_an_interrupted_replay_leaves_no_address_behind(gpu, monkeypatch):
    weight, run = nn.Parameter(whole(SHAPE)), one_step()
    xs = [whole(SHAPE) for _ in range(3)]
    recorded(run, weight)
    run(xs[0], weight)
    ((kind,),) = [list(run._kinds.values())]
    replay = kind.threads.replay
    bases = list(replay._bases)

    def interrupt(address):
        raise KeyboardInterrupt

    maps = [list(group) for group in replay._maps]
    for group in replay._maps:
        group[:] = [(at, interrupt, offset) for at, _, offset in group]
    with pytest.raises(KeyboardInterrupt):
        replay([base + 64 for base in bases])
    for group, before in zip(replay._maps, maps, strict=True):
        group[:] = before
    written = [None if base is None else base for base in replay._bases]
    assert written != bases, "what was half written is not taken for what was there before"
    assert torch.equal(run(xs[1], weight)[0], expected(xs[1], weight))


def test_threads_that_start_together_end_up_replaying(gpu, monkeypatch):
    def slow(weight):
        time.sleep(0.02)
        return weight * 3

    def slow_step(x, weight):
        packing.packed(weight, "slow", slow)
        return step(x, weight)

    weight = nn.Parameter(whole(SHAPE))
    run = Repeated(graph_of(lambda call, x, w: [call(slow_step, x, w)], 2))
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        with torch.no_grad():
            for _ in range(3):
                run(whole(SHAPE), weight)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = gpu.replayed
    with torch.no_grad():
        for _ in range(3):
            x = whole(SHAPE)
            assert torch.equal(run(x, weight)[0], expected(x, weight))
    assert gpu.replayed > before
    (kind,) = run._kinds.values()
    assert kind.attempts == 0, "nobody recorded while the first call was packing weights"


@torch.no_grad()
def test_a_default_device_is_no_reason_not_to_replay(gpu):
    weight, run = nn.Parameter(whole(SHAPE)), one_step()
    with torch.device("cpu"):
        recorded(run, weight)
    assert gpu.replayed == 2


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_other_modes_that_see_functions_are_one(gpu):
    weight, run = nn.Parameter(whole(SHAPE)), one_step()
    with torch.device("cpu"), Watching():
        assert repeated.watched()
        recorded(run, weight)
    assert gpu.replayed == 0


def test_weights_packed_in_inference_mode_are_renewed_outside_of_it():
    weight = nn.Parameter(whole(SHAPE))
    with torch.inference_mode():
        first = packing.packed(weight, "thrice", lambda w: w * 3)
    assert not first.weight.is_inference()
    with torch.no_grad():
        weight.add_(1)
        first.weight.copy_(packing.packed(weight, "thrice", lambda w: w * 3).weight)
    assert torch.equal(first.weight, weight.detach() * 3)


@torch.no_grad()
def test_tensors_of_two_devices_are_left_to_the_ops(gpu):
    calls = []
    run = Repeated(graph_of(lambda call, x, y: [call(lambda a, b: calls.append(1) or a, x, y)], 2))
    run._ops = lambda x, y: calls.append("op by op") or (x,)
    for _ in range(4):
        run(whole(SHAPE), torch.empty(SHAPE, device="meta"))
    assert calls == ["op by op"] * 4 and stand_in_gpu.KERNELS and gpu.replayed == 0
