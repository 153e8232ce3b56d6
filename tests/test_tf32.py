"""Rounding to TF32, PyTorch's switches that allow it, and convolutions in it or without."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from sf_compile import tf32
from sf_compile.precision import PRECISIONS


def test_rounded_keeps_ten_bits_of_mantissa():
    x = torch.randn(4096).exp2() * torch.randn(4096)
    rounded = tf32.rounded(x)
    assert (rounded.view(torch.int32) & 0x1FFF == 0).all()
    assert ((rounded - x).abs() <= 2.0**-11 * x.abs()).all() and not torch.equal(rounded, x)
    assert torch.equal(tf32.rounded(rounded), rounded)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [(1 + 2.0**-11, 1 + 2.0**-10), (-1 - 2.0**-11, -1 - 2.0**-10), (1 + 2.0**-12, 1.0), (0.0, 0.0)],
    ids=["tie", "negative-tie", "down", "zero"],
)
def test_ties_are_rounded_away_from_zero(value, nearest):
    assert tf32.rounded(torch.tensor([value])).item() == nearest


def test_what_is_not_finite_stays_so():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(tf32.rounded(x).isnan(), x.isnan()) and torch.equal(tf32.rounded(x)[:2], x[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone(dtype):
    x = torch.randn(64).to(dtype)
    assert tf32.rounded(x) is x


@pytest.fixture
def switches():
    """PyTorch's switches of TF32, put back afterwards."""
    backends = (torch.backends, torch.backends.cudnn)
    before = [module.fp32_precision for module in backends]
    conv, rnn = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    yield torch.backends
    torch.backends.cudnn.allow_tf32 = True
    for module, value in zip(backends, before, strict=True):
        module.fp32_precision = value
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = conv, rnn


def test_allowed_follows_pytorch(switches):
    for permitted in (True, False):
        switches.cudnn.allow_tf32 = permitted
        assert tf32.allowed("auto") is permitted
    for precision in ("tf32", "ieee"):
        switches.cudnn.conv.fp32_precision = precision
        assert tf32.allowed("auto") is (precision == "tf32")


def test_tf32_follows_either_switch(switches):
    assert tf32.allowed("auto")  # PyTorch's default
    for value in (False, True, False):
        switches.cudnn.allow_tf32 = value
        assert tf32.allowed("auto") is value
    switches.cudnn.allow_tf32 = True
    switches.cudnn.conv.fp32_precision = "ieee"  # with which the older switch cannot be read
    with pytest.raises(RuntimeError):
        assert switches.cudnn.allow_tf32 is None
    assert not tf32.allowed("auto")
    switches.cudnn.conv.fp32_precision = "none"
    for module in (switches.cudnn, switches):
        for value in ("tf32", "ieee", "none"):
            module.fp32_precision = value
            assert tf32.allowed("auto") is (value == "tf32")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_a_precision_asked_for_is_no_matter_of_switches(precision, switches):
    for value in ("tf32", "ieee", "none"):
        switches.cudnn.conv.fp32_precision = value
        assert tf32.allowed(precision) is (precision == "tf32")


@pytest.mark.parametrize("value", ["tf32", "ieee", "none"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_switch_is_turned_and_put_back(precision, value, switches):
    switches.cudnn.conv.fp32_precision = value
    wanted = {"tf32": True, "fp32": False}.get(precision, value == "tf32")
    with tf32.switched(precision):
        assert tf32.allowed("auto") is wanted
        with tf32.switched("fp32"):
            assert not tf32.allowed("auto")
    assert switches.cudnn.conv.fp32_precision == value
    with pytest.raises(ZeroDivisionError), tf32.switched(precision):
        raise ZeroDivisionError
    assert switches.cudnn.conv.fp32_precision == value


def test_an_inherited_switch_goes_on_being_inherited(switches):
    switches.cudnn.conv.fp32_precision = "none"
    switches.cudnn.fp32_precision = "tf32"
    with tf32.switched("fp32"):
        assert not tf32.allowed("auto")
    assert tf32.allowed("auto")
    switches.cudnn.fp32_precision = "ieee"
    assert not tf32.allowed("auto")


def test_threads_turn_the_switch_one_after_another(switches):
    switches.cudnn.conv.fp32_precision = "tf32"
    wrong = []

    def work(precision: str) -> None:
        for _ in range(200):
            with tf32.switched(precision):
                if tf32.allowed("auto") is not (precision == "tf32"):
                    wrong.append(precision)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("fp32", "tf32", "fp32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and switches.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_convolution_of_a_precision_is_pytorchs(precision, transposed, monkeypatch):
    x, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(4, 4, 3, 3), torch.randn(4)
    told, convolve = [], torch._convolution
    monkeypatch.setattr(torch, "_convolution", lambda *a: (told.append(a[-1]), convolve(*a))[1])
    output_padding = (1, 0) if transposed else (0, 0)
    out = tf32.convolution(x, weight, bias, [2, 1], [1, 0], precision, transposed, output_padding)
    if transposed:
        expected = F.conv_transpose2d(x, weight, bias, (2, 1), (1, 0), output_padding)
    else:
        expected = F.conv2d(x, weight, bias, (2, 1), (1, 0))
    assert torch.equal(out, expected) and told == [precision == "tf32"]
