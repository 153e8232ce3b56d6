"""``StylizePipeline``: a network, and how pictures get to it and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sf_compile.pipeline.batches import State
from sf_compile.pipeline.conversion import Convention, Network
from sf_compile.pipeline.lanes import Lanes
from sf_compile.pipeline.stream import PictureStream
from sf_compile.pipeline.timeline import Timeline


class StylizePipeline:
    """Runs a network over pictures on the host, with reading, transfers and the network overlapped.

    ``pipeline(source)`` is an iterator over the stylised pictures, in order; ``source`` any iterable of uint8
    (H, W, 3) RGB arrays or CPU tensors, or of batches (N, H, W, 3) of them, such as a generator or a
    DataLoader. Sizes may differ from one to the next. docs/streams.md has more.

    Args:
        model: from (N, 3, H, W) to (N, 3, H', W'), such as ``torch.compile(network, backend="styleforge")``;
            called in the thread that asks for pictures, in inference mode. Its weights must not change while
            a stream is open.
        batch_size: how many pictures of equal size, that follow each other, go through the network at once.
        max_latency_ms: how long the first picture of a batch waits for the others; None: until the batch is
            full, the size changes or the source ends.
        depth: batches on their way at once, each with buffers of its own.
        copy: what is handed out stays as it is for as long as anybody holds it: memory of the pipeline's,
            which is used again after that, or a copy while too much of that is held. False: views of buffers,
            each valid until the next picture is asked for.
        copy_threads: threads that copy one large picture into or out of a buffer. More than one wait for the
            interpreter's lock more often than they are faster.
        check_finite: a result with NaN or infinity is a ``PictureError``; False: it is bytes 0 and 255.
        timeline: note when each step of each batch began and ended, for ``PictureStream.timeline``.
        device: of the network; None: where its weights are.
        dtype: of its input; None: that of its convolutions' weights.
        channels_last: the memory format of its input; None: as its convolutions' weights have it.
        input_range: the numbers that bytes 0 and 255 become; None: 0 and 255, or as a network of
            ``sf_compile.models`` has it.
        output_range: the numbers that become bytes 0 and 255; None: as for ``input_range``.
        side_multiple: sides are extended, by reflection at the right and below, to a multiple of this, and
            the result is cropped; None: 1, or as a network of ``sf_compile.models`` needs it.
        min_side: the least that sides are extended to; None: as for ``side_multiple``.

    Raises:
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        model: Network,
        *,
        batch_size: int = 1,
        max_latency_ms: float | None = None,
        depth: int = 6,
        copy: bool = True,
        copy_threads: int = 1,
        check_finite: bool = True,
        timeline: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        input_range: tuple[float, float] | None = None,
        output_range: tuple[float, float] | None = None,
        side_multiple: int | None = None,
        min_side: int | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("depth", depth, 1),
            ("copy_threads", copy_threads, 1),
            ("max_latency_ms", max_latency_ms or 0.0, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.convention = Convention.of(
            model, device, dtype, channels_last, input_range, output_range, side_multiple, min_side
        )
        self._model = model
        self._settings: dict[str, Any] = {
            "batch_size": batch_size,
            "max_latency": None if max_latency_ms is None else max_latency_ms / 1e3,
            "depth": depth,
            "copy": copy,
            "copy_threads": copy_threads,
            "check_finite": check_finite,
        }
        self._timeline = timeline
        self._lanes = Lanes(model, self.convention)

    def __call__(self, source: Iterable[Any]) -> PictureStream:
        """Begin to read ``source``; an iterator over its pictures, stylised.

        Raises:
            TypeError: ``source`` is not iterable.
        """
        timeline = Timeline(self.convention.device) if self._timeline else None
        return PictureStream(State(self._lanes, timeline=timeline, **self._settings), source)
