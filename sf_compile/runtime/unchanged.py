"""Whether tensors are as they were: asked of dozens of parameters in every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

version_of: Callable[[Tensor], int] = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
"""How often a tensor was written, of one that is no inference tensor; the quickest way to ask."""

_lie_at: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
"""PyTorch's own for CUDA graphs, in builds with CUDA: a tenth of the time of asking each tensor."""


class Unchanged:
    """Tensors as they are now: these objects, where they lie, written as often.

    Their shapes, strides and dtypes are the same then, too, unless ``.data`` was given one of that memory.

    Raises RuntimeError for an inference tensor, which has no version.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._identities = list(map(id, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._versions = list(map(version_of, tensors))
        self._all = list(range(len(tensors)))

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are those, as they were."""
        if list(map(id, tensors)) != self._identities:
            return False
        if _lie_at is not None:
            same = _lie_at(list(tensors), self._addresses, self._all)
        else:
            same = list(map(Tensor.data_ptr, tensors)) == self._addresses
        return bool(same) and list(map(version_of, tensors)) == self._versions
