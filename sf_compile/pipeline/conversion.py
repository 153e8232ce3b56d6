"""Between pictures as bytes and a network's numbers: dtype, range, layout and sides, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Convention:
    """What a network takes and returns.

    Attributes:
        device: where it is.
        dtype: of its input.
        channels_last: the input's memory format.
        input_range: the numbers that bytes 0 and 255 become.
        output_range: the numbers that become bytes 0 and 255; what lies beyond is clamped.
        side_multiple: sides are extended by reflection, at the right and below, to a multiple of this ...
        min_side: ... that is no less than this; the result is cropped back.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool = False
    input_range: tuple[float, float] = (0.0, 255.0)
    output_range: tuple[float, float] = (0.0, 255.0)
    side_multiple: int = 1
    min_side: int = 1

    def __post_init__(self) -> None:
        for name in ("input_range", "output_range"):
            low, high = getattr(self, name)
            if not low < high or high - low == float("inf"):
                raise ValueError(f"{name} must be (low, high) with low < high, got {(low, high)}")
        for name in ("side_multiple", "min_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating one, got {self.dtype}")

    @classmethod
    def of(
        cls, model: Network, device: Any = None, dtype: torch.dtype | None = None,
        channels_last: bool | None = None, input_range: tuple[float, float] | None = None,
        output_range: tuple[float, float] | None = None, side_multiple: int | None = None,
        min_side: int | None = None,
    ) -> Convention:  # fmt: skip
        """What is not given, as ``model`` says it: by its weights, and by its class if it is one of ours.

        Raises:
            ValueError: a range, a side or a dtype that cannot be, or a model without weights and no device or
                dtype given.
        """
        weights = [p for p in _parameters(model) if p.is_floating_point()]
        kernels = [p for p in weights if p.dim() == 4]
        first = next(iter(kernels or weights), None)
        if first is None and (device is None or dtype is None):
            raise ValueError(
                f"{type(model).__name__} has no parameters that tell where it is and in which precision; "
                "pass device= and dtype="
            )
        if channels_last is None:
            channels_last = any(
                p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels
            )
        multiple, least, top = _habits(model)
        place = first.device if first is not None and device is None else torch.device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        return cls(
            place,
            first.dtype if first is not None and dtype is None else dtype,  # type: ignore[arg-type]
            channels_last,
            _pair(input_range or (0.0, top)),
            _pair(output_range or (0.0, top)),
            multiple if side_multiple is None else side_multiple,
            least if min_side is None else min_side,
        )

    def extended(self, side: int) -> int:
        """The length to which a side is extended."""
        return -(-max(side, self.min_side) // self.side_multiple) * self.side_multiple

    def to_numbers(self, pixels: Tensor) -> Tensor:
        """The network's input for bytes (N, H, W, 3) on its device."""
        from sf_compile.ops import picture_to_float

        size = [self.extended(side) for side in pixels.shape[1:3]]
        return picture_to_float(pixels, size, self.dtype, *self.input_range, self.channels_last)

    def to_bytes(self, output: Any, pixels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (N, H', W', 3) of what the network made of ``x``, the numbers of ``pixels``.

        Also which pictures have numbers that are not finite: (N,), 1 for each of those.

        Raises:
            ValueError: not pictures of three channels, or of a size that cannot be cropped back.
        """
        from sf_compile.ops import picture_to_uint8

        if not isinstance(output, Tensor):
            raise ValueError(f"the network returned {type(output).__name__}, not a tensor")
        turned = f"the network turned shape {tuple(x.shape)} into {tuple(output.shape)}"
        if output.dim() != 4 or output.shape[:2] != x.shape[:2]:
            raise ValueError(turned)
        if not output.is_floating_point():
            raise ValueError(f"the network returned {output.dtype}, not floating numbers")
        sides, extended = pixels.shape[1:3], x.shape[2:]
        if sides != extended:
            factor = output.shape[2] // extended[0]
            if factor < 1 or output.shape[2:] != torch.Size(factor * side for side in extended):
                raise ValueError(f"{turned}, which cannot be cropped to the picture")
            output = output[:, :, : factor * sides[0], : factor * sides[1]]
        return picture_to_uint8(output, *self.output_range)


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def _parameters(model: Any) -> list[Tensor]:
    return list(model.parameters()) if isinstance(model, nn.Module) else []


def _habits(model: Any) -> tuple[int, int, float]:
    """side_multiple, min_side and the end of both ranges, as the networks of ``sf_compile.models`` have them.

    Compiled or not; of others 1, 1 and 255.
    """
    module = getattr(model, "_orig_mod", model)
    if not type(module).__module__.startswith("sf_compile.models"):
        return 1, 1, 255.0
    from sf_compile import models

    top = 1.0 if isinstance(module, models.MultiStyleNet) else 255.0
    return models.SIDE_MULTIPLE, models.MIN_SIDE, top
