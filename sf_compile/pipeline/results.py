"""What a batch that came back from the device is handed out as: arrays, tensors or errors, one a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sf_compile.pipeline.batches import Batch, State
from sf_compile.pipeline.lanes import Part
from sf_compile.pipeline.pictures import PictureError


def results_of(state: State, batch: Batch) -> list[Any]:
    """The results of a batch in order, once they are there: arrays, tensors or errors."""
    slot = batch.slot
    assert slot is not None
    try:
        state.lanes.wait(slot, batch.first, state.timeline)
    except RuntimeError as cause:  # what a kernel did, or one before it
        plain = cause.with_traceback(None)
        return [_error(batch, i, plain) for i in range(len(batch.tensors))]
    begin = state.timeline.now() if state.timeline else 0.0
    lent = slot.lent(state.spares) if state.copy else None
    results = [
        _result(state, batch, part, place, lent) for part in batch.parts for place in range(part.size)
    ]
    if state.timeline:
        state.timeline.host("copy out", batch.first, begin)
    return results


def _result(state: State, batch: Batch, part: Part, place: int, lent: np.ndarray | None) -> Any:
    """One of them; ``lent`` has the slot's bytes, if they may be handed out as they are."""
    slot, number = batch.slot, part.first + place
    if part.error is not None:
        return _error(batch, number, part.error)
    assert slot is not None and slot.broken is not None
    if state.check_finite and slot.broken[number]:
        what = "the network returned NaN or infinity; run it in float32, or look at its weights"
        return PictureError(batch.first + number, what, batch.sides)
    pixels = part.picture(slot.bytes_of_results() if lent is None else lent, place)
    if state.copy and lent is None:
        try:
            out = np.empty_like(pixels)
        except MemoryError as cause:
            return _error(batch, number, cause)
        state.copier(out, pixels)
        pixels = out
    return torch.from_numpy(pixels) if batch.tensors[number] else pixels


def _error(batch: Batch, number: int, cause: Exception) -> PictureError:
    error = PictureError(batch.first + number, f"{type(cause).__name__}: {cause}", batch.sides)
    error.__cause__ = cause
    return error
