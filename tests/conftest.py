"""Shared fixtures: where the test data is, what a test leaves behind, and what skips tests of a GPU."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from pipeline_streams import threads, until

from sf_compile.cuda import hopper
from sf_compile.graph.break_even import BreakEven

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Compiled code of one test does not count against another's recompilation limit."""
    torch._dynamo.reset()
    yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_pictures_are_fused(request):
    """On a CPU too, where they would run as they came: nearly all pictures of the tests are small.

    By a patch of its own: ``monkeypatch`` would be undone later, after fixtures that count on it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "small_pictures" not in request.keywords:
            patch.setattr(BreakEven, "is_reached", lambda self, inputs: True)
        yield


@pytest.fixture(scope="session")
def hopper_kernels() -> None:
    """Skips tests of the kernels for compute capability 9.0 alone where those are not to run.

    Asked once a test of a GPU begins: where tests are collected there may be none, nor a PyTorch for one.
    """
    index = torch.cuda.current_device()
    if not hopper.available(index):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        wanted = os.environ.get(hopper.KERNELS) or "auto"
        pytest.skip(
            "the kernels for compute capability 9.0 are not to run: "
            f"this GPU has {capability}, and {hopper.KERNELS} is {wanted}"
        )


@pytest.fixture
def weights() -> Path:
    folder = SHARED / "weights"
    if not folder.is_dir():
        pytest.skip("the pretrained networks are not beside the checkout (../shared/weights)")
    return folder


@pytest.fixture
def photo_path() -> Path:
    path = SHARED / "images" / "amber.jpg"
    if not path.is_file():
        pytest.skip("the photograph is not beside the checkout (../shared/images)")
    return path


@pytest.fixture
def strict_float32():
    """Float32 convolutions on a GPU in float32, not in TF32."""
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = precision


@pytest.fixture
def no_stream_is_left_running():
    """No thread of a ``StylizePipeline`` outlives the test."""
    yield
    if threads():
        gc.collect()
    until(lambda: not threads())
