"""A run of fused ops as one call: recorded when it comes a second time, and replayed from the third on.

The first call of a kind loads kernels, packs weights and makes workspaces. The second does none of that, so
what it launches is all that there is to do.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from sf_compile import tf32
from sf_compile.cuda import kernel_graph
from sf_compile.cuda.recorder import Recorder
from sf_compile.cuda.recording import NotReplayable, Recording, resolve
from sf_compile.cuda.replay import Replay
from sf_compile.ops.library import CUDA
from sf_compile.runtime.unchanged import Forget, Unchanged, picker

_MOST_KINDS = 8
_MOST_ATTEMPTS = 2  # at a recording; another thread may have done what made the first one fail
_NUMBERS = (int, float, bool)
_told_apart = object.__hash__  # as id(), which also asks who audits the process
_guards: Any = torch._C._dynamo.guards
_empty_strided = {
    # Inductor's, of (size, stride, dtype) on the current device: half the time of torch.empty_strided.
    "cuda": _guards._empty_strided_cuda, "cpu": _guards._empty_strided_cpu,
}  # fmt: skip
_log = logging.getLogger(__name__)


class _Positions:
    """Which inputs are what, for inputs of some types; each of these stands for itself alone in a key."""

    def __init__(self, parameters: list[int], tensors: list[int], numbers: list[int]) -> None:
        self.parameters = picker(parameters)
        self.tensors = picker(tensors)
        self.numbers = picker(numbers)


class _Kind:
    """What is known of the calls of one kind, while the parameters are those of the first.

    A parameter is the same if it is the same object at the same address, unwritten since. Its shape, strides
    and dtype then are the same too, for those of the graph's parameters are what Dynamo's guards check. Once
    there is a recording, a parameter that its kernels read where it lies only has to lie there.
    """

    def __init__(self, parameters: Sequence[Tensor], forget: Any) -> None:
        self.parameters = Unchanged(parameters)
        self.references = [weakref.ref(p, forget) for p in parameters]
        self.attempts = 0
        self.prepared = False  # the first call has returned
        self.recording_now = threading.Lock()
        self.recording: Recording | None = None
        self.threads = threading.local()

    def holds_for(self, parameters: Sequence[Tensor]) -> bool:
        """Whether ``parameters`` are still those of the first call."""
        return self.parameters.holds_for(parameters) and (self.recording is None or self.recording.holds())

    def replay_by(self, recording: Recording) -> None:
        """The calls that follow repeat this one, unless another thread's is there already."""
        if self.recording is None:
            self.parameters = self.parameters.where_copied(recording.copied)
            self.recording = recording


class _Implementations(fx.Interpreter):
    """Calls the ops' CUDA kernels themselves: below the dispatcher a recorder would not see into them."""

    def __init__(self, inner: fx.GraphModule) -> None:
        super().__init__(inner)
        self.extra_traceback = False  # an error of a launch reads as it does elsewhere

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            target = CUDA[target._schema.name.removeprefix("styleforge::")]
        return target(*args, **kwargs)


class Repeated:
    """Computes what ``inner`` does, a graph of ``styleforge`` ops that returns a tuple of tensors.

    Where a call is like one before (shapes, strides, dtypes, alignment, numbers, parameters and stream), the
    kernels of that one are launched again. Calls that need gradients, that are captured, traced or watched
    by a mode of PyTorch, and runs of ops that take more than our kernels, are left to ``inner``. May be
    called by several threads at once.
    """

    def __init__(self, inner: fx.GraphModule) -> None:
        self._inner = inner
        self._ops = getattr(inner, "forward", inner)  # a module's call looks for hooks, and prints its errors
        self._positions: dict[tuple[type, ...], _Positions | None] = {}
        self._kinds: OrderedDict[tuple[Any, ...], _Kind] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The tuple that ``inner`` returns, in tensors of their own.

        Raises:
            KernelLaunchError: the driver rejects a launch.
        """
        types = tuple(map(type, inputs))
        try:
            positions = self._positions[types]
        except KeyError:
            positions = self._positions[types] = _positions(types)
        if positions is None or watched():
            return self._ops(*inputs)
        parameters, tensors = positions.parameters(inputs), positions.tensors(inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors + parameters):
            return self._ops(*inputs)
        device = (tensors or parameters)[0].device
        if len(tensors) > 1 and any(x.device != device for x in tensors):
            return self._ops(*inputs)
        if torch._C._cuda_getDevice() != device.index:
            with torch.cuda.device(device.index):
                return self(*inputs)
        if torch.cuda.is_current_stream_capturing():
            return self._ops(*inputs)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        key = (
            # Models may share a compiled graph, whose parameters then take turns: the first one tells them.
            positions, stream, _told_apart(parameters[0]) if parameters else 0, tf32.allowed("auto"),
            positions.numbers(inputs),
            *((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, x.is_neg()) for x in tensors),
        )  # fmt: skip
        kind = self._kind(key, parameters)
        if kind is None or kind.attempts >= _MOST_ATTEMPTS:
            return self._ops(*inputs)
        if not kind.prepared:
            results = self._ops(*inputs)
            kind.prepared = True
            return results
        if kind.recording is None:
            if not kind.recording_now.acquire(blocking=False):
                return self._ops(*inputs)
            try:
                return self._record(kind, inputs, tensors, parameters)
            finally:
                kind.recording_now.release()
        return _replay(kind, kind.recording, stream, tensors, device)

    def _kind(self, key: tuple[Any, ...], parameters: Sequence[Tensor]) -> _Kind | None:
        """What is known of calls like this one; None where nothing can be."""
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None or not kind.holds_for(parameters):
                if any(map(Tensor.is_inference, parameters)):  # those have no version, and are packed anew
                    return None
                kind = self._kinds[key] = _Kind(parameters, Forget(self, key))
                while len(self._kinds) > _MOST_KINDS:
                    self._kinds.popitem(last=False)
            self._kinds.move_to_end(key)
            return kind

    def forget(self, key: tuple[Any, ...]) -> None:
        """Drop what is known of the calls of one kind: a parameter of theirs is gone."""
        with self._lock:
            self._kinds.pop(key, None)

    def _record(
        self, kind: _Kind, inputs: Sequence[Any], tensors: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        with torch.no_grad(), Recorder() as recorder:
            results = _Implementations(self._inner).run(*inputs)
        try:
            recording = resolve(recorder, tensors, parameters, results)
            if (missing := kernel_graph.refusal()) is not None:
                raise NotReplayable(missing)
        except NotReplayable as reason:
            kind.attempts += 1
            _log.debug("%d fused ops are not replayed: %s", len(recorder.launches), reason)
        else:
            with self._lock:
                kind.replay_by(recording)
            _log.debug("%d launches will be replayed; %s", len(recording.launches), recording.arena)
        return results


def _replay(
    kind: _Kind, recording: Recording, stream: int, tensors: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, ...]:
    """The results of ``recording`` for other ``tensors``, by the calling thread's copy of it."""
    try:
        replay: Replay = kind.threads.replay
    except AttributeError:
        replay = kind.threads.replay = Replay(recording, stream)
    empty = _empty_strided[device.type]
    arena = empty((recording.arena.bytes,), (1,), torch.uint8)
    outputs = [empty(size, stride, dtype) for size, stride, dtype in recording.outputs]
    replay([x.data_ptr() for x in (arena, *tensors, *outputs)])
    return tuple([outputs[i] for i in recording.returned])


def _positions(types: Sequence[type]) -> _Positions | None:
    """The inputs by what they are; None where one is neither a plain tensor, a parameter nor a number."""
    kinds: tuple[tuple[type, ...], ...] = (torch.nn.Parameter,), (Tensor,), _NUMBERS
    found = [[i for i, one in enumerate(types) if one in kind] for kind in kinds]
    known = sum(map(len, found)) == len(types) and bool(found[0] or found[1])
    return _Positions(*found) if known else None


def watched() -> bool:
    """Whether a mode, a transform or a tracer of PyTorch wants to see each operation."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _only_a_default_device())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
    )


def _only_a_default_device() -> bool:
    """Whether the modes that see functions are those of ``torch.set_default_device``: no matter of ours."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
