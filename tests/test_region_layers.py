"""The host side of the fused convolutions, on a stand-in for Hopper: a whole network is a recording."""

from __future__ import annotations

import logging

import pytest
import torch
from stand_in_gpu import StandInGpu, install, stand_in_map

from sf_compile.backend import styleforge
from sf_compile.cuda import (
    convolution,
    first_conv,
    halo_conv,
    hopper,
    last_conv,
    normalization,
    residual_trunk,
)
from sf_compile.cuda.compiler import KernelKey
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.repeated import Repeated, _Implementations
from sf_compile.models import TransformerNet

FAMILY = first_conv, halo_conv, last_conv, residual_trunk


@pytest.fixture
def hopper_host(monkeypatch):
    """The fused convolutions are chosen for CPU tensors, and their launches go nowhere."""
    gpu = install(monkeypatch)
    monkeypatch.setattr(StandInGpu, "_arguments", lambda self, address: ())
    monkeypatch.setattr(StandInGpu, "_work", lambda self: None)

    def load(source, entry, constants, index, signature, mode="ordinary"):
        key = KernelKey(source, tuple(constants.items()), "sm_90a")
        kernel = Kernel(key, entry, signature, index, gpu, 77, "context", mode)
        kernel._shared_limit = hopper.SHARED_BYTES
        return kernel

    def mapped(address, dtype, shape, box, step=1, spread=1, to_tf32=False):
        assert address % 16 == 0
        return stand_in_map(address)

    for module in (*FAMILY, normalization):
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(module, "multiprocessors", lambda index: 132)
        module._kernel.cache_clear()
    for module in (first_conv, halo_conv):
        monkeypatch.setattr(module, "channels_last_map", mapped)
    monkeypatch.setattr(hopper, "refusal", lambda a: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(convolution, "_choices", {})
    monkeypatch.setattr(convolution, "usable_or_warn", lambda: True)
    yield gpu
    for module in (*FAMILY, normalization):
        module._kernel.cache_clear()


@pytest.fixture
def on_hopper(monkeypatch):
    """The trunk's kernel takes CPU tensors too."""
    monkeypatch.setattr(hopper, "runs_on", lambda x: x.dtype in hopper.OPERANDS)


def caught(model, x):
    """The region of ``model``, and the inputs that it is called with."""
    graphs, calls = [], []

    def backend(gm, inputs):
        forward = styleforge(gm, inputs)
        graphs.append(forward.__self__)
        return forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    region = graphs[0].region_0
    run = region.run
    region.run = lambda *inputs: (calls.append(inputs), run(*inputs))[1]
    compiled(x)
    region.run = run
    return region, calls[0]


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 37, 53)])
def test_a_network_of_fused_convolutions_is_recorded_as_launches(hopper_host, shape, caplog):
    model = TransformerNet(16, 3).eval().half()
    with torch.no_grad():
        region, inputs = caught(model, torch.rand(shape).half())
        run = Repeated(region.inner)
        _Implementations(region.inner).run(*inputs)  # packs the weights, as the first call does on a GPU
        with caplog.at_level(logging.DEBUG, logger="sf_compile.cuda"):
            results = [run(*inputs) for _ in range(3)]
    (kind,) = run._kinds.values()
    assert kind.recording is not None, caplog.text
    layers, passes = len(region.sites), 4  # a kept input, then a residual before each of three layers
    assert hopper_host.replayed == len(kind.recording.launches) == layers + passes == 12 + 4
    shapes = [(out.shape, out.stride(), out.dtype) for (out,) in results]
    assert shapes[0] == shapes[1] == shapes[2]
    # Ping-pong, and a kept tensor for the skip path: far less than every layer's output.
    total = sum(life.bytes for life in kind.recording.arena.lifetimes)
    assert kind.recording.arena.bytes < total / 2
    modes = [launch.kernel.mode for launch in kind.recording.launches]
    assert modes == ["overlapping"] * (layers + passes)
    maps = sum(len(launch.maps) for launch in kind.recording.launches)
    assert maps >= 2 * (layers - 2)


def test_a_network_is_recorded_with_its_trunk_as_one_launch(hopper_host, on_hopper, caplog):
    model = TransformerNet(16, 3).eval().half()
    with torch.no_grad():
        region, inputs = caught(model, torch.rand(1, 3, 64, 64).half())
        run = Repeated(region.inner)
        _Implementations(region.inner).run(*inputs)
        with caplog.at_level(logging.DEBUG, logger="sf_compile.cuda"):
            for _ in range(3):
                run(*inputs)
    (kind,) = run._kinds.values()
    assert kind.recording is not None, caplog.text
    launches = kind.recording.launches
    modes = [launch.kernel.mode for launch in launches]
    assert modes == [*["overlapping"] * 3, "cooperative", *["overlapping"] * 4]
    assert hopper_host.replayed == 8 and [(2, 1)] in [config[4] for config in hopper_host.configs]
    trunk = launches[3]
    assert (trunk.grid, trunk.block) == ((2, 1, 1), 256)
    table = trunk.arguments[0].addresses
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(table) == 6 + 2 * 5 and sum(address in own for address in table) == 2 * 5
    # x and its statistics, what the blocks exchange, four results; weights and meeting place stay.
    assert len(trunk.pointers) == 3 + 1 + 4


def test_norms_that_move_make_a_trunk_unfit_for_replays(hopper_host, on_hopper, caplog):
    model = TransformerNet(16, 2).eval().half()
    with torch.no_grad():
        region, inputs = caught(model, torch.rand(1, 3, 64, 64).half())
        run = Repeated(region.inner)
        norm = model.res1.in1.weight
        moving = [x.detach().clone() if x is norm else x for x in inputs]
        assert any(x is norm for x in inputs)
        with caplog.at_level(logging.DEBUG, logger="sf_compile.cuda"):
            for _ in range(3):
                run(*moving)
    assert "takes a table of addresses that may change" in caplog.text and hopper_host.replayed == 0
