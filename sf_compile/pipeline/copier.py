"""Copies of pictures on the host: into page-locked buffers, and out of them."""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

_BAND_BYTES = 1 << 20  # the least that another thread is worth


class Copier:
    """Copies pictures, large ones in bands by several threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            # The reader and the caller each copy a band themselves.
            self._pool = ThreadPoolExecutor(2 * (threads - 1), thread_name_prefix="styleforge-copy")

    def __call__(self, target: np.ndarray, source: np.ndarray) -> None:
        """``target[...] = source``; numpy lets go of the interpreter lock while it copies."""
        bands = min(self.threads, target.nbytes // _BAND_BYTES, len(target))
        if self._pool is None or bands < 2:
            np.copyto(target, source)
            return
        edges = [len(target) * i // bands for i in range(bands + 1)]
        others: list[Future[None]] = [
            self._pool.submit(np.copyto, target[begin:end], source[begin:end])
            for begin, end in itertools.pairwise(edges[1:])
        ]
        np.copyto(target[: edges[1]], source[: edges[1]])
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
