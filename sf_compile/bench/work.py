"""What a size asks for: operations, bytes, and the feature maps that an instance norm sees.

Only arithmetic: nothing here imports PyTorch or touches a GPU. A floor is a count from this file
divided by a rate that :mod:`sf_compile.bench.ceilings` measured in the same run.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

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


class Layer(NamedTuple):
    """One convolution of TransformerNet, with what is fused on its way in and out.

    Attributes:
        name: what it is called in rows; layers of one name differ in nothing.
        input: its input before upsampling and padding.
        out_channels: channels of its output.
        kernel: rows and columns of its kernel; it pads by half of that.
        stride: 1 or 2.
        upsample: 1, or 2 for a nearest x2 upsampling first.
        norm: its input is raw, and normalised on the way in.
        relu: a ReLU follows that norm.
        residual: a tensor of the input's shape is added after both.
        keep: the finished input is written too, for the next addition.
        statistics: the output is raw: its mean and variance are taken, and it has no bias.
    """

    name: str
    input: Shape
    out_channels: int
    kernel: int
    stride: int = 1
    upsample: int = 1
    norm: bool = True
    relu: bool = True
    residual: bool = False
    keep: bool = False
    statistics: bool = True

    @property
    def padded(self) -> Shape:
        """The input of the bare convolution: upsampled and padded."""
        n, c, h, w = self.input
        border = 2 * (self.kernel // 2)
        return Shape(n, c, self.upsample * h + border, self.upsample * w + border)

    @property
    def output(self) -> Shape:
        """The output."""
        n, _, h, w = self.padded
        return Shape(
            n, self.out_channels, (h - self.kernel) // self.stride + 1, (w - self.kernel) // self.stride + 1
        )

    def flop(self, *, subpixel: bool) -> int:
        """Floating-point operations of the convolution, a multiply and an add as two.

        `subpixel` counts a 3x3 convolution after a nearest x2 upsampling as the four 2x2 convolutions on
        the small image that it equals (4/9 of the operations), not as written.
        """
        taps = 4 if subpixel and self.upsample == 2 else self.kernel**2
        return 2 * taps * self.input.c * math.prod(self.output)

    def fused_bytes(self, element_size: int) -> int:
        """Bytes that the fused layer must move: operands and results once each; vectors are left out."""
        pictures = 1 + int(self.residual) + int(self.keep)
        return element_size * (pictures * math.prod(self.input) + math.prod(self.output) + self._weights)

    def bare_bytes(self, element_size: int) -> int:
        """Bytes that the convolution of an upsampled and padded input must move."""
        return element_size * (math.prod(self.padded) + math.prod(self.output) + self._weights)

    @property
    def _weights(self) -> int:
        return self.out_channels * self.input.c * self.kernel**2


def transformer_net_layers(size: Size, *, width: int = 32, blocks: int = 5) -> tuple[Layer, ...]:
    """Return the convolutions of TransformerNet in the order in which they run on pictures of `size`.

    9x9 3 -> width, 3x3 stride 2 width -> 2 width -> 4 width, `blocks` residual blocks of two 3x3 at 4 width,
    two 3x3 after a nearest x2 upsampling 4 width -> 2 width -> width, 9x9 width -> 3. A stride of 2 rounds an
    odd size up. What a layer applies on the way in is what the layer before it left to do.
    """
    layers = [Layer("first", Shape(size.batch, 3, size.height, size.width), width, 9, norm=False, relu=False)]

    def then(name: str, out_channels: int, kernel: int = 3, **rest: Any) -> None:
        layers.append(Layer(name, layers[-1].output, out_channels, kernel, **rest))

    then("down1", 2 * width, stride=2)
    then("down2", 4 * width, stride=2)
    for block in range(blocks):
        if block == 0:
            then("residual+keep", 4 * width, keep=True)
        else:
            then("residual+add+keep", 4 * width, relu=False, residual=True, keep=True)
        then("residual", 4 * width)
    if blocks:
        then("up1+add", 2 * width, upsample=2, relu=False, residual=True)
    else:
        then("up1", 2 * width, upsample=2)
    then("up2", width, upsample=2)
    then("last", 3, 9, statistics=False)
    return tuple(layers)


def transformer_net_flop(size: Size, *, width: int = 32, blocks: int = 5, subpixel: bool = True) -> int:
    """Floating-point operations of TransformerNet's convolutions; `subpixel` as in :meth:`Layer.flop`."""
    layers = transformer_net_layers(size, width=width, blocks=blocks)
    return sum(layer.flop(subpixel=subpixel) for layer in layers)


def transformer_net_norm_shapes(size: Size, *, width: int = 32) -> tuple[Shape, ...]:
    """Return the distinct shapes that TransformerNet's instance norms see for pictures of `size`."""
    layers = transformer_net_layers(size, width=width)
    return tuple(dict.fromkeys(layer.output for layer in layers if layer.statistics))


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
