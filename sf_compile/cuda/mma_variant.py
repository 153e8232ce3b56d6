"""What csrc/mma_conv.cu is compiled for, and the weights that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda.mma_tiling import Layer, Tiling, fastest
from sf_compile.subpixel import subpixel_weights

SOURCE = "mma_conv.cu"
SHARED_BYTES = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90a": 232_448, "sm_120": 101_376,
}  # fmt: skip
"""Shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications")."""


class Variant(NamedTuple):
    """The compile-time constants of one kernel, but for how it is cut.

    With ``subpixel`` the kernel and ``out_channels`` are those of ``subpixel_weights``: 2x2, and four times
    the layer's own.
    """

    dtype: int
    parameter: int
    channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_y: int
    stride_x: int
    upsample: int
    pad: int
    vector: int
    planar: bool
    out_planar: bool
    out_vector: int
    relu: bool
    residual: bool
    keep: bool
    transform: bool
    statistics: bool
    bias: bool
    output_relu: bool
    subpixel: bool = False

    @property
    def layer(self) -> Layer:
        """What its cutting depends on."""
        return Layer(
            2 if self.dtype else 4, self.channels, self.out_channels, self.kernel_h, self.kernel_w,
            self.stride_y, self.stride_x, self.vector, self.transform, self.residual, self.statistics,
            self.out_planar, self.subpixel,
        )  # fmt: skip

    def constants(self, tiling: Tiling) -> dict[str, int]:
        """By the names that the kernel source uses."""
        fields = {**self._asdict(), **tiling._asdict()}
        return {name.upper(): int(value) for name, value in fields.items()}


def variants(arch: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) of layers that stand for the many that may be asked for, cut for ``arch``."""
    plain = Variant(
        1, 1, 128, 128, 3, 3, 1, 1, 1, 2, 8, False, False, 8, relu=True, residual=False, keep=False,
        transform=True, statistics=True, bias=False, output_relu=False,
    )  # fmt: skip
    change = plain._replace
    bare = change(relu=False, transform=False, statistics=False, bias=True, output_relu=True)
    planar = change(vector=1, planar=True, out_planar=True, out_vector=1)
    enlarging = change(kernel_h=2, kernel_w=2, pad=3, subpixel=True)
    kinds = (
        (plain, (270, 480)),
        (plain, (32, 32)),
        (change(dtype=2, parameter=2), (270, 480)),
        (change(relu=False, residual=True, keep=True), (270, 480)),
        (change(channels=32, out_channels=64, stride_y=2, stride_x=2), (540, 960)),
        (enlarging._replace(channels=64, out_channels=4 * 32), (541, 961)),
        (change(channels=64, out_channels=20, upsample=2, out_vector=4), (540, 960)),
        (
            bare._replace(channels=3, out_channels=32, kernel_h=9, kernel_w=9, vector=1, planar=True),
            (540, 960),
        ),
        (bare._replace(dtype=2, channels=4, out_channels=16, kernel_h=7, kernel_w=7, vector=4), (540, 960)),
        (bare._replace(channels=32, out_channels=3, kernel_h=9, kernel_w=9, out_planar=True), (540, 960)),
        (bare._replace(channels=512, out_channels=256, pad=1), (64, 64)),
        (change(channels=20, out_channels=20, vector=4, out_vector=4, keep=True), (540, 960)),
        (change(channels=24, out_channels=40, kernel_h=5, kernel_w=5), (540, 960)),
        (change(channels=48, out_channels=48, stride_y=3, stride_x=3, upsample=3), (180, 320)),
        (change(channels=16, out_channels=16, kernel_h=11, kernel_w=11, parameter=0), (540, 960)),
        (change(channels=130, out_channels=70, kernel_h=1, kernel_w=1, vector=2, out_vector=2), (540, 960)),
        (change(channels=33, out_channels=5, kernel_w=2, stride_x=2, vector=1, out_vector=1), (540, 960)),
        (change(channels=8, out_channels=130, kernel_h=2, kernel_w=6, out_vector=2), (135, 240)),
        (planar._replace(dtype=2, parameter=0, channels=12, keep=True, residual=True, pad=1), (37, 53)),
    )
    wide = change(dtype=0, parameter=0, vector=4, out_vector=4)
    larger = enlarging._replace(dtype=0, parameter=0, vector=4, out_vector=4)
    bare = bare._replace(dtype=0, parameter=0, kernel_h=9, kernel_w=9, out_vector=4)
    in_tf32 = (
        (wide, (270, 480)),
        (wide, (32, 32)),
        (wide._replace(relu=False, residual=True, keep=True), (270, 480)),
        (wide._replace(channels=32, out_channels=64, stride_y=2, stride_x=2), (540, 960)),
        (wide._replace(channels=64, stride_y=2, stride_x=2), (270, 480)),
        (larger._replace(out_channels=4 * 64, relu=False, residual=True), (271, 481)),
        (larger._replace(channels=64, out_channels=4 * 32), (541, 961)),
        (bare._replace(channels=3, out_channels=32, vector=1, planar=True), (1080, 1920)),
        (bare._replace(channels=32, out_channels=3, vector=4, out_planar=True), (1080, 1920)),
        (wide._replace(channels=18, out_channels=20, vector=2, out_vector=2, keep=True), (540, 960)),
        (planar._replace(dtype=0, parameter=0, channels=2, keep=True, residual=True, pad=1), (37, 53)),
    )
    for variant, size in (*kinds, *in_tf32):
        tiling = fastest(variant.layer, SHARED_BYTES[arch], 108, (1, *size))
        assert tiling is not None
        yield SOURCE, variant.constants(tiling)


def pack(tiling: Tiling, size: int, subpixel: bool, weight: Tensor) -> Tensor:
    """Weights (O, C, kh, kw) in the order of the right operand's registers (csrc/mma.cuh).

    As (block of channels, chunk, step along a row of taps, product of the chunk, row of taps, warp, products,
    lane, products of one load, half of the depth, elements of a word), where a load takes the products of two
    where a warp has an even number of them. ``size`` is what an element has in bytes; float32 is rounded to
    TF32. With ``subpixel`` the O of a 2x2 kernel are those of the four parities, one after another.
    """
    if subpixel:
        weight = subpixel_weights(weight).flatten(0, 1)
    o, c, kh, kw = weight.shape
    weight = tf32.rounded(weight)
    chunk, taps, word = tiling.chunk_bytes // size, tiling.step_taps, 4 // size
    block, chunks, steps = tiling.block_channels, -(-c // chunk), -(-kw // taps)
    whole = weight.new_zeros((-(-o // block) * block, chunks * chunk, kh, steps * taps))
    whole[:o, :c, :, :kw] = weight
    # A product's depth: channels of one tap, or the taps of a step and their channels.
    depth = whole.view(-1, chunks, tiling.depths, chunk // tiling.depths, kh, steps, taps)
    depth = depth.permute(0, 1, 2, 4, 5, 6, 3)
    together = 1 if tiling.tiles_n % 2 else 2
    fragments = depth.reshape(
        -1, tiling.warps_n, tiling.tiles_n // together, together, 8,
        chunks, tiling.depths, kh, steps, 2, 4, word,
    )  # fmt: skip
    return fragments.permute(0, 5, 8, 6, 7, 1, 2, 4, 10, 3, 9, 11).contiguous()
