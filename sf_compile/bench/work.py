"""What a size asks for: operations, bytes, and the feature maps that an instance norm sees.

Only arithmetic: nothing here imports PyTorch or touches a GPU. A floor is a count from this file
divided by a rate that :mod:`sf_compile.bench.ceilings` measured in the same run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# A multiprocessor of Hopper has 228 KB of shared memory; 200 KB leaves room for the rest.
PLANE_ON_CHIP_BYTES = 200_000

_SIZE = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)")


class Size(NamedTuple):
    """A batch of pictures: `batch` pictures of `height` rows and `width` columns."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        picture = f"{self.height}x{self.width}"
        return picture if self.batch == 1 else f"{self.batch}x{picture}"


class Shape(NamedTuple):
    """The (N, C, H, W) shape of a feature map."""

    n: int
    c: int
    h: int
    w: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Read ``"512x512,8x1080x1920"``: comma-separated H x W or N x H x W, repeats dropped.

    Raises:
        ValueError: an item is not of that form, or a number in it is 0.
    """
    sizes = []
    for item in text.split(","):
        found = _SIZE.fullmatch(item.strip())
        if found is None:
            raise ValueError(
                f"{item.strip()!r} is not a size: write HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH, "
                "for example 1080x1920 or 8x512x512, separated by commas"
            )
        size = Size(int(found[1] or 1), int(found[2]), int(found[3]))
        if min(size) == 0:
            raise ValueError(f"{item.strip()!r} is not a size: batch, height and width must be at least 1")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def transformer_net_flop(size: Size, *, width: int = 32, blocks: int = 5, subpixel: bool = True) -> int:
    """Floating-point operations of the sixteen-convolution TransformerNet, a multiply and an add as two.

    Counts the convolutions only: 9x9 3 -> width, 3x3 stride 2 width -> 2 width -> 4 width, `blocks`
    residual blocks of two 3x3 at 4 width, two 3x3 after a nearest x2 upsampling 4 width -> 2 width ->
    width, 9x9 width -> 3. The stride-2 convolutions pad by 1, so they round an odd size up.

    Args:
        size: the batch of input pictures.
        width: channels after the first convolution.
        blocks: residual blocks.
        subpixel: count a 3x3 convolution after a nearest x2 upsampling as the four 2x2 convolutions on
            the small image that it equals (4/9 of the operations), not as written.
    """
    half_h, half_w = (size.height + 1) // 2, (size.width + 1) // 2
    quarter_h, quarter_w = (half_h + 1) // 2, (half_w + 1) // 2
    full, half, quarter = size.height * size.width, half_h * half_w, quarter_h * quarter_w
    upsampled_half, upsampled_full = 4 * quarter, 16 * quarter
    taps = 4 if subpixel else 9
    multiplies = (
        81 * 3 * width * full
        + 9 * width * 2 * width * half
        + 9 * 2 * width * 4 * width * quarter
        + blocks * 2 * 9 * 4 * width * 4 * width * quarter
        + taps * 4 * width * 2 * width * upsampled_half
        + taps * 2 * width * width * upsampled_full
        + 81 * width * 3 * upsampled_full
    )
    return 2 * multiplies * size.batch


def transformer_net_norm_shapes(size: Size, *, width: int = 32) -> tuple[Shape, ...]:
    """Return the distinct shapes that TransformerNet's instance norms see for pictures of `size`."""
    half_h, half_w = (size.height + 1) // 2, (size.width + 1) // 2
    quarter_h, quarter_w = (half_h + 1) // 2, (half_w + 1) // 2
    shapes = (
        Shape(size.batch, width, size.height, size.width),
        Shape(size.batch, 2 * width, half_h, half_w),
        Shape(size.batch, 4 * width, quarter_h, quarter_w),
        Shape(size.batch, 2 * width, 2 * quarter_h, 2 * quarter_w),
        Shape(size.batch, width, 4 * quarter_h, 4 * quarter_w),
    )
    return tuple(dict.fromkeys(shapes))


def instance_norm_bytes(
    shape: Shape, *, element_size: int, channels_last: bool, residual: bool, l2_bytes: int
) -> int:
    """Bytes of device memory that an instance norm of `shape` must move.

    The statistics need every pixel before the first can be scaled. The input is read once where what is
    needed again stays on chip: the whole tensor fits the L2 cache, or the layout is NCHW and one (n, c)
    plane fits the shared memory of one multiprocessor (`PLANE_ON_CHIP_BYTES`). Otherwise it is read
    twice. The output is written once; a residual is read once. Weight, bias and statistics are left out.

    Args:
        shape: the feature map.
        element_size: bytes of one element of input, output and residual.
        channels_last: the layout of all three.
        residual: a residual is added.
        l2_bytes: size of the device's L2 cache; 0 where it is not known.
    """
    plane = shape.h * shape.w * element_size
    tensor = shape.n * shape.c * plane
    read_once = tensor <= l2_bytes or (not channels_last and plane <= PLANE_ON_CHIP_BYTES)
    return tensor * ((1 if read_once else 2) + 1 + (1 if residual else 0))
