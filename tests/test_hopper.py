"""Which GPUs run the kernels for compute capability 9.0, and how to do without them."""

from __future__ import annotations

import pytest
import torch

from sf_compile.cuda import hopper


@pytest.fixture(autouse=True)
def forgetful():
    hopper.available.cache_clear()
    yield
    hopper.available.cache_clear()


@pytest.mark.parametrize(
    ("capability", "wanted", "runs"),
    [((9, 0), None, True), ((9, 0), "", True), ((9, 0), "auto", True), ((9, 0), "general", False),
     ((8, 0), None, False), ((8, 0), "auto", False), ((10, 0), None, False), ((12, 0), None, False)],
)  # fmt: skip
def test_where_they_run(capability, wanted, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.delenv(hopper.KERNELS, raising=False)
    if wanted is not None:
        monkeypatch.setenv(hopper.KERNELS, wanted)
    assert hopper.available(0) is runs


def test_other_kernels_than_there_are(monkeypatch):
    monkeypatch.setenv(hopper.KERNELS, "hopper")
    with pytest.raises(ValueError, match="names no kernels; valid: auto, general"):
        hopper.available(0)
