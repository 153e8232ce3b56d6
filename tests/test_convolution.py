"""Which kernel runs a convolution, and how that is told."""

from __future__ import annotations

import logging
import math
import re
import struct
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from halo_layers import check_picture, unit

from sf_compile import ops
from sf_compile.cuda import activation, convolution, halo_conv
from sf_compile.cuda.compiler import source_directory
from sf_compile.ops.conv2d_arguments import Arguments


def arguments(**changes: object) -> Arguments:
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
    plain = Arguments(
        x, weight, None, None, None, None, None, 1.0, "relu", torch.randn_like(x), 1, [1, 1, 1, 1], "reflect",
        [1, 1], "none", True, False, True,
    )  # fmt: skip
    return plain._replace(**changes)


def kernel(source: str, refusal):
    calls = []
    return SimpleNamespace(
        SOURCE=source, refusal=lambda a: calls.append(a) or refusal(a), conv2d=lambda a: a, calls=calls
    )


@pytest.fixture
def choose(monkeypatch):
    def with_kernels(first, halo):
        monkeypatch.setattr(convolution, "_KERNELS", (first, halo))
        monkeypatch.setattr(convolution, "halo_conv", halo)
        monkeypatch.setattr(convolution, "usable", lambda x, out_width=0: True)
        monkeypatch.setattr(convolution, "_choices", {})
        return convolution.choice

    return with_kernels


def test_the_first_kernel_that_does_not_refuse_is_asked_once(choose):
    first, halo = kernel("first.cu", lambda a: "too many channels"), kernel("halo.cu", lambda a: None)
    choice = choose(first, halo)
    a = arguments()
    assert choice(a) == (halo, False, False) == choice(a)
    assert len(first.calls) == len(halo.calls) == 1
    choice(arguments(padding=[2, 2, 2, 2]))
    assert len(halo.calls) == 2


def test_a_residual_that_does_not_fit_is_added_by_a_pass_before(choose):
    halo = kernel("halo.cu", lambda a: "no room" if a.residual is not None else None)
    choice = choose(kernel("first.cu", lambda a: "no"), halo)
    assert choice(arguments()) == (halo, True, False)
    assert choice(arguments(residual=None)) == (halo, False, False)
    nothing = choose(kernel("first.cu", lambda a: "no"), kernel("halo.cu", lambda a: "no"))
    assert nothing(arguments()) == (None, False, False)


def test_planes_that_no_kernel_reads_are_turned_by_a_pass_before(choose):
    planes = torch.randn(1, 16, 8, 8)
    last = planes.contiguous(memory_format=torch.channels_last)

    def reads(a):
        return None if a.input.stride(1) == 1 else "reads no planes"

    choice = choose(kernel("first.cu", lambda a: "no"), halo := kernel("halo.cu", reads))
    plain = {"residual": None, "activation": "none"}
    assert choice(arguments(input=planes, **plain)) == (halo, True, False)
    assert choice(arguments(input=last, **plain)) == (halo, False, False)
    assert choice(arguments(input=planes, channels_last=False, **plain)) == (halo, True, True)
    # With an activation on the way in the same pass finishes it.
    assert choice(arguments(input=planes, residual=None)) == (halo, True, False)


def test_planes_that_no_kernel_writes_are_made_by_a_pass_behind(choose, monkeypatch):
    """Rather than by cuDNN between passes; what is kept has the layout of the result, and stays as it is."""
    halo = kernel("halo.cu", lambda a: None if a.channels_last else "writes no planes")
    halo.conv2d = lambda a: (torch.full((1, 16, 8, 8), 1.0 + a.channels_last), *torch.zeros(3, 1, 16))
    choose(kernel("first.cu", lambda a: "no"), halo)
    passes = []
    monkeypatch.setattr(
        convolution, "normalize", lambda x, norm, more, last, dtype: passes.append((last, dtype)) or x + 5
    )
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    a = arguments(input=x, channels_last=False, residual=None, activation="none")
    out, *_ = convolution.conv2d(a)
    assert out.unique().tolist() == [7.0] and passes == [(False, torch.float32)]
    assert convolution.choice(a) == (halo, False, True)
    assert str(convolution.choice(a)) == "halo.cu, then a pass that changes its result"
    assert convolution.choice(a._replace(keep_input=True)) == (None, False, False)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_kernels")  # the general kernel reads planes
@pytest.mark.parametrize("norm", [False, True])
def test_turned_planes_are_convolved(norm):
    x = torch.randn(2, 128, 19, 33, device="cuda").half()
    weight = (torch.randn(64, 128, 3, 3, device="cuda") / 34).half()
    variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    named = {"input": x, "weight": weight, "residual": None, "activation": "relu" if norm else "none"}
    a = arguments(**named)._replace(mean=mean if norm else None, variance=variance if norm else None)
    z = F.instance_norm(x.double(), eps=a.eps).relu() if norm else x.double()
    exact = F.conv2d(F.pad(z, (1, 1, 1, 1), mode="reflect"), weight.double())
    rounded = F.instance_norm(x, eps=a.eps).relu() if norm else x
    eager = F.conv2d(F.pad(rounded, (1, 1, 1, 1), mode="reflect"), weight)
    for channels_last in (True, False):
        b = a._replace(channels_last=channels_last)
        assert convolution.choice(b) == (halo_conv, True, not channels_last)
        out, *_ = ops.conv2d(*b)
        format = torch.channels_last if channels_last else torch.contiguous_format
        assert out.is_contiguous(memory_format=format)
        check_picture(out, eager, exact, unit(out.dtype))
        assert relative_error(out.double(), exact) < 1e-3


def wide(**changes: object) -> Arguments:
    """A float32 picture for a convolution in float16, its parameters cast."""
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3).half()
    named = {"input": x, "weight": weight, "residual": None, "activation": "none", "precision": "fp16"}
    return arguments(**named | changes)


def test_a_picture_of_another_dtype_is_read_by_a_kernel_that_can_or_cast_by_a_pass(choose, monkeypatch):
    first, halo = kernel("first.cu", lambda a: None), kernel("halo.cu", lambda a: None)
    choice = choose(first, halo)
    assert choice(wide()) == (first, True, False)  # a pass before it
    assert [(a.input.dtype, a.dtype) for a in first.calls] == [(torch.float16, torch.float16)]
    monkeypatch.setattr(convolution, "_READING", (halo,))
    choice = choose(first, halo)
    assert choice(wide()) == (halo, False, False)
    assert choice(wide(input=torch.randn(1, 16, 8, 8).half())) == (first, False, False)


def test_a_result_of_another_dtype_is_written_by_a_kernel_that_can(choose, monkeypatch):
    first, halo = kernel("first.cu", lambda a: None), kernel("halo.cu", lambda a: None)
    half = torch.randn(1, 16, 8, 8).half()
    for writing, found in (((), (first, False, True)), ((halo,), (halo, False, False))):
        choice = choose(first, halo)
        monkeypatch.setattr(convolution, "_WRITING", writing)
        assert choice(wide(input=half, out_dtype=torch.float32)) == found
        assert choice(wide(input=half, out_dtype=torch.float16)) == (first, False, False)


def test_a_residual_of_another_dtype_is_added_by_a_pass(choose):
    first = kernel("first.cu", lambda a: None)
    choice = choose(first, kernel("halo.cu", lambda a: "no"))
    half = torch.randn(1, 16, 8, 8).half()
    assert choice(wide(input=half, residual=torch.randn(1, 16, 8, 8))) == (first, True, False)
    assert choice(wide(input=half, residual=half)) == (first, False, False)


def test_an_activation_that_costs_too_much_is_applied_by_a_pass_before_any_kernel(choose):
    first = kernel("first.cu", lambda a: "tanh" if a.activation == "tanh" else None)
    choice = choose(first, kernel("halo.cu", lambda a: "no"))
    assert choice(arguments(activation="tanh")) == (first, True, False)
    assert choice(arguments(activation="relu")) == (first, False, False)


@pytest.mark.parametrize(
    ("text", "code", "shared", "numbers", "on_the_way_in"),
    [
        ("none", 0, 2, (-math.inf, math.inf, 1.0, -0.0), True),
        ("relu", 1, 2, (0.0, math.inf, 1.0, -0.0), True),
        ("relu * 2.0 + 1.0", 4, 4, (0.0, math.inf, 2.0, 1.0), False),
        ("leaky_relu(0.2)", 3, 3, (0.2, 0.0, 1.0, -0.0), True),
        ("clamp(-1e+40, 1e+40)", 4, 4, (-math.inf, math.inf, 1.0, -0.0), True),
        ("hardtanh(0.0, 6.0)", 4, 4, (0.0, 6.0, 1.0, -0.0), True),
        ("tanh * 150.0 + 127.5", 5, 5, (0.0, 0.0, 150.0, 127.5), False),
    ],
)
def test_what_a_kernel_is_told_of_an_activation(text, code, shared, numbers, on_the_way_in):
    assert (activation.code(text), activation.shared_code(text)) == (code, shared)
    found = struct.unpack("4f", activation.arguments(text))
    assert found == struct.unpack("4f", struct.pack("4f", *numbers))
    assert math.copysign(1, found[3]) == math.copysign(1, numbers[3])
    assert (activation.refusal(text) is None) == on_the_way_in


def test_the_functions_have_the_numbers_of_the_source():
    source = (source_directory() / "activation.cuh").read_text()
    defined = dict(re.findall(r"#define (\w+) (\d+)", source))
    assert defined == {name: str(getattr(activation, name)) for name in defined} and len(defined) == 12


def test_the_log_says_what_runs_and_why_nothing_else_does(choose, caplog):
    first = kernel("first.cu", lambda a: "reads 1 to 4 channels, not 16")
    halo = kernel("halo.cu", lambda a: "no room" if a.residual is not None else None)
    choice = choose(first, halo)
    with caplog.at_level(logging.DEBUG, "sf_compile"):
        choice(arguments())
        choice(arguments())
        choice(arguments(residual=None))
    assert [record.getMessage() for record in caplog.records] == [
        "conv2d of torch.float32 (1, 16, 8, 8) by (16, 16, 3, 3): a pass that finishes the input, then "
        "halo.cu (not first.cu: reads 1 to 4 channels, not 16; not halo.cu: no room)",
        "conv2d of torch.float32 (1, 16, 8, 8) by (16, 16, 3, 3): halo.cu "
        "(not first.cu: reads 1 to 4 channels, not 16)",
    ]


def test_the_general_kernel_takes_what_no_other_does_where_it_is_preferred(choose, monkeypatch):
    mma = kernel("mma.cu", lambda a: "kept before a stride" if a.keep_input else None)
    halo = kernel("halo.cu", lambda a: "no room" if a.residual is not None else None)
    choice = choose(halo, mma)
    monkeypatch.setattr(convolution, "halo_conv", halo)
    monkeypatch.setattr(convolution, "mma_conv", mma)
    mma.prefers = lambda a: a.weight.shape[2] < 5
    assert choice(arguments(residual=None)) == (halo, False, False)
    assert choice(arguments()) == (halo, True, False), "a pass and a kernel made for the layer"
    halo.refusal = lambda a: "no"
    assert choice(arguments(stride=[3, 3])) == (mma, False, False)
    assert choice(arguments(stride=[3, 3], keep_input=True)) == (mma, True, False)
    assert choice(arguments(weight=torch.randn(16, 16, 5, 5))) == (None, False, False)
