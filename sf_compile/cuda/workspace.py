"""Zeroed memory in which the blocks of one launch meet, kept from launch to launch.

It is zeroed before its first use, and each launch leaves it as the next one with the same purpose expects it
(most leave zeros; csrc/instance_norm.cu turns a phase), so the launches of one stream share it. A CUDA graph
has memory of its own, zeroed inside it, because graphs that were captured on one stream may be replayed side
by side.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sf_compile.cuda.recorder import observing

_of_stream: dict[tuple[int, int, str], list[Tensor]] = {}
_of_capture: dict[int, tuple[int, dict[tuple[int, str], Tensor]]] = {}
_lock = threading.Lock()


def zeroed(device: torch.device, purpose: str, size: int) -> int:
    """The address of at least ``size`` bytes, at first 0, for ``device``'s current stream and ``purpose``."""
    if torch._C._cuda_getDevice() != device.index:
        with torch.cuda.device(device.index):
            return zeroed(device, purpose, size)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            found = _captured(device.index, stream)
            key: tuple[int, str] = (stream, purpose)
            memory = found.get(key)
            if memory is None or memory.numel() < size:
                # Zeroing is part of the graph, so what is replaced may serve a later tensor of the graph.
                memory = found[key] = _zeros(device, size)
            return memory.data_ptr()
        # What was outgrown is kept: another thread may be about to launch a kernel with it. Sizes double.
        grown = _of_stream.setdefault((device.index, stream, purpose), [])
        if not grown or grown[-1].numel() < size:
            grown.append(_zeros(device, size))
        if observing.recorder is not None:
            observing.recorder.uses(grown[-1])
        return grown[-1].data_ptr()


def _captured(index: int, stream: int) -> dict[tuple[int, str], Tensor]:
    """The memory of the capture in progress on ``stream``; that of the capture before it is let go."""
    from cuda.bindings import driver

    capture = int(driver.cuStreamGetCaptureInfo(stream)[2])
    latest = _of_capture.get(index)
    if latest is None or latest[0] != capture:
        latest = _of_capture[index] = (capture, {})
    return latest[1]


def _zeros(device: torch.device, size: int) -> Tensor:
    rounded = 1 << max(12, (size - 1).bit_length())
    return torch.zeros(rounded, dtype=torch.uint8, device=device)
