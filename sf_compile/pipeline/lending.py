"""Result buffers that are handed out with the pictures in them, and come back when nobody holds these.

Copying a large picture out of page-locked memory into new memory takes the host longer than the network takes
a fast GPU, most of it for the new memory's pages. So results stay where they were downloaded to, and the slot
gets another buffer.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor


class Spares:
    """Buffers to take the place of those that are lent, ``count`` of them; made when they are first needed.

    Args:
        count: how many may be lent at once.
        moment: what later downloads wait for before they write to a buffer that has come back: called when
            it does, in the thread that let the last picture in it go.
    """

    def __init__(self, count: int, moment: Callable[[], Any]) -> None:
        self._idle: deque[tuple[Tensor | None, Any]] = deque([(None, None)] * count)
        self._moment = moment
        self._closed = False

    def exchange(self, buffer: Tensor) -> tuple[np.ndarray, Tensor | None, Any] | None:
        """Lend ``buffer``; None where all are lent.

        Returns:
            Its bytes, flat, in an array that may be handed out, or views of it; the buffer that takes its
            place, if there is one already; and what to wait for before that one is written.
        """
        try:
            spare, since = self._idle.pop()
        except IndexError:
            return None
        array: np.ndarray = buffer.numpy()
        # Views of an array keep it alive; so this is the end of the last of them.
        weakref.finalize(array, self._back, buffer).atexit = False
        return array, spare, since

    def _back(self, buffer: Tensor) -> None:
        if not self._closed:
            self._idle.append((buffer, self._moment()))

    def close(self) -> None:
        """Keep no buffer; those that are lent go with their pictures."""
        self._closed = True
        self._idle.clear()
