"""One table of shapes, with a reason on every row, and the inputs and error measures of the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Shape(NamedTuple):
    """(N, C, H, W) and why it is tested."""

    shape: tuple[int, int, int, int]
    why: str


SHAPES = (
    Shape((1, 32, 64, 64), "a layer of TransformerNet, scaled down"),
    Shape((2, 16, 37, 53), "odd height and width: no vector divides a plane"),
    Shape((1, 3, 31, 17), "a picture: channels below any vector"),
    Shape((3, 5, 9, 7), "odd channels, several images"),
    Shape((1, 1, 1, 1), "a single pixel: variance 0"),
    Shape((2, 8, 1, 1), "one pixel a plane, several planes"),
    Shape((1, 64, 5, 5), "planes smaller than a block"),
    Shape((8, 4, 3, 2), "width below any vector, eight images"),
    Shape((1, 24, 40, 40), "channels a multiple of 8, not of 16 or 32"),
    Shape((1, 2, 300, 501), "two planes, many pixels: slices end unevenly"),
    Shape((1, 300, 6, 10), "more channels than a block has threads, in elements"),
)
IDS = ["x".join(map(str, row.shape)) for row in SHAPES]


def picture(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu", mean: float = 0.0
) -> Tensor:
    """Random pixels of standard deviation 1 about ``mean``, with the strides of ``layout``."""
    x = torch.randn(shape, dtype=torch.float64) + mean
    return x.to(dtype).to(device).contiguous(memory_format=LAYOUTS[layout])


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact|| in float64; NaN if anything is not finite."""
    out, exact = out.detach(), exact.detach()
    difference = (out.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-30))


def psnr(a: Tensor, b: Tensor, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    mse = (a.double() - b.double()).square().mean()
    return float("inf") if mse == 0 else float(10 * torch.log10(peak**2 / mse))


def replay_side_by_side(graphs: list[torch.cuda.CUDAGraph], times: int = 20) -> None:
    """Replay each graph on a stream of its own, all at once, and wait for them."""
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(times):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()


def check_side_outputs(results: tuple[Tensor, ...], kept_exactly: Tensor | None, statistics: bool) -> None:
    """What ``conv2d`` returns beside its picture: its mean and variance, and the kept input, if asked for."""
    out, mean, variance, kept = results
    if kept_exactly is None:
        assert kept.shape == (0,)
    else:
        assert relative_error(kept, kept_exactly) < 2 * torch.finfo(out.dtype).eps
    if not statistics:
        assert mean.numel() == variance.numel() == 0
        return
    v, m = torch.var_mean(out.double(), (2, 3), correction=0)
    torch.testing.assert_close(mean.double(), m, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), v, rtol=1e-4, atol=1e-6)
