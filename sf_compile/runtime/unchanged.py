"""Whether tensors are as they were: asked of dozens of parameters in every call."""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

version_of: Callable[[Tensor], int] = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
"""How often a tensor was written, of one that is no inference tensor; the quickest way to ask."""

_lie_at: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
"""PyTorch's own for CUDA graphs, in builds with CUDA: one call in place of one for each tensor."""


class Unchanged:
    """Tensors as they are now: these objects, where they lie, written as often.

    Their shapes, strides and dtypes are the same then, too, unless ``.data`` was given one of that memory.
    ``Module.half()`` and back again may do that, with all of them: the first one's storage tells.

    Raises RuntimeError for an inference tensor, which has no version.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._all = list(range(len(tensors)))
        self._references = list(map(weakref.ref, tensors))
        self._versions = list(map(version_of, tensors))
        self._copied: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
        self._first = StorageWeakRef(tensors[0].untyped_storage()) if tensors else None

    def where_copied(self, places: Sequence[int]) -> Unchanged:
        """The same of tensors that are read where they lie, but for those at ``places``: of these are copies.

        So of the others it does not matter what is written to them, or whose memory it is.
        """
        narrowed = copy.copy(self)
        narrowed._references = [self._references[i] for i in places]
        narrowed._versions = [self._versions[i] for i in places]
        narrowed._copied = picker(places)
        return narrowed

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are those, as they were."""
        copied = self._copied(tensors)
        # By weak references: id() also asks who audits the process.
        if not all(map(operator.is_, copied, [reference() for reference in self._references])):
            return False
        if list(map(version_of, copied)) != self._versions:
            return False
        if self._first is not None and self._first.cdata != tensors[0].untyped_storage()._cdata:
            return False
        if _lie_at is not None:
            return bool(_lie_at(list(tensors), self._addresses, self._all))
        return list(map(Tensor.data_ptr, tensors)) == self._addresses


class Forgetful(Protocol):
    """Has something by key that holds for the same parameters alone."""

    def forget(self, key: Any) -> None:
        """Drop what is kept by ``key``."""


class Forget:
    """Has ``owner`` forget ``key`` when a tensor is gone that this is a weak reference's callback of.

    Keeps nothing alive.
    """

    def __init__(self, owner: Forgetful, key: Any) -> None:
        self._owner = weakref.ref(owner)
        self._key = key

    def __call__(self, _: Any) -> None:
        """What a weak reference calls."""
        owner = self._owner()
        if owner is not None:
            owner.forget(self._key)


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What picks the items at ``places``, as a tuple, in one call: there are dozens of them."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda items: tuple(items[i] for i in places)
