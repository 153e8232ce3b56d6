"""Rounding to TF32, and PyTorch's settings that allow it."""

from __future__ import annotations

import pytest
import torch

from sf_compile import tf32


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
def settings():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield torch.backends.cudnn
    conv.fp32_precision = before


def test_allowed_follows_pytorch(settings):
    for permitted in (True, False):
        settings.allow_tf32 = permitted
        assert tf32.allowed("auto") is permitted
    for precision in ("tf32", "ieee"):
        settings.conv.fp32_precision = precision
        assert tf32.allowed("auto") is (precision == "tf32")
