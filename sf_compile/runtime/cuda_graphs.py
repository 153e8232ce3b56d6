"""Calls by CUDA graphs: one launch on the host for everything that a call does on the GPU.

The first call of a kind (shapes, strides, dtypes, device and numbers of the inputs; addresses and versions of
the parameters) runs as it would without: kernels are compiled, weights packed. The second is captured, and
calls are replayed from the third on. A replay copies the inputs into the graph's own, and returns copies of
its results, so no later call writes to a picture that was handed out.

Nothing here asks CUDA: that is the ``Device``'s matter.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sf_compile.runtime.call_inputs import (
    Inputs,
    exactly,
    flat,
    is_number,
    share_memory,
    sorted_inputs,
    times_written,
)
from sf_compile.runtime.graph_device import Device, Graph, NotCapturable
from sf_compile.runtime.unchanged import Forget, Unchanged

MOST_ATTEMPTS = 2
"""At capturing a kind of calls: another thread may have done what made the first one fail."""

_UNCAPTURED = 64  # kinds of calls that are remembered beside those that have a graph
_RESTLESS = 4  # changes of the weights in a row, without a replay between, that are worth a line
_log = logging.getLogger(__name__)


class _Kind:
    """What is known of the calls of one kind, while the parameters are as they were in the first."""

    def __init__(
        self, fixed: Sequence[Tensor], forget: Callable[[Any], None], refusal: str | None
    ) -> None:
        self.refusal = refusal
        self.fixed = Unchanged(fixed)
        self.references = [weakref.ref(x, forget) for x in fixed]
        self.prepared = False  # the first call has returned
        self.attempts = 0
        self.capturing = threading.Lock()
        self.graph: Graph | None = None


class Graphed:
    """Computes what ``run`` does, by CUDA graphs where that can be.

    Where it cannot, ``run`` is called, and the reason is logged once as a warning: graphs were asked for.
    May be called by several threads at once.

    Args:
        run: A function of tensors and numbers that writes to none of them.
        bound: The inputs, by number, that stay where they are, in addition to parameters.
        limit: How many graphs are kept.
        share: The share of the device's memory that they may hold together.
        device: Where calls run.
    """

    def __init__(
        self, run: Callable[..., Any], bound: Collection[int], limit: int, share: float, device: Device
    ) -> None:
        self._run = run
        self._bound = frozenset(bound)
        self._limit = limit
        self._share = share
        self._device = device
        self._inputs: dict[tuple[type, ...], Inputs | None] = {}
        self._kinds: OrderedDict[tuple[Any, ...], _Kind] = OrderedDict()
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self._changes = 0
        self._never: str | None = None

    @property
    def graphs(self) -> int:
        """How many graphs there are now."""
        with self._lock:
            return sum(kind.graph is not None for kind in self._kinds.values())

    @property
    def bytes(self) -> int:
        """What the graphs hold of the GPU's memory."""
        with self._lock:
            return sum(kind.graph.bytes for kind in self._kinds.values() if kind.graph is not None)

    def __call__(self, *inputs: Any) -> Any:
        """What ``run`` returns, in tensors that no later call writes to."""
        types = tuple(map(type, inputs))
        try:
            found = self._inputs[types]
        except KeyError:
            found = self._inputs[types] = sorted_inputs(types, self._bound)
        if self._never is not None or self._device.busy():
            return self._run(*inputs)
        if found is None:
            return self._plainly("an input is neither a plain tensor nor a number", inputs)
        fixed = [inputs[i] for i in found.fixed]
        moving = [inputs[i] for i in found.moving]
        numbers = [inputs[i] for i in found.numbers]
        places = found.moving
        if not all(x.is_cuda for x in moving):
            # A number that Dynamo keeps in a tensor on the CPU is as good as the number itself.
            numbers += [x.item() for x in moving if is_number(x)]
            places = tuple(i for i in places if not is_number(inputs[i]))
            moving = [inputs[i] for i in places]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*moving, *fixed)):
            return self._plainly("gradients are needed (call it under torch.no_grad())", inputs)
        tensors = [*moving, *fixed]
        if not tensors:
            return self._run(*inputs)
        key = (
            found, places, self._device.settings(), *map(exactly, numbers),
            # Models may share a compiled graph, whose parameters then take turns: the first one tells them.
            id(fixed[0]) if fixed else 0,
            *((x.shape, x.stride(), x.dtype, x.device) for x in moving),
        )  # fmt: skip
        with self._device.current(tensors[0]):
            kind = self._kind(key, fixed, tensors)
            if kind is None:
                return self._plainly("a parameter was made in inference mode, and has no version", inputs)
            graph = kind.graph
            if graph is not None:
                return graph.replay(moving)
            if kind.refusal is not None:
                return self._plainly(kind.refusal, inputs)
            return self._first_calls(key, kind, inputs, places)

    def _kind(
        self, key: tuple[Any, ...], fixed: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> _Kind | None:
        """What is known of calls like this one; None where nothing can be."""
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None or not kind.fixed.holds_for(fixed):
                if any(map(Tensor.is_inference, fixed)):
                    return None
                if kind is not None:
                    self._changed()
                # Of calls of a kind it is enough to ask the first: the others' tensors lie where its did.
                kind = self._kinds[key] = _Kind(fixed, Forget(self, key), self._device.refusal(tensors))
                self._forget_the_oldest()
            elif kind.graph is not None:
                self._changes = 0
            self._kinds.move_to_end(key)
            return kind

    def _changed(self) -> None:
        self._changes += 1
        if self._changes == _RESTLESS:
            self._say("the weights change from call to call: a graph is captured once they rest")

    def _forget_the_oldest(self) -> None:
        """Of the kinds that have no graph, keep the latest."""
        without = [key for key, kind in self._kinds.items() if kind.graph is None]
        for key in without[:-_UNCAPTURED]:
            del self._kinds[key]

    def forget(self, key: tuple[Any, ...]) -> None:
        """Drop what is known of the calls of one kind, and its graph."""
        with self._lock:
            self._kinds.pop(key, None)

    def _first_calls(
        self, key: tuple[Any, ...], kind: _Kind, inputs: Sequence[Any], places: Sequence[int]
    ) -> Any:
        """A call of a kind that has no graph."""
        if kind.attempts >= MOST_ATTEMPTS:
            return self._run(*inputs)
        if not kind.prepared:
            written = [times_written(inputs[i]) for i in places]
            results = self._run(*inputs)
            if [times_written(inputs[i]) for i in places] != written:
                self._never = "it writes to its inputs"
                self._say(self._never)
            kind.prepared = True
            return results
        if not kind.capturing.acquire(blocking=False):
            return self._run(*inputs)
        try:
            return self._capture(key, kind, inputs, places)
        finally:
            kind.capturing.release()

    def _capture(
        self, key: tuple[Any, ...], kind: _Kind, inputs: Sequence[Any], places: Sequence[int]
    ) -> Any:
        """The results of a call, whose graph is captured afterwards."""
        moving = [inputs[i] for i in places]
        faster = kind.graph
        if faster is not None:  # another thread was
            return faster.replay(moving)
        arguments = list(inputs)
        try:
            own = self._device.own(moving)
            for place, x in zip(places, own, strict=True):
                arguments[place] = x
            # Once more as it is, with the graph's own inputs: their alignment may ask for other kernels.
            results = self._run(*arguments)
        except torch.OutOfMemoryError as reason:
            self._failed(kind, reason)
            own, arguments = [], []
            return self._run(*inputs)
        tensors = [x for x in flat(results) if isinstance(x, Tensor)]
        if share_memory(tensors, [x for x in arguments if isinstance(x, Tensor)]):
            self._never = "it returns an input or a view of one, or two tensors of the same memory"
            self._say(self._never)
            return self._run(*inputs)
        try:
            graph = self._captured(key, arguments, own)
        except (NotCapturable, torch.OutOfMemoryError) as reason:
            self._failed(kind, reason)
            return results
        with self._lock:
            kind.graph = graph
            if self._kinds.get(key) is kind:
                tensor = next(x for x in arguments if isinstance(x, Tensor) and not is_number(x))
                self._make_room(kind, self._share * self._device.memory(tensor))
        _log.debug("captured a CUDA graph of %d bytes; there are %d", graph.bytes, self.graphs)
        return results

    def _captured(self, key: tuple[Any, ...], arguments: Sequence[Any], own: Sequence[Tensor]) -> Graph:
        """The graph; where memory is short, in the place of all others."""
        try:
            return self._device.capture(self._run, arguments, own)
        except torch.OutOfMemoryError:
            with self._lock:
                for other in [other for other, kind in self._kinds.items() if kind.graph is not None]:
                    del self._kinds[other]
        self._device.release()
        return self._device.capture(self._run, arguments, own)

    def _make_room(self, newest: _Kind, most: float) -> None:
        """Drop the graphs that were not used for longest, while there are too many or too large ones."""
        while self.graphs > self._limit or (self.bytes > most and self.graphs > 1):
            for key, kind in self._kinds.items():
                if kind.graph is not None and kind is not newest:
                    del self._kinds[key]
                    break
        if self.bytes > most:
            self._say(
                f"a graph needs {self.bytes} bytes, more than cuda_graphs_memory={self._share} of the GPU's "
                f"memory allows"
            )
            newest.graph, newest.attempts = None, MOST_ATTEMPTS

    def _failed(self, kind: _Kind, reason: Exception) -> None:
        again = isinstance(reason, NotCapturable) and reason.again
        if again:
            _log.debug("not captured this time: %s", reason)
            return
        kind.attempts += 1
        memory = isinstance(reason, torch.OutOfMemoryError)
        text = "the GPU has no memory left for a graph" if memory else str(reason)
        if kind.attempts >= MOST_ATTEMPTS:
            self._say(text)
        else:
            _log.debug("not captured, and tried once more: %s", text)

    def _plainly(self, reason: str, inputs: Sequence[Any]) -> Any:
        self._say(reason)
        return self._run(*inputs)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("styleforge: no CUDA graph: %s", reason)


def cuda() -> Device:
    """PyTorch's CUDA."""
    from sf_compile.cuda.capture import CudaDevice

    return CudaDevice()
