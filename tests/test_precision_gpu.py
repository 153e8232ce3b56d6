"""Precisions on a GPU: the kernels that read and write another dtype, and whole networks, replayed too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import Tensor

from sf_compile import explain, tf32
from sf_compile.backend import styleforge
from sf_compile.bench.checks import run_in_tf32
from sf_compile.cuda import convolution, first_conv, last_conv, normalization, repeated
from sf_compile.cuda.recorder import Recorder
from sf_compile.models import TransformerNet
from sf_compile.ops import reference
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.ops.normalize import Norm
from sf_compile.precision import storage

pytestmark = pytest.mark.gpu
SIXTEEN_BIT = {"fp16": torch.float16, "bf16": torch.bfloat16}


def network(dtype: torch.dtype = torch.float32, width: int = 16, blocks: int = 2) -> TransformerNet:
    return TransformerNet(width, blocks).eval().to("cuda", dtype)


def compiled(model: Any, precision: str = "auto") -> Any:
    return torch.compile(model, backend=styleforge, options={"precision": precision})


def eager_in(model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    return copy.deepcopy(model).to(dtype)(x.to(dtype))


@pytest.fixture
def replays(monkeypatch):
    """Grows by one with every call that is replayed."""
    calls, replay = [], repeated._replay
    monkeypatch.setattr(repeated, "_replay", lambda *a: (calls.append(1), replay(*a))[1])
    return calls


@pytest.fixture
def recorded(monkeypatch):
    """The kernels that are launched while a region is recorded, in its second call."""
    kernels, launched = [], Recorder.launched

    def noting(self, kernel, *rest):
        kernels.append(kernel)
        return launched(self, kernel, *rest)

    monkeypatch.setattr(Recorder, "launched", noting)
    return kernels


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str, **changes: Any) -> Arguments:
    kernel = weight.shape[2] // 2
    plain = Arguments(
        x, weight, bias, None, None, None, None, 1.0, "none", None, 1, [kernel] * 4, "reflect", [1, 1],
        "none", False, False, True, False, precision,
    )  # fmt: skip
    return plain._replace(**changes)


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, device="cuda") / 4, requires_grad=False)


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "out", "kernel"), [(3, 32, 9), (1, 16, 3), (4, 40, 5)])
def test_the_first_convolution_reads_a_float32_picture(precision, layout, channels, out, kernel):
    dtype = SIXTEEN_BIT[precision]
    x = (torch.rand(2, channels, 37, 53, device="cuda") * 255).contiguous(memory_format=layout)
    weight, bias = parameter(out, channels, kernel, kernel), parameter(out)
    a = convolve(x, weight, bias, precision, statistics=True, output_activation="relu")
    assert convolution.choice(convolution._in_precision(a)) == (first_conv, False, False)
    ours = convolution.conv2d(a)
    same = convolution.conv2d(
        a._replace(input=x.to(dtype), weight=weight.to(dtype), bias=bias.to(dtype), precision="auto")
    )
    assert all(map(torch.equal, ours, same))  # the rounding of the picture is the only difference


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("channels", "out", "kernel"), [(32, 3, 9), (16, 3, 9), (64, 3, 3)])
def test_the_last_convolution_writes_a_float32_picture(precision, channels_last, channels, out, kernel):
    dtype = SIXTEEN_BIT[precision]
    x = torch.randn(2, channels, 37, 53, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = torch.randn(2, channels, device="cuda"), torch.rand(2, channels, device="cuda") + 0.5
    weight, bias = parameter(out, channels, kernel, kernel), parameter(out)
    a = convolve(
        x, weight, bias, precision, mean=mean, variance=variance, norm_weight=parameter(channels),
        norm_bias=parameter(channels), eps=1e-5, activation="relu", channels_last=channels_last,
        out_dtype=torch.float32,
    )  # fmt: skip
    assert convolution.choice(convolution._in_precision(a)) == (last_conv, False, False)
    (ours, *_), (rounded, *_) = convolution.conv2d(a), convolution.conv2d(a._replace(out_dtype=None))
    assert ours.dtype == torch.float32 and ours.stride() == rounded.stride()
    assert torch.equal(ours.to(dtype), rounded)


def layers() -> list[tuple[str, dict[str, Any]]]:
    """What no kernel reads or writes in another dtype: a pass of ours does."""
    return [
        ("wide input", {"channels": 8}), ("strided", {"channels": 8, "stride": [2, 2]}),
        ("upsampled", {"channels": 16, "upsample": 2}), ("odd channels", {"channels": 5, "out": 7}),
        ("wide output", {"channels": 8, "out_dtype": torch.float32}),
        ("residual", {"channels": 16, "residual": True}), ("strict", {"channels": 8, "precision": "fp32"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), layers(), ids=[name for name, _ in layers()])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_other_layer_in_any_dtype(name, changes, layout):
    changes = dict(changes)
    channels, out = changes.pop("channels"), changes.pop("out", 16)
    precision = changes.pop("precision", "fp16")
    x = torch.randn(2, channels, 20, 22, device="cuda").contiguous(memory_format=layout)
    if precision == "fp32":
        x = x.half()
    weight, bias = parameter(out, channels, 3, 3), parameter(out)
    if changes.pop("residual", False):
        changes.update(
            residual=torch.randn_like(x).half(), mean=torch.randn(2, channels, device="cuda"),
            variance=torch.rand(2, channels, device="cuda") + 0.5, eps=1e-5, keep_input=True,
        )  # fmt: skip
    a = convolve(x, weight, bias, precision, **changes)
    ours = convolution.conv2d(a)
    doubled = a._replace(
        **{k: v.double() for k, v in a._asdict().items() if isinstance(v, Tensor)}, precision="auto",
        out_dtype=None,
    )  # fmt: skip
    exact = torch.ops.styleforge.conv2d.default(*doubled)
    assert ours[0].dtype == a.output_dtype and ours[0].stride() == exact[0].stride()
    assert relative_error(ours[0], exact[0]) < 3 * torch.finfo(a.dtype).eps
    if a.keep_input:
        assert ours[3].dtype == a.dtype and relative_error(ours[3], exact[3]) < torch.finfo(a.dtype).eps


@pytest.mark.parametrize("strict", [True, False])
def test_tf32_is_what_was_asked_for(strict):
    """By the error of a sum of many products: TF32 keeps 10 bits of each operand."""
    x, weight = torch.randn(1, 64, 32, 32, device="cuda"), parameter(64, 64, 3, 3)
    exact = F.conv2d(F.pad(x.double(), (1, 1, 1, 1), "reflect"), weight.double())
    precision = "fp32" if strict else "tf32"
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if strict else "ieee"
    try:
        op = torch.ops.styleforge.conv2d.default
        out = op(*convolve(x, weight, None, precision, channels_last=False))[0]
        y = x.clone().requires_grad_()
        again = op(*convolve(y, weight, None, precision, channels_last=False))[0]
        (gradient,) = torch.autograd.grad(again.square().sum(), y)
        assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if strict else "ieee")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    z = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(
        F.conv2d(F.pad(z, (1, 1, 1, 1), "reflect"), weight.double()).square().sum(), z
    )
    for value, reference_value in ((out, exact), (gradient, wanted)):
        error = relative_error(value, reference_value)
        assert (error < 5e-6) if strict else (error < 2e-3)
    if not strict and torch.cuda.get_device_capability() >= (8, 0):
        assert relative_error(out, exact) > 2e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("dtype", "written"), [
    (torch.float32, torch.float16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16),
])  # fmt: skip
@pytest.mark.parametrize("moves", [(1, [0, 0, 0, 0], "zeros"), (2, [1, 2, 3, 1], "reflect")])
def test_normalize_writes_another_dtype(layout, channels_last, dtype, written, moves):
    x, residual = (torch.randn(2, 24, 13, 10, device="cuda").to(memory_format=layout) for _ in range(2))
    vectors = [torch.rand(24, device="cuda") + 0.5 for _ in range(4)]
    norm = Norm(*vectors, 1e-5, "relu")
    for other in (None, residual, residual.to(written)):
        got = normalization.normalize(x.to(dtype), norm, other, channels_last, *moves, dtype=written)
        z = reference.normalize(x.to(dtype).double(), *norm, None if other is None else other.double())
        exact = reference.moved(z, *moves)
        assert got.dtype == written
        assert relative_error(got, exact) < torch.finfo(written).eps + 1e-6


@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (2, 3, 37, 53)])
def test_every_precision_of_a_model_of_every_dtype(precision, dtype, shape):
    model, x = network(dtype), (torch.rand(shape, device="cuda") * 255).to(dtype)
    fast = compiled(model, precision)
    with torch.no_grad():
        eager, exact = model(x), eager_in(model, x, torch.float64)
        kept = storage(precision, dtype)
        if kept == torch.float32 and precision != "fp32":
            like = run_in_tf32(copy.deepcopy(model).float(), x.float()).to(dtype)
        else:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                like = eager_in(model, x, kept).to(dtype)
        for _ in range(4):  # as it is, recorded, replayed
            out = fast(x)
            assert (out.dtype, out.stride()) == (dtype, eager.stride())
            allowed = 1.25 * relative_error(like, exact) + torch.finfo(dtype).eps
            assert relative_error(out, exact) <= allowed
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("width", [16, 32])
def test_a_float32_model_in_16_bits_launches_what_a_16_bit_model_does(precision, width, replays, recorded):
    model, x = network(width=width), torch.rand(1, 3, 128, 128, device="cuda") * 255
    launched = []
    for net, picture, asked in (
        (model, x, precision),
        (copy.deepcopy(model).to(SIXTEEN_BIT[precision]), x.to(SIXTEEN_BIT[precision]), "auto"),
    ):
        torch._dynamo.reset()
        fast, before = compiled(net, asked), len(replays)
        with torch.no_grad():
            first = fast(picture)
            second = fast(picture)
            third = fast(picture)
        assert torch.equal(first, second) and torch.equal(first, third)
        assert len(replays) == before + 1  # nothing foreign in the region
        launched.append([kernel.entry for kernel in recorded])
        recorded.clear()
    assert launched[0] == launched[1] and launched[0]


def test_changed_weights_take_effect_in_another_precision(replays):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("below compute capability 8.0 convolutions are cuDNN's, and nothing is replayed")
    model, x = network(), torch.rand(1, 3, 64, 64, device="cuda") * 255
    fast = compiled(model, "fp16")
    with torch.no_grad():
        for _ in range(3):
            outs = [fast(x) for _ in range(4)]
            assert all(torch.equal(outs[0], out) for out in outs)
            fresh = copy.deepcopy(model)
            torch._dynamo.reset()
            assert torch.equal(compiled(fresh, "fp16")(x), outs[0])
            fast = compiled(model, "fp16")
            for p in model.parameters():
                p.mul_(1.05)
    assert replays


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_eagers(dtype, inside, replays):
    model, x = network(), torch.rand(1, 3, 64, 96, device="cuda") * 255

    def part(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return model(x)

    with torch.no_grad():
        eager, exact = part(x), eager_in(model, x, torch.float64)
        fast = compiled(part if inside else model)
        for _ in range(4):
            with torch.autocast("cuda", dtype, enabled=not inside):
                out = fast(x)
            assert (out.dtype, out.stride()) == (eager.dtype, eager.stride())
            assert relative_error(out, exact) <= 1.25 * relative_error(eager, exact) + torch.finfo(dtype).eps
    if torch.cuda.get_device_capability() == (9, 0):
        assert len(replays) == 2


class GroupNormed(torch.nn.Module):
    """Under a GPU's autocast group norms and upsamplings are in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3)
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(4, 16) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.norms[0](self.first(F.pad(x, (1, 1, 1, 1), "reflect"))))
        z = F.interpolate(y, scale_factor=2)
        z = self.norms[1](self.second(F.pad(z, (1, 1, 1, 1), "reflect")))
        return y, z, F.interpolate(z, scale_factor=2)


def test_what_autocast_has_in_float32_is_float32():
    model, x = GroupNormed().cuda().eval(), torch.rand(2, 3, 24, 20, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        ours, eager = compiled(model)(x), model(x)
    exact = copy.deepcopy(model).double()(x.double())
    for out, like, value in zip(ours, eager, exact, strict=True):
        assert (out.dtype, out.stride()) == (like.dtype, like.stride())
        assert relative_error(out, value) <= 1.25 * relative_error(like, value) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast(dtype):
    models = [network().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, target = torch.rand(2, 3, 48, 40, device="cuda"), torch.rand(2, 3, 48, 40, device="cuda")
    losses: list[list[float]] = []
    for model, run in ((models[0], models[0]), (models[1], compiled(models[1]))):
        scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = F.mse_loss(run(x).float(), target)
            scaler.scale(loss).backward()
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(float(loss))
    assert losses[1][-1] < losses[1][0]
    for eager, ours in zip(*losses, strict=True):
        assert abs(eager - ours) < 0.05 * eager


def test_explain_says_what_the_switch_does():
    model, x = network(), torch.rand(1, 3, 32, 32, device="cuda")
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for value, name in (("tf32", "tf32"), ("ieee", "fp32")):
            torch.backends.cudnn.conv.fp32_precision = value
            assert {site.precision for site in explain(model, x).fused} == {name}
            assert tf32.allowed("auto") is (name == "tf32")
        for asked in ("tf32", "fp32", "fp16"):
            report = explain(model, x, options={"precision": asked})
            assert {site.precision for site in report.fused} == {asked}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
