"""Weights in the layout a kernel wants, made once for each version of the tensor.

Dynamo hands parameters to a graph as inputs, so a weight may change between two calls
(``load_state_dict``, an optimizer step, ``.half()``). A packed copy is therefore kept for a parameter
*and* its version, and dropped with the parameter. A change of version renews the copy in place: a CUDA
graph that was captured with it goes on reading the same memory. Writes through ``.data`` change no version
and are not seen.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from sf_compile.cuda.recorder import observing


class Packed(NamedTuple):
    """A packed weight, and whether it is surely in memory already, whatever the stream.

    Where it is not, the work that makes it comes before, on the current stream: a kernel that reads its
    weights before its predecessor has finished may not be launched so.
    """

    weight: Tensor
    finished: bool

    @property
    def launch_mode(self) -> str:
        """The mode to ``loader.load`` a kernel with that fetches this weight early."""
        return "overlapping" if self.finished else "ordinary"


class _Kept(NamedTuple):
    """A packed weight, and what it was made of: memory that is another's by now has another storage."""

    version: int
    address: int
    dtype: torch.dtype
    storage: StorageWeakRef
    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, copy: Tensor) -> _Kept:
        """``copy``, made of ``weight`` as it is now."""
        storage = StorageWeakRef(weight.untyped_storage())
        return cls(weight._version, weight.data_ptr(), weight.dtype, storage, copy)

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is still what it was: neither written, nor given other memory."""
        if (self.version, self.address, self.dtype) != (weight._version, weight.data_ptr(), weight.dtype):
            return False
        return bool(self.storage.cdata == weight.untyped_storage()._cdata)


_packed = WeakTensorKeyDictionary()
_lock = threading.RLock()


def paused() -> threading.RLock:
    """What to hold, by ``with``, while no other thread may renew a copy: that waits for the whole device."""
    return _lock


def is_kept(weight: Tensor) -> bool:
    """Whether a copy of ``weight`` serves later calls: of a ``torch.nn.Parameter`` that has a version.

    Generated code may write a tensor of its own anew without a change of version.
    """
    return isinstance(weight, torch.nn.Parameter) and not weight.is_inference()


def packed(weight: Tensor, form: str, pack: Callable[[Tensor], Tensor]) -> Packed:
    """``pack(weight)``, from a copy made earlier in the same ``form`` if the weight is still the same."""
    if not is_kept(weight):
        return Packed(pack(weight.detach()), False)
    with _lock:
        forms: dict[str, _Kept] = _packed.setdefault(weight, {})
        kept = forms.get(form)
        if kept is not None and kept.is_of(weight):
            if observing.recorder is not None:
                observing.recorder.uses(kept.weight, of=weight)
            return Packed(kept.weight, True)
        with torch.inference_mode(False):  # what is kept will be written again, in whatever mode
            return _renewed(weight, form, pack, kept, forms)


def _renewed(
    weight: Tensor, form: str, pack: Callable[[Tensor], Tensor], kept: _Kept | None, forms: dict[str, _Kept]
) -> Packed:
    """A copy packed anew, in the place of the one that is kept."""
    with torch.no_grad():
        copy = pack(weight.detach())
        if weight.is_cuda:
            with torch.cuda.device(weight.device):
                if torch.cuda.is_current_stream_capturing():
                    return Packed(copy, False)  # made by the graph, at every replay: nothing is in it yet
                if kept is not None and (kept.weight.shape, kept.weight.dtype) == (copy.shape, copy.dtype):
                    torch.cuda.synchronize()  # until no stream reads the old numbers
                    copy = kept.weight.copy_(copy)
                torch.cuda.current_stream().synchronize()
        forms[form] = _Kept.of(weight, copy)
        return Packed(copy, True)


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter`` in ``dtype``: itself, or a copy that is kept as packed ones are, and can be packed."""
    if parameter.dtype == dtype:
        return parameter
    if not is_kept(parameter):
        return parameter.detach().to(dtype)
    return packed(parameter, f"in {dtype}", functools.partial(_cast, dtype)).weight


def _cast(dtype: torch.dtype, parameter: Tensor) -> Tensor:
    # What is packed of the copy is kept for a parameter with a version: renewed in place, it changes its own.
    return torch.nn.Parameter(parameter.to(dtype), requires_grad=False)


def channels_last(weight: Tensor) -> Tensor:
    """``weight`` (O, C, kh, kw), or (C, O, kh, kw), in channels_last."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return packed(weight, "channels_last", _channels_last).weight


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)
