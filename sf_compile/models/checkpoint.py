"""Load trained style-transfer checkpoints: tell the network by its keys, repair what is known to be stale."""

from __future__ import annotations

import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from sf_compile.models.tf_transform_net import TensorFlowTransformNet
from sf_compile.models.transformer_net import TransformerNet

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model")  # keys under which training scripts put the state_dict
PREFIXES = ("module.", "_orig_mod.")  # nn.DataParallel's and torch.compile's
# Instance norms kept running statistics before PyTorch 0.4; the networks never read them.
STALE_SUFFIXES = (".running_mean", ".running_var", ".num_batches_tracked")

# What unpickling arbitrary bytes raises, seen by feeding it truncated and altered checkpoints.
DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, struct.error, zipfile.BadZipFile,
)


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the one-line message names the file, the key and what was expected."""


def load_checkpoint(path: str | os.PathLike[str]) -> TransformerNet | TensorFlowTransformNet:
    """Load a state_dict file into the network its keys and shapes describe.

    `TransformerNet` and `TensorFlowTransformNet` are told apart by their keys; width and depth come
    from the shapes. A state_dict under "state_dict" or "model" is unwrapped. Prefixes that
    nn.DataParallel and torch.compile add are stripped, and stale running statistics of the instance
    norms dropped; each is logged as a warning. Only tensors are unpickled (``weights_only=True``).

    Returns the network in eval mode on the CPU, float32 whatever the file's dtype.

    Raises:
        CheckpointError: a missing, damaged or foreign file, or a missing, unexpected or misshapen key.
    """
    name = os.fspath(path)
    state = _strip(_unwrap(_read(name), name), name)
    network = _network_for(state, name)
    _check(state, network.state_dict(), name)
    network.load_state_dict(state)
    return network.eval()


def _read(name: str) -> Any:
    try:
        return torch.load(name, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # torch says the same of a pickled nn.Module and of a file that is no pickle at all.
        raise CheckpointError(
            f"{name}: not a file of tensors only; save one with torch.save(model.state_dict(), path)"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(f"{name}: not a PyTorch checkpoint, or a damaged one") from error


def _unwrap(loaded: Any, name: str) -> dict[str, torch.Tensor]:
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{name}: expected a state_dict, found {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{name}: {key!r} is {kind}, expected a tensor (a state_dict)")
    return dict(loaded)


def _strip(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if state and all(key.startswith(prefix) for key in state):
                state = {key[len(prefix) :]: value for key, value in state.items()}
                logger.warning("%s: stripped the prefix %r from every key", name, prefix)
                stripped = True
    stale = [key for key in state if key.endswith(STALE_SUFFIXES)]
    if stale:
        listed = ", ".join(stale)
        logger.warning("%s: dropped %d unused running statistics: %s", name, len(stale), listed)
    return {key: value for key, value in state.items() if key not in stale}


def _network_for(state: Mapping[str, torch.Tensor], name: str) -> TransformerNet | TensorFlowTransformNet:
    kinds: tuple[tuple[type[TransformerNet] | type[TensorFlowTransformNet], str, str], ...] = (
        (TransformerNet, "conv1.conv2d.weight", r"res(\d+)\."),
        (TensorFlowTransformNet, "c1.conv.weight", r"res\.(\d+)\."),
    )
    for kind, first, block in kinds:
        if first not in state:
            continue
        shape = tuple(state[first].shape)
        if len(shape) != 4 or shape[0] < 1 or shape[1:] != (3, 9, 9):
            raise CheckpointError(f"{name}: {first!r} has shape {shape}, expected (width, 3, 9, 9)")
        numbers = {match[1] for match in (re.match(block, key) for key in state) if match}
        return kind(width=shape[0], blocks=len(numbers))
    expected = " or ".join(f"{first!r} ({kind.__name__})" for kind, first, _ in kinds)
    raise CheckpointError(f"{name}: no key {expected}; found {', '.join(list(state)[:3]) or 'no keys'}, ...")


def _check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing:
        shape = tuple(expected[missing[0]].shape)
        extra = f"; unexpected {_first(unexpected)}" if unexpected else ""
        raise CheckpointError(f"{name}: missing {_first(missing)}, expected with shape {shape}{extra}")
    if unexpected:
        raise CheckpointError(f"{name}: unexpected {_first(unexpected)}; the network has no such parameter")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            found = tuple(state[key].shape)
            raise CheckpointError(f"{name}: {key!r} has shape {found}, expected {tuple(value.shape)}")


def _first(keys: list[str]) -> str:
    return f"key {keys[0]!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
