"""A compiled graph with ``precision="int8"``: its first call settles what multiplies integers, later ones do.

The scales are the weights' and that picture's. Weights that are written, or others in their place, are
calibrated by the next call with them; other pictures and sizes are not, for a norm makes their numbers alike.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sf_compile.runtime.calibration import Calibration, NotTelling
from sf_compile.runtime.unchanged import Forget, Unchanged

_MOST_WEIGHTS = 8  # sets of them, of models that share a compiled graph
_log = logging.getLogger(__name__)

Run = Callable[..., Any]


class _Settled:
    """What was settled for parameters, while they are as they were."""

    def __init__(self, parameters: Sequence[Tensor], forget: Callable[[Any], None], run: Run) -> None:
        self.unchanged = Unchanged(parameters)
        self.references = [weakref.ref(p, forget) for p in parameters]
        self.run = run


class Calibrated:
    """Computes what ``plain`` does, with integers once a call has settled where and by what scales.

    Args:
        plain: The graph in float16.
        calibrate: From a call's inputs to what they settle; raises ``NotTelling``.
        prepare: From that to what runs later calls.

    Calls that need gradients, and those that are captured, traced or watched by a mode of PyTorch before any
    call was calibrated, are computed by ``plain``. May be called by several threads at once.
    """

    def __init__(
        self,
        plain: Run,
        calibrate: Callable[[Sequence[Any]], Calibration],
        prepare: Callable[[Calibration], Run],
    ) -> None:
        self._plain = plain
        self._calibrate = calibrate
        self._prepare = prepare
        self._settled: OrderedDict[int, _Settled] = OrderedDict()
        self._places: dict[tuple[type, ...], tuple[int, ...]] = {}
        self._lock = threading.RLock()
        self._said: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns."""
        parameters = self._parameters(inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return self._in_float16("a call that needs gradients; torch.no_grad() says that none are", inputs)
        settled = self._settled.get(id(parameters[0]) if parameters else 0)
        if settled is not None and settled.unchanged.holds_for(parameters):
            return settled.run(*inputs)
        if any(map(Tensor.is_inference, parameters)):
            return self._in_float16("parameters made in inference mode do not tell when written", inputs)
        if _elsewhere(inputs):
            return self._in_float16("a call before the first that was not captured or traced", inputs)
        with self._lock:
            settled = self._settle(parameters, inputs)
        return self._plain(*inputs) if settled is None else settled.run(*inputs)

    def _parameters(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The parameters among ``inputs``: found by types, for asking each what it is takes longer."""
        types = tuple(map(type, inputs))
        places = self._places.get(types)
        if places is None:
            found = (i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
            places = self._places[types] = tuple(found)
        return [inputs[i] for i in places]

    def _settle(self, parameters: Sequence[Tensor], inputs: Sequence[Any]) -> _Settled | None:
        key = id(parameters[0]) if parameters else 0
        settled = self._settled.get(key)
        if settled is not None and settled.unchanged.holds_for(parameters):  # by another thread meanwhile
            return settled
        try:
            calibration = self._calibrate(inputs)
        except NotTelling as reason:
            self._say(f"a call that is not calibrated by: {reason}")
            return None
        level = logging.INFO if calibration.scales else logging.WARNING
        _log.log(level, "styleforge: int8: %s", calibration)
        for site, why in calibration.left.items():
            _log.debug("int8: %s stays in float16: %s", site, why)
        made = _Settled(parameters, Forget(self, key), self._prepare(calibration))
        self._settled[key] = made
        self._settled.move_to_end(key)
        while len(self._settled) > _MOST_WEIGHTS:
            self._settled.popitem(last=False)
        return made

    def forget(self, key: int) -> None:
        """Drop what was settled for parameters of which one is gone."""
        with self._lock:
            self._settled.pop(key, None)

    def _in_float16(self, reason: str, inputs: Sequence[Any]) -> Any:
        self._say(reason)
        return self._plain(*inputs)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("styleforge: int8: computed in float16: %s", reason)


def _elsewhere(inputs: Sequence[Any]) -> bool:
    """Whether this call has no numbers to look at: it is captured in a CUDA graph, or traced."""
    from sf_compile.cuda.repeated import watched

    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    return watched() or (on_gpu and torch.cuda.is_current_stream_capturing())
