"""Tensor maps: how the copy engine of compute capability 9.0 is told of a tensor in global memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from sf_compile.cuda.driver_calls import checked, enter_context

SWIZZLES = {32: "32B", 64: "64B", 128: "128B"}
"""Bytes of a box's innermost row that a shared-memory swizzle exists for here."""


class TensorMap(bytes):
    """Encoded maps, 128 bytes each, that know what they were made of.

    ``parts`` has for each map the address that it is of, and what encodes it for another address.
    """

    parts: tuple[tuple[int, Callable[[int], TensorMap]], ...]

    @classmethod
    def of(cls, address: int, data: bytes, encode: Callable[[int], TensorMap]) -> TensorMap:
        """The one map ``data``."""
        made = cls(data)
        made.parts = ((address, encode),)
        return made

    @classmethod
    def joined(cls, maps: Sequence[TensorMap]) -> TensorMap:
        """An array of maps, as one kernel parameter takes it."""
        made = cls(b"".join(maps))
        made.parts = tuple(part for one in maps for part in one.parts)
        return made


@functools.lru_cache(maxsize=1024)
def channels_last_map(
    address: int, dtype: torch.dtype, shape: tuple[int, int, int, int], box: tuple[int, int, int],
    step: int = 1, spread: int = 1, to_tf32: bool = False,
) -> TensorMap:  # fmt: skip
    """A map, 128 bytes, of a dense channels_last picture, its dimensions ordered C, H, W, N.

    ``address`` of the first element (a multiple of 16) and ``shape`` (N, C, H, W) of a float32, float16 or
    bfloat16 tensor whose pixels are a multiple of 16 bytes. ``box`` is what one copy moves: channels (a row
    of 32, 64 or 128 bytes, swizzled by its size), rows and columns. ``step`` 2 takes every other of these;
    with ``spread`` 2 the picture's rows and columns are every other one of a picture twice as high and wide.
    What lies outside the picture arrives as zeros and is not written; a copy to it must not start there.
    With ``to_tf32`` copies from it round float32 to TF32.
    Raises KernelLaunchError for what the driver rejects.
    """
    from cuda.bindings import driver

    enter_context(driver)
    n, c, h, w = shape
    channels, rows, columns = box
    size = dtype.itemsize
    name = "TFLOAT32" if to_tf32 and size == 4 else str(dtype).removeprefix("torch.").upper()
    kind = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{name}")
    swizzle = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{SWIZZLES[size * channels]}")

    def sizes(*values: int) -> list[object]:
        return [driver.cuuint64_t(value) for value in values]

    def counts(*values: int) -> list[object]:
        return [driver.cuuint32_t(value) for value in values]

    encoded = checked(
        driver,
        f"cuTensorMapEncodeTiled of a {tuple(shape)} picture with boxes {box} and step {step}",
        driver.cuTensorMapEncodeTiled(
            kind, 4, address, sizes(c, h, w, n),
            sizes(size * w * c * spread**2, size * c * spread, size * h * w * c * spread**2),
            counts(channels, (rows - 1) * step + 1, (columns - 1) * step + 1, 1), counts(1, step, step, 1),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )  # fmt: skip
    return TensorMap.of(
        address,
        ctypes.string_at(int(encoded.getPtr()), 128),
        lambda other: channels_last_map(other, dtype, shape, box, step, spread, to_tf32),
    )
