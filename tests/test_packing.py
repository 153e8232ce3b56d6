"""Packed weights: made once for each version of a tensor, and dropped with it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sf_compile.cuda import packing
from sf_compile.cuda.packing import packed
from sf_compile.runtime.unchanged import Unchanged


class Pack:
    """Turns a weight round, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert not weight.requires_grad
        return weight.flip(0)


@pytest.fixture
def pack():
    return Pack()


def test_packed_once_for_each_version(pack):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    first = packed(weight, "flipped", pack)
    assert torch.equal(first.weight, weight.flip(0)) and not first.weight.requires_grad
    assert packed(weight, "flipped", pack).weight is first.weight and pack.calls == 1
    with torch.no_grad():
        weight.mul_(2)
    second = packed(weight, "flipped", pack)
    assert torch.equal(second.weight, weight.flip(0)) and pack.calls == 2
    assert packed(weight, "flipped", pack).weight is second.weight and pack.calls == 2
    assert first.finished and first.launch_mode == "overlapping"


def test_a_tensor_given_other_memory_is_packed_anew(pack):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    packed(weight, "flipped", pack)
    version = weight._version
    weight.data = torch.randn(4, 3)  # what Module.half() and .to() do
    assert weight._version == version
    assert torch.equal(packed(weight, "flipped", pack).weight, weight.flip(0)) and pack.calls == 2


@pytest.mark.parametrize("what", ["storage", "dtype"])
def test_memory_that_another_dtype_had_meanwhile_is_packed_anew(pack, what):
    """Module.half() and .bfloat16() change no version, and the allocator hands freed addresses out again."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    packed(weight, "flipped", pack)
    forms = packing._packed[weight]
    other = {"storage": StorageWeakRef(torch.empty(4).untyped_storage()), "dtype": torch.float16}[what]
    forms["flipped"] = forms["flipped"]._replace(**{what: other})
    assert torch.equal(packed(weight, "flipped", pack).weight, weight.flip(0)) and pack.calls == 2
    assert packed(weight, "flipped", pack).weight.dtype == torch.float32 and pack.calls == 2


def test_parameters_that_went_to_another_dtype_and_back_have_changed():
    layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8)))
    for _ in range(20):
        parameters = list(layers.parameters())
        before = Unchanged(parameters)
        assert before.holds_for(parameters)
        layers.half().float()  # may lie where it did
        assert not before.holds_for(parameters)


def test_every_form_is_kept_for_itself(pack):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    flipped = packed(weight, "flipped", pack).weight
    negated = packed(weight, "negated", torch.neg).weight
    assert torch.equal(negated, -weight)
    assert packed(weight, "flipped", pack).weight is flipped and pack.calls == 1
    assert packed(weight, "negated", torch.neg).weight is negated


def test_equal_tensors_are_told_apart(pack):
    one, other = torch.ones(4, 3), torch.ones(4, 3)
    assert packed(one, "flipped", pack).weight is not packed(other, "flipped", pack).weight
    assert pack.calls == 2


def test_dropped_with_the_tensor(pack):
    gc.collect()
    before = len(packing._packed)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    packed(weight, "flipped", pack)
    assert len(packing._packed) == before + 1
    del weight
    gc.collect()
    assert len(packing._packed) == before


def test_inference_tensors_have_no_version_to_watch(pack):
    gc.collect()
    before = len(packing._packed)
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.randn(4, 3))
        first = packed(weight, "flipped", pack)
        weight.mul_(2)
        second = packed(weight, "flipped", pack)
        assert torch.equal(second.weight, weight.flip(0)) and pack.calls == 2
    assert not first.finished and not second.finished and first.launch_mode == "ordinary"
    assert len(packing._packed) == before


def test_a_normal_tensor_packed_in_inference_mode_is_good_outside_of_it(pack):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    with torch.inference_mode():
        packed(weight, "flipped", pack)
    weight.detach().add_(1)
    assert torch.equal(packed(weight, "flipped", pack).weight, weight.flip(0))


def test_channels_last():
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    ours = packing.channels_last(weight)
    assert torch.equal(ours, weight) and ours.is_contiguous(memory_format=torch.channels_last)
    assert packing.channels_last(weight) is ours
    assert packing.channels_last(ours) is ours


def test_a_tensor_that_is_no_parameter_is_packed_every_time(pack):
    weight = torch.randn(4, 3)  # generated code may write it anew without a change of version
    assert not packed(weight, "flipped", pack).finished
    assert packed(weight, "flipped", pack).launch_mode == "ordinary" and pack.calls == 2


def test_a_cast_parameter_is_kept_and_packed_in_its_turn(pack):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    assert packing.cast(weight, torch.float32) is weight
    half = packing.cast(weight, torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half, weight.half()) and not half.requires_grad
    assert packing.cast(weight, torch.float16) is half
    first = packed(half, "flipped", pack)
    assert first.finished and packed(packing.cast(weight, torch.float16), "flipped", pack).finished
    assert pack.calls == 1
    with torch.no_grad():
        weight.mul_(2)
    again = packed(packing.cast(weight, torch.float16), "flipped", pack)
    assert torch.equal(again.weight, weight.half().flip(0)) and pack.calls == 2
    bfloat = packing.cast(weight, torch.bfloat16)
    assert bfloat.dtype == torch.bfloat16 and torch.equal(packing.cast(weight, torch.float16), weight.half())


def test_what_is_no_parameter_is_cast_in_every_call(pack):
    weight = torch.randn(4, 3)
    half = packing.cast(weight, torch.float16)
    assert half.dtype == torch.float16 and packing.cast(weight, torch.float16) is not half
