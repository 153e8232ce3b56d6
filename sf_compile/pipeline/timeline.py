"""What happened when: spans of every lane of a stream, and a picture of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

LANES = ("source", "copy in", "upload", "to numbers", "network", "to bytes", "download", "copy out")
_MOST = 1 << 14


class Span(NamedTuple):
    """Work of one lane on the batch that begins with ``picture``, in ms since the stream began."""

    lane: str
    picture: int
    begin: float
    end: float


class Timeline:
    """Collects the latest spans; those of a GPU by events, placed on the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.spans: deque[Span] = deque(maxlen=_MOST)
        self._base: Any = None
        if device.type == "cuda":
            self._base = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            with torch.cuda.device(device):
                self._base.record()
            self._base.synchronize()
        self._began = time.perf_counter()

    def now(self) -> float:
        """Milliseconds since the stream began."""
        return (time.perf_counter() - self._began) * 1e3

    def host(self, lane: str, index: int, begin: float) -> None:
        """A span of the host that ends now."""
        self.spans.append(Span(lane, index, begin, self.now()))

    def device(self, lane: str, index: int, begin: Any, end: Any) -> None:
        """A span between two events that the device has passed."""
        moments = self._base.elapsed_time(begin), self._base.elapsed_time(end)
        self.spans.append(Span(lane, index, *moments))


def plot(path: Path, spans: Sequence[Span], title: str = "") -> None:
    """Draw ``spans`` into the PNG file ``path``, a row for each lane, a colour for each batch.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="ms")
    colours = [colormaps["tab10"](i) for i in range(10)]
    order = {index: place for place, index in enumerate(sorted({span.picture for span in spans}))}
    for row, lane in enumerate(LANES):
        own = [span for span in spans if span.lane == lane]
        axes.broken_barh(
            [(span.begin, span.end - span.begin) for span in own],
            (row - 0.4, 0.8),
            color=[colours[order[span.picture] % len(colours)] for span in own],
            linewidth=0.5,
        )
    axes.set_yticks(range(len(LANES)), LANES)
    axes.invert_yaxis()
    axes.grid(True, axis="x", linewidth=0.3)
    axes.set_title(title)
    figure.savefig(path, format="png", dpi=150)
