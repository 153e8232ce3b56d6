"""csrc/residual_trunk.cu on a GPU: against float64 and its layers one by one, and from run to run."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error, replay_side_by_side
from torch import Tensor

from sf_compile import ops
from sf_compile.backend import styleforge
from sf_compile.bench.checks import run_in_tf32
from sf_compile.cuda import loader, residual_trunk
from sf_compile.models import TransformerNet

EPS = 1e-5
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper_kernels")]


class Trunk(NamedTuple):
    """Arguments of the op."""

    x: Tensor
    mean: Tensor
    variance: Tensor
    weights: list[Tensor]
    norms: list[tuple[Tensor, Tensor]]  # of x, then those between the convolutions

    def __call__(self) -> tuple[Tensor, ...]:
        scales, shifts = map(list, zip(*self.norms, strict=True))
        return ops.residual_trunk(
            self.x, self.mean, self.variance, scales[0], shifts[0], EPS, "relu", self.weights, scales[1:],
            shifts[1:], EPS,
        )  # fmt: skip

    def layers(self) -> tuple[Tensor, ...]:
        """The same by ``conv2d`` (a gradient is wanted, so that no kernel runs all of it)."""
        with torch.enable_grad():
            out = self._replace(mean=self.mean.clone().requires_grad_())()
        return tuple(y.detach() for y in out)

    def exact(self) -> tuple[Tensor, ...]:
        """The same in float64."""

        def norm(x: Tensor, i: int) -> Tensor:
            scale, shift = (v.double() for v in self.norms[i])
            return F.instance_norm(x, weight=scale, bias=shift, eps=EPS)

        def conv(z: Tensor, weight: Tensor) -> Tensor:  # as a product of matrices: cuDNN is slow in float64
            columns = F.unfold(F.pad(z, (1, 1, 1, 1), mode="reflect"), 3)
            return (weight.double().flatten(1) @ columns).view(z.shape)

        z = norm(self.x.double(), 0).relu()
        for i in range(0, len(self.weights), 2):
            kept = z
            raw = conv(norm(conv(z, self.weights[i]), i + 1).relu(), self.weights[i + 1])
            if i + 2 < len(self.weights):
                z = norm(raw, i + 2) + z
        return raw, raw.mean((2, 3)), raw.var((2, 3), unbiased=False), kept


def made(h: int, w: int, c: int = 128, blocks: int = 2, dtype: torch.dtype = torch.float16) -> Trunk:
    def parameter(values: Tensor) -> Tensor:
        return torch.nn.Parameter(values.to("cuda", dtype), requires_grad=False)

    x = torch.randn(1, c, h, w) * 3 + torch.randn(1, c, 1, 1)
    x = x.to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    weights = [parameter(torch.randn(c, c, 3, 3) / (9 * c) ** 0.5) for _ in range(2 * blocks)]
    norms = [(parameter(1 + torch.randn(c) / 4), parameter(torch.randn(c) / 4)) for _ in weights]
    return Trunk(x, x.float().mean((2, 3)), x.float().var((2, 3), unbiased=False), weights, norms)


def equal(ours: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.fixture
def launches(monkeypatch):
    """Grows by one with every launch of the trunk's kernel that is not a replay."""
    seen, trunk = [], residual_trunk.trunk

    def counted(x: Tensor, *rest) -> tuple[Tensor, ...]:
        seen.append(tuple(x.shape))
        return trunk(x, *rest)

    monkeypatch.setattr(residual_trunk, "trunk", counted)
    return seen


CASES = {
    "one ragged tile each way": (13, 9, 128, 1), "TransformerNet at 512x512": (128, 128, 128, 5),
    "TransformerNet at 256x256": (64, 64, 128, 1), "ragged": (37, 53, 128, 5),
    "half a last column": (128, 120, 128, 5), "the smallest": (2, 2, 128, 1),
    "a last column of one": (9, 17, 128, 2), "64 channels": (100, 75, 64, 5),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_as_close_to_float64_as_its_layers(case, dtype, launches):
    trunk = made(*CASES[case], dtype)
    poison = torch.full((1 << 24,), float("nan"), device="cuda")  # what is not written shows up
    del poison
    ours = trunk()
    assert len(launches) == 1
    layers, exact = trunk.layers(), trunk.exact()
    assert len(launches) == 1
    for out, other, wanted, floor in zip(ours, layers, exact, (1e-6, 2e-4, 2e-4, 1e-6), strict=True):
        assert (out.shape, out.stride(), out.dtype) == (other.shape, other.stride(), other.dtype)
        assert relative_error(out, wanted) <= 1.25 * relative_error(other, wanted) + floor
    assert all(equal(trunk(), ours) for _ in range(20))


def test_norms_in_float32():
    trunk = made(37, 53)
    trunk = trunk._replace(norms=[(scale.float(), shift.float()) for scale, shift in trunk.norms])
    for out, wanted in zip(trunk(), trunk.exact(), strict=True):
        assert relative_error(out, wanted) < 0.01


def test_float32_that_may_not_be_rounded_is_run_by_layers(launches, strict_float32):
    trunk = made(37, 53, dtype=torch.float32)
    for out, wanted in zip(trunk(), trunk.exact(), strict=True):
        assert relative_error(out, wanted) < 1e-5
    assert launches == []


def test_a_picture_of_more_tiles_than_multiprocessors_is_run_by_layers(launches):
    trunk = made(8, 16 * (torch.cuda.get_device_properties(0).multi_processor_count + 1))
    assert equal(trunk(), trunk.layers()) and launches == []


def test_infinity_shows_up_as_in_the_layers_and_is_gone_in_the_next_call():
    trunk, clean = made(37, 53), made(37, 53)
    trunk.x[0, 5, 20, 20] = float("inf")
    trunk = trunk._replace(mean=trunk.x.float().mean((2, 3)), variance=trunk.x.float().var((2, 3)))
    expected = clean()
    for ours, theirs in zip(trunk(), trunk.layers(), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()
    assert all(out.isfinite().all() for out in expected) and equal(clean(), expected)


def test_on_two_streams_at_once():
    trunks = [made(64, 64, blocks=5), made(37, 53, blocks=3), made(64, 64, dtype=torch.float32)]
    expected = [trunk() for trunk in trunks]
    streams = [torch.cuda.Stream() for _ in trunks]
    results = []
    torch.cuda.synchronize()
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, trunks[i]()))
    torch.cuda.synchronize()
    assert all(equal(result, expected[i]) for i, result in results)


@pytest.mark.parametrize("warm", [True, False])
def test_captured_into_cuda_graphs(warm, launches):
    graphs, results = [], []
    trunks = [made(64, 64), made(37, 53, blocks=3, dtype=torch.float32)]
    for trunk in trunks:
        if warm:
            trunk()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([trunk() for _ in range(3)])
        graphs.append(graph)
    for trunk in trunks:
        trunk.x.mul_(-0.5)
        trunk.mean.mul_(-0.5)
        trunk.variance.mul_(0.25)
    replay_side_by_side(graphs)
    assert len(launches) == (8 if warm else 6)
    for trunk, outputs in zip(trunks, results, strict=True):
        expected = trunk()
        assert all(equal(out, expected) for out in outputs)


def test_a_changed_weight_takes_effect():
    trunk = made(37, 53)
    before = trunk()
    trunk.weights[1].mul_(0.5)
    after = trunk()
    assert not torch.equal(before[0], after[0])
    exact = trunk.exact()[3]
    assert relative_error(after[3], exact) <= 1.25 * relative_error(trunk.layers()[3], exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 512])
def test_a_whole_network(size, dtype, launches):
    model = TransformerNet().eval().to("cuda", dtype)
    x = (torch.rand(1, 3, size, size, device="cuda") * 255).to(dtype)
    ours = torch.compile(model, backend=styleforge)
    with torch.no_grad():
        # Eager mixes TF32 with float32, as cuDNN prefers.
        eager = run_in_tf32(model, x) if dtype == torch.float32 else model(x)
        results = [ours(x) for _ in range(4)]
        exact = model.double()(x.double())
    assert launches == [(1, 128, size // 4, size // 4)] * 2  # after these two, replays
    assert "residual_trunk" in {kernel.entry for kernel in loader.loaded()}
    assert all(torch.equal(out, results[0]) for out in results)
    assert relative_error(results[0], exact) <= 1.25 * relative_error(eager, exact)


def test_a_gradient_is_that_of_the_layers(launches):
    model = TransformerNet(16, 2).eval().to("cuda", torch.float16)
    x = (torch.rand(1, 3, 64, 64, device="cuda") * 255).half().requires_grad_()
    out = torch.compile(model, backend=styleforge)(x)
    (gradient,) = torch.autograd.grad(out.float().mean(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0 and launches == []
