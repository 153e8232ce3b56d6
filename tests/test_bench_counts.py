"""``styleforge bench``: the counts, the clock, and what passes as a right result."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from sf_compile.bench import timing
from sf_compile.bench.checks import check_error, check_output, relative_error
from sf_compile.bench.rows import BenchmarkError
from sf_compile.bench.timing import Budget, Sample, interleaved, sustained
from sf_compile.bench.work import (
    PLANE_ON_CHIP_BYTES,
    Shape,
    Size,
    instance_norm_bytes,
    parse_sizes,
    transformer_net_flop,
    transformer_net_norm_shapes,
)
from sf_compile.models import TransformerNet


@pytest.mark.parametrize(
    ("size", "written", "subpixel"),
    [
        (Size(1, 512, 512), 80.6, 69.9),
        (Size(1, 1080, 1920), 638, 553),
        (Size(1, 2160, 3840), 2551, 2212),
        (Size(8, 512, 512), 645, 559),
    ],
)
def test_flop_are_those_counted_by_hand(size: Size, written: float, subpixel: float) -> None:
    assert transformer_net_flop(size, subpixel=False) / 1e9 == pytest.approx(written, rel=1e-3)
    assert transformer_net_flop(size) / 1e9 == pytest.approx(subpixel, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "width", "blocks"),
    [
        (Size(1, 64, 64), 32, 5),
        (
            Size(2, 37, 50),
            8,
            1,
        ),  # odd: the strided convolutions round up, the output is larger than the input
    ],
)
def test_flop_are_those_the_network_executes(size: Size, width: int, blocks: int) -> None:
    executed = 0

    def count(module: torch.nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal executed
        executed += 2 * output.numel() * module.weight[0].numel()

    shapes = set()

    def see(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        shapes.add(Shape(*output.shape))

    model = TransformerNet(width=width, blocks=blocks).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
        elif isinstance(module, torch.nn.InstanceNorm2d):
            module.register_forward_hook(see)
    with torch.no_grad():
        model(torch.rand(size.batch, 3, size.height, size.width))
    assert transformer_net_flop(size, width=width, blocks=blocks, subpixel=False) == executed
    assert set(transformer_net_norm_shapes(size, width=width)) == shapes


def test_sizes_are_read_in_both_forms() -> None:
    assert parse_sizes("512x512, 8x1080x1920,512x512") == (Size(1, 512, 512), Size(8, 1080, 1920))
    assert str(Size(1, 1080, 1920)) == "1080x1920"
    assert str(Size(8, 512, 512)) == "8x512x512"


@pytest.mark.parametrize("text", ["", "512", "512x", "axb", "1x2x3x4", "512x512,", "-1x5", "512X512"])
def test_a_bad_size_is_named_and_explained(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH"):
        parse_sizes(text)


def test_a_zero_in_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0x512' is not a size: .* at least 1"):
        parse_sizes("0x512")


L2 = 60 * 2**20


@pytest.mark.parametrize(
    ("shape", "channels_last", "residual", "tensors"),
    [
        (Shape(1, 32, 512, 512), False, False, 2),  # 16.8 MB: the tensor stays in L2
        (Shape(1, 32, 512, 512), True, True, 3),
        (Shape(1, 32, 1080, 1920), False, False, 3),  # 133 MB, planes of 4.1 MB: read twice
        (Shape(1, 32, 1080, 1920), True, True, 4),
        (Shape(64, 128, 128, 128), False, False, 2),  # 268 MB, but a plane of 32 KB stays in shared memory
        (Shape(64, 128, 128, 128), True, False, 3),  # a channels_last plane is spread over the whole image
    ],
)
def test_instance_norm_counts_the_bytes_it_must_move(
    shape: Shape, channels_last: bool, residual: bool, tensors: int
) -> None:
    counted = instance_norm_bytes(
        shape, element_size=2, channels_last=channels_last, residual=residual, l2_bytes=L2
    )
    assert counted == tensors * 2 * math.prod(shape)


def test_a_plane_stays_on_chip_up_to_the_limit() -> None:
    def count(elements: int) -> int:
        shape = Shape(1, 1000, 1, elements)
        return instance_norm_bytes(shape, element_size=2, channels_last=False, residual=False, l2_bytes=0)

    limit = PLANE_ON_CHIP_BYTES // 2
    assert count(limit) == 2 * 2 * 1000 * limit
    assert count(limit + 1) == 3 * 2 * 1000 * (limit + 1)


# timing


def test_every_call_gets_latencies_and_rotating_inputs() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    calls = {name: (lambda value, name=name: seen[name].append(int(value))) for name in seen}
    inputs = {name: [torch.tensor(0), torch.tensor(1), torch.tensor(2)] for name in seen}
    # Without a warm-up, which calls for a time, the number of calls is known: one, then two of three.
    samples = interleaved(calls, inputs, Budget(seconds=0.0, rounds=2, pause=0.0, least=3, warm=0.0))
    for name, sample in samples.items():
        assert len(sample.latencies) == 6 and sample.streamed == 6
        assert min(sample.latencies) > 0 and sample.back_to_back > 0
        assert sample.host == [] and sample.host_us is None  # of a GPU alone
        assert seen[name] == [number % 3 for number in range(2 * (1 + 3 + 3))]


def test_a_burst_warms_up_for_its_time_before_it_counts() -> None:
    calls: list[Tensor] = []
    budget = Budget(seconds=0.0, rounds=1, pause=0.0, least=2, warm=0.02)
    begin = time.perf_counter()
    sample = interleaved({"a": calls.append}, {"a": [torch.zeros(1)]}, budget)["a"]
    assert time.perf_counter() - begin >= 0.02
    assert len(sample.latencies) == sample.streamed == 2 and len(calls) > 5


def test_sustained_counts_the_second_half() -> None:
    calls = []
    sample = sustained(calls.append, [torch.zeros(1)], 0.02)
    assert 0 < len(sample.latencies) < len(calls)
    assert sample.back_to_back == pytest.approx(sum(sample.latencies) / len(sample.latencies))


def test_the_hosts_time_is_that_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def synchronize(device: torch.device) -> None:
        time.sleep(0.01)
        waits.append(time.perf_counter())

    monkeypatch.setattr(timing, "synchronize", synchronize)
    assert timing.host_us(lambda value: time.sleep(0.002), torch.zeros(1)) == pytest.approx(2500, abs=1000)
    assert len(waits) == 1
    assert Sample(host=[3.0, 1.0, 2.0]).host_us == 2.0


def test_percentiles_of_a_sample() -> None:
    sample = Sample([5.0, 1.0, 2.0, 3.0, 4.0])
    assert [sample.percentile(q) for q in (20, 50, 80)] == pytest.approx([1.8, 3.0, 4.2])


# checks


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), reference))
    with pytest.raises(BenchmarkError, match="here: inductor returns a wrong shape"):
        check_output("inductor", torch.zeros(1, 2), reference, 1e-3, "here")


@pytest.mark.parametrize(
    ("peer", "error", "eager_error", "passes"),
    [
        ("styleforge", 1.24e-3, 1e-3, True),
        ("styleforge", 1.26e-3, 1e-3, False),
        ("styleforge", math.nan, 1e-3, False),
        ("inductor", 2e-3, 1e-3, True),  # another rounding, not another function
        ("inductor", 2e-2, 1e-3, False),
        ("eager", math.nan, math.nan, False),
        ("styleforge", 0.0, math.inf, False),
    ],
)
def test_only_a_right_result_passes(peer: str, error: float, eager_error: float, passes: bool) -> None:
    if passes:
        check_error(peer, error, eager_error, "here")
        return
    with pytest.raises(BenchmarkError, match="here: "):
        check_error(peer, error, eager_error, "here")


def test_slack_is_added_to_the_limit() -> None:
    check_error("styleforge", 1.3e-3, 1e-3, "here", slack=1e-4)
    with pytest.raises(BenchmarkError, match="here: "):
        check_error("styleforge", 1.4e-3, 1e-3, "here", slack=1e-4)
