"""The whole network on a GPU: pictures, determinism, streams, threads, graphs, and life without NVRTC."""

from __future__ import annotations

import copy
import logging
import threading

import numpy as np
import pytest
import torch
from cases import psnr, relative_error, replay_side_by_side

from sf_compile.backend import styleforge
from sf_compile.bench.checks import run_in_tf32
from sf_compile.models import TransformerNet

pytestmark = pytest.mark.gpu
CHECKPOINTS = ("candy_nc16.pth", "mosaic_nc16.pth", "rain_princess_nc16.pth", "udnie_nc16.pth")


def network(dtype: torch.dtype = torch.float16, width: int = 16, blocks: int = 2) -> TransformerNet:
    return TransformerNet(width, blocks).eval().to("cuda", dtype)


def compiled(model, **kwargs):
    return torch.compile(model, backend=styleforge, **kwargs)


def photo(path) -> torch.Tensor:
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_half_precision_pictures_equal_eagers(checkpoint, weights, photo_path):
    from sf_compile.models import load_checkpoint

    model = load_checkpoint(weights / checkpoint).to("cuda")
    x = photo(photo_path).to("cuda")
    with torch.inference_mode():
        exact = model.double()(x.double())
        eager = model.half()(x.half())
        ours = compiled(model)(x.half())
    assert psnr(ours, eager) > 60 and psnr(ours, exact) > 60
    assert psnr(ours, exact) > psnr(eager, exact) - 1


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_strict_float32_pictures_equal_eagers(checkpoint, weights, photo_path, strict_float32):
    from sf_compile.models import load_checkpoint

    model = load_checkpoint(weights / checkpoint).to("cuda")
    x = photo(photo_path).to("cuda")
    with torch.inference_mode():
        assert psnr(compiled(model)(x), model(x)) > 90


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_float32_pictures_equal_eagers(checkpoint, weights, photo_path):
    from sf_compile.models import load_checkpoint

    model = load_checkpoint(weights / checkpoint).to("cuda")
    x = photo(photo_path).to("cuda")
    with torch.inference_mode():
        ours, by_tf32 = compiled(model)(x), run_in_tf32(model, x)
        exact = model.double()(x.double())
    assert psnr(ours, exact) > 60 and psnr(ours, exact) > psnr(by_tf32, exact) - 1


@pytest.mark.parametrize("shape", [(1, 3, 37, 53), (3, 3, 20, 24), (1, 3, 128, 96)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_is_as_close_to_float64_as_tf32(shape, memory_format):
    model = network(torch.float32).to(memory_format=memory_format)
    x = (torch.rand(shape, device="cuda") * 255).contiguous(memory_format=memory_format)
    with torch.no_grad():
        eager, ours, by_tf32 = model(x), compiled(model)(x), run_in_tf32(model, x)
        exact = model.double()(x.double())
    assert ours.stride() == eager.stride() and ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 1.25 * relative_error(by_tf32, exact)


def test_tf32_is_used_while_it_is_allowed(monkeypatch):
    """Also by a region that has been replayed meanwhile."""
    model = network(torch.float32)
    fast = compiled(model)
    x = torch.rand(1, 3, 64, 48, device="cuda") * 255
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        for allowed in (True, False, True):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
            for _ in range(4):
                assert (relative_error(fast(x), exact) > 1e-4) is allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 37, 53), (3, 3, 20, 24), (1, 3, 128, 96)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_close_to_float64_as_eager_with_eagers_strides(dtype, shape, memory_format, strict_float32):
    model = network(dtype).to(memory_format=memory_format)
    x = (torch.rand(shape, device="cuda") * 255).to(dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        eager, ours = model(x), compiled(model)(x)
        exact = model.double()(x.double())
    assert ours.stride() == eager.stride() and ours.dtype == dtype
    assert relative_error(ours, exact) <= 1.25 * relative_error(eager, exact) + torch.finfo(dtype).eps


def test_the_same_bits_on_every_run_and_from_a_cuda_graph():
    model = compiled(network())
    x = (torch.rand(1, 3, 256, 192, device="cuda") * 255).half()
    with torch.no_grad():
        first = model(x)
        assert all(torch.equal(first, model(x)) for _ in range(5))
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            out = model(static)
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, first)
        static.copy_(x.flip(-1))
        graph.replay()
        assert torch.equal(out, model(x.flip(-1)))


def test_two_graphs_replayed_side_by_side():
    model = compiled(network())
    inputs = [(torch.rand(1, 3, 128, 128, device="cuda") * 255).half() for _ in range(2)]
    graphs, outputs = [], []
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        for x in inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append(model(x))
            graphs.append(graph)
    replay_side_by_side(graphs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_two_streams_and_two_threads_at_once():
    model = compiled(network())
    inputs = [(torch.rand(1, 3, 160, 128, device="cuda") * 255).half() for _ in range(2)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(20):
                if not torch.equal(model(inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_weights_changed_after_compiling_take_effect():
    model = network()
    fused = compiled(model)
    x = (torch.rand(1, 3, 64, 64, device="cuda") * 255).half()
    with torch.no_grad():
        fused(x)
        model.load_state_dict(network().state_dict())
        model.conv1.conv2d.weight.mul_(1.5)
        assert relative_error(fused(x), model(x)) < 1e-2


def test_gradients_equal_eagers(strict_float32):
    model = network(torch.float32, 8, 1)
    x = torch.rand(2, 3, 32, 40, device="cuda", requires_grad=True)
    upstream = torch.randn(2, 3, 32, 40, device="cuda")
    leaves = [x, *model.parameters()]
    eager = torch.autograd.grad((model(x) * upstream).sum(), leaves)
    ours = torch.autograd.grad((compiled(model)(x) * upstream).sum(), leaves)
    largest = max(float(g.norm()) for g in eager)
    for mine, theirs in zip(ours, eager, strict=True):
        assert float((mine - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-5 * largest


def test_without_nvrtc_everything_runs_in_pytorch_and_says_so_once(monkeypatch, caplog):
    from sf_compile.cuda import compiler

    model = network()
    x = (torch.rand(1, 3, 64, 64, device="cuda") * 255).half()
    with torch.no_grad():
        eager = model(x)
        monkeypatch.setattr(compiler, "available", lambda: "libnvrtc is missing (simulated)")
        compiler.usable_or_warn.cache_clear()
        with caplog.at_level(logging.WARNING, logger="sf_compile"):
            ours = compiled(model)(x)
            compiled(model)(x)
    compiler.usable_or_warn.cache_clear()
    warnings = [record for record in caplog.records if "simulated" in record.getMessage()]
    assert len(warnings) == 1
    assert relative_error(ours, eager) < 1e-2


def test_poisoned_memory_is_never_read():
    """Every output and workspace is written before it is read, whatever the allocator hands out."""
    model = compiled(network())
    x = (torch.rand(1, 3, 100, 76, device="cuda") * 255).half()
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            torch.cuda.empty_cache()
            poison = [torch.full((2**k,), float("nan"), device="cuda") for k in range(8, 24)]
            del poison
            assert torch.equal(model(x), expected)


FUSED = {"first_conv.cu", "halo_conv.cu", "last_conv.cu"}


def test_kernels_of_the_network_are_among_those_that_ci_compiles():
    from sf_compile.cuda import compiler, loader, variants

    with torch.no_grad():
        for dtype in (torch.float16, torch.float32):
            model, x = network(dtype), torch.rand(1, 3, 64, 64, device="cuda").to(dtype)
            compiled(model)(x)
    arch = compiler.architecture(torch.cuda.get_device_capability())
    listed = {(source, tuple(sorted(constants.items()))) for source, constants in variants.every(arch)}
    loaded = {(kernel.key.source, kernel.key.constants) for kernel in loader.loaded()}
    # The fused convolutions are compiled for any channels; those of the known networks are listed.
    ours = {key for key in loaded if key[0] in {source for source, _ in listed} - FUSED}
    assert ours and ours <= listed


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize(("height", "width", "joined"), [(64, 96, True), (600, 600, False)])
def test_fused_convolutions_are_what_runs_in_half_precision(monkeypatch, height, width, joined):
    from sf_compile.cuda import first_conv, halo_conv, last_conv, residual_trunk

    calls = []
    for kernel in (first_conv, halo_conv, last_conv):
        monkeypatch.setattr(kernel, "conv2d", counted(kernel.conv2d, kernel.SOURCE, calls))
    monkeypatch.setattr(residual_trunk, "trunk", counted(residual_trunk.trunk, residual_trunk.SOURCE, calls))
    model = network()
    with torch.no_grad():
        compiled(model)((torch.rand(1, 3, height, width, device="cuda") * 255).half())
    halo = ["halo_conv.cu"] * 2
    trunk = ["residual_trunk.cu"] if joined else halo * len(residual_blocks(model))
    assert calls == ["first_conv.cu", *halo, *trunk, *halo, "last_conv.cu"]


@pytest.mark.usefixtures("hopper_kernels")
def test_changed_weights_are_packed_inside_a_capture():
    model = compiled(network())
    x = (torch.rand(1, 3, 64, 96, device="cuda") * 255).half()
    with torch.no_grad():
        expected = model(x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state)  # the same numbers, but nothing that was packed is good any more
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(2):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)


def counted(function, name, calls):
    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return call


def residual_blocks(model: TransformerNet) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "ResidualBlock"]
