"""Pictures on the host: uint8 (H, W, 3) in a numpy array or a CPU tensor, and what is wrong with others."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class PictureError(RuntimeError):
    """One picture could not be had from the source or stylised; those before and after it are not touched.

    Attributes:
        index: its place in the source, from 0.
        what: the message without the index.
        sides: its height and width, where they are known.
    ``__cause__`` is the exception behind it, where there is one.
    """

    def __init__(self, index: int, what: str, sides: tuple[int, int] | None = None) -> None:
        super().__init__(f"picture {index}: {what}")
        self.index = index
        self.what = what
        self.sides = sides


class HostPicture(NamedTuple):
    """``pixels`` uint8 (H, W, 3), a view of what the source gave; ``tensor``: that was a tensor."""

    pixels: np.ndarray
    tensor: bool


def pictures_of(item: Any) -> list[HostPicture]:
    """What one item of a source holds: a picture (H, W, 3), or each of a batch (N, H, W, 3).

    Raises:
        TypeError: neither a numpy array nor a tensor on the CPU, or not of uint8; the message has the fix.
        ValueError: another shape.
    """
    array = _array(item)
    tensor = isinstance(item, Tensor)
    if array.ndim == 4 and array.shape[3] == 3 and array.size:
        return [HostPicture(pixels, tensor) for pixels in array]
    if array.ndim == 3 and array.shape[2] == 3 and array.size:
        return [HostPicture(array, tensor)]
    raise ValueError(f"shape {tuple(array.shape)} is {_wrong_shape(array.shape, tensor)}")


def _array(item: Any) -> np.ndarray:
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8:
            raise TypeError(
                f"dtype {item.dtype} is not torch.uint8; of numbers from 0 to 1 make bytes by "
                ".mul(255).round().clamp(0, 255).to(torch.uint8)"
            )
        if item.device.type != "cpu":
            raise TypeError(f"it is on {item.device}; pictures come from the host: call .cpu()")
        return item.detach().numpy()
    if not isinstance(item, np.ndarray):
        advice = "use numpy.asarray(image.convert('RGB'))" if _is_pillow(item) else (
            "give numpy arrays or tensors of uint8 and shape (height, width, 3)"
        )
        raise TypeError(f"{type(item).__name__} is no picture; {advice}")
    if item.dtype != np.uint8:
        raise TypeError(
            f"dtype {item.dtype} is not uint8; of numbers from 0 to 1 make bytes by "
            "(picture * 255).round().clip(0, 255).astype('uint8')"
        )
    return item


def _is_pillow(item: Any) -> bool:
    return type(item).__module__.split(".")[0] == "PIL"


def _wrong_shape(shape: tuple[int, ...], tensor: bool) -> str:
    """What a picture of that shape is, and how to make it RGB (H, W, 3)."""
    if 0 in shape:
        return "an empty picture; leave it out"
    if len(shape) == 2:
        fix = "picture[..., None].expand(-1, -1, 3)" if tensor else "numpy.repeat(picture[..., None], 3, 2)"
        return f"a grey picture; make it RGB by {fix}"
    if len(shape) in (3, 4) and shape[-1] == 1:
        times = ", ".join(["-1"] * (len(shape) - 1) + ["3"])
        fix = f"picture.expand({times})" if tensor else "numpy.repeat(picture, 3, -1)"
        return f"a grey picture; make it RGB by {fix}"
    if len(shape) in (3, 4) and shape[-1] == 4:
        return "RGBA; drop the alpha by picture[..., :3], or blend it first"
    if len(shape) in (3, 4) and shape[-3] == 3:
        axes = "1, 2, 0" if len(shape) == 3 else "0, 2, 3, 1"
        return f"channels first; use picture.{'permute' if tensor else 'transpose'}({axes})"
    return "not (height, width, 3)"
