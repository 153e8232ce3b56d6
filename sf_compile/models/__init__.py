"""Reference networks, and the loaders that fill them with trained weights.

Every network takes and returns RGB pictures of shape (N, 3, H, W) in 0..255, except the bare
`MultiStyleNet` (0..1). Both sides must be at least `MIN_SIDE` pixels; an output side is the input
side rounded up to a multiple of `SIDE_MULTIPLE`.
"""

from __future__ import annotations

import difflib
import os

from torch import nn

from sf_compile.models.builtin import MissingExtraError, builtin_styles, load_builtin
from sf_compile.models.checkpoint import CheckpointError, load_checkpoint
from sf_compile.models.multistyle import MultiStyleNet
from sf_compile.models.tf_transform_net import TensorFlowTransformNet
from sf_compile.models.transformer_net import TransformerNet

__all__ = [
    "MIN_SIDE",
    "SIDE_MULTIPLE",
    "CheckpointError",
    "MissingExtraError",
    "MultiStyleNet",
    "TensorFlowTransformNet",
    "TransformerNet",
    "builtin_styles",
    "load",
    "load_builtin",
    "load_checkpoint",
]

SIDE_MULTIPLE = 4  # two stride-2 convolutions, then two x2 upsamplings
MIN_SIDE = 5  # a reflection pad of 4 needs 5 pixels, and a quarter of 5, rounded up, is 2 for a pad of 1


def load(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint file, or a built-in style where no such file exists.

    Returns a network in eval mode on the CPU, float32, RGB 0..255 in and out.

    Raises:
        CheckpointError: it is neither; the message lists close names. Also as `load_checkpoint`.
        MissingExtraError: a built-in style without the ``demo`` extra installed.
    """
    name = os.fspath(name_or_path)
    if os.path.exists(name):
        return load_checkpoint(name)
    if name in builtin_styles():
        return load_builtin(name)
    close = difflib.get_close_matches(name, builtin_styles(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise CheckpointError(
        f"{name}: no such file, and no built-in style of that name{hint} "
        "(`styleforge stylize --list-styles` lists them all)"
    )
