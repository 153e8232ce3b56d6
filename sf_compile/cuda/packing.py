"""Weights in the layout a kernel wants, made once for each version of the tensor.

Dynamo hands parameters to a graph as inputs, so a weight may change between two calls
(``load_state_dict``, an optimizer step, ``.half()``). A packed copy is therefore kept for a tensor
*and* its version, and dropped with the tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Packed(NamedTuple):
    version: int
    address: int
    weight: Tensor


_packed = WeakTensorKeyDictionary()


def channels_last(weight: Tensor) -> Tensor:
    """``weight`` (O, C, kh, kw) in channels_last, from a copy made earlier if it is still the same."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    if weight.is_inference():  # has no version to watch
        return weight.contiguous(memory_format=torch.channels_last)
    packed = _packed.get(weight)
    if packed is not None and packed.version == weight._version and packed.address == weight.data_ptr():
        return packed.weight
    copy = weight.detach().contiguous(memory_format=torch.channels_last)
    _packed[weight] = _Packed(weight._version, weight.data_ptr(), copy)
    return copy
