"""The time of one call out of many: a CUDA graph of calls that rotate over several input sets.

The sets are together several times the L2 cache, and as many results stay alive, so that every call finds
its input in device memory and not in the cache. A time is that of a replay divided by its number of calls.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A replay this long hides its own launch.
BYTES_PER_REPLAY = 4_000_000_000


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache of `device`; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def rotating_sets(call_bytes: int, device: torch.device) -> int:
    """Return how many input sets to rotate over for calls that read and write `call_bytes`."""
    return max(1, min(64, math.ceil(4 * l2_bytes(device) / call_bytes)))


def calls_in_replay(sets: int, call_bytes: int, device: torch.device) -> int:
    """Return the number of calls in a replay: whole rotations, on a GPU enough for about a millisecond."""
    if device.type != "cuda":
        return sets
    return sets * max(1, min(256, BYTES_PER_REPLAY // call_bytes) // sets)


def repeated(one: Callable[[int], Any], sets: int, calls: int, pool: Any) -> Callable[[Tensor], None]:
    """Return `calls` calls, rotating over `sets` input sets, as one; a CUDA graph where `pool` is given.

    The last `sets` results stay alive during the capture, so the allocator cannot hand each call the memory
    that the call before it has just left in the cache. Graphs of one pool share that memory: their results
    are never read.
    """

    def all_calls() -> None:
        kept: collections.deque[Any] = collections.deque(maxlen=sets)
        for number in range(calls):
            kept.append(one(number % sets))

    if pool is None:
        return lambda _: all_calls()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        all_calls()
    return lambda _: graph.replay()
