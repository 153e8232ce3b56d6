"""How csrc/mma_conv.cu is cut for a convolution: its tile, its share of the channels, its shared memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

_TILE_W = 16
_TILES_N = (1, 2, 3, 4, 6, 8)
_RESERVED_BYTES = 1024  # of shared memory, by the system for each block (CUDA C++ Programming Guide)
_REGISTERS = 65536  # of a multiprocessor

# What the model of `Tiling.clocks` counts: clocks of a multiprocessor. Only their proportions matter.
_PRODUCTS = 1024  # multiplications of 16-bit numbers in a clock, or half as many in TF32
_SHARED_BYTES = 128  # that are read from shared memory in a clock
_L2_BYTES = 16  # that arrive from the L2 cache in a clock
_UNIT_CLOCKS = {2: 2.4, 4: 1.8, 8: 1.6, 16: 1.4}  # to finish 16 bytes of a pixel, by bytes of a load
_OUT_CLOCKS = 10.0  # to write 16 pixels of 8 channels
_TILE_CLOCKS = 1200  # of a tile by itself: its index map, and waiting
_BARRIER_CLOCKS = 450  # of a stage: its barrier, and what then waits for shared memory


class Layer(NamedTuple):
    """What a convolution is, as far as its cutting depends on it; ``size`` is an element's, in bytes."""

    size: int
    channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_y: int
    stride_x: int
    vector: int
    transform: bool
    residual: bool
    statistics: bool
    out_planar: bool
    subpixel: bool = False


class Tiling(NamedTuple):
    """The constants of the source that say how it is cut; see there.

    ``stages`` is 0 where all weights stay in shared memory. ``blocks`` are resident on a multiprocessor.
    """

    chunk_bytes: int
    rows: int
    warps_m: int
    warps_n: int
    tiles_n: int
    columns: int
    stages: int
    blocks: int = 1

    @property
    def group_tiles(self) -> int:
        """Products side by side whose results leave at once, GROUP_TILES of the source."""
        return self.tiles_n if self.tiles_n <= 4 else 3 if self.tiles_n % 4 else 4

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the output that a block works on."""
        return self.rows * self.warps_m, _TILE_W

    @property
    def block_channels(self) -> int:
        """Output channels that a block works on."""
        return 8 * self.warps_n * self.tiles_n

    def channel_blocks(self, layer: Layer) -> int:
        """Blocks side by side, for all output channels."""
        return -(-layer.out_channels // self.block_channels)

    def chunks(self, layer: Layer) -> int:
        """Chunks of input channels."""
        return -(-layer.channels * layer.size // self.chunk_bytes)

    @property
    def depths(self) -> int:
        """Products for one tap of a chunk."""
        return max(1, self.chunk_bytes // 32)

    @property
    def step_taps(self) -> int:
        """Taps of a row that one product takes."""
        return max(1, 32 // self.chunk_bytes)

    def x_steps(self, layer: Layer) -> int:
        """Products for a row of taps."""
        return -(-layer.kernel_w // self.step_taps)

    def steps(self, layer: Layer) -> int:
        """Stages of weights that a tile takes."""
        return self.chunks(layer) * self.x_steps(layer) // self.columns

    def halo_pixels(self, layer: Layer) -> int:
        """Pixels of a tile's input in shared memory."""
        taps_x = self.x_steps(layer) * self.step_taps
        height = self.tile[0] + (layer.kernel_h - 1) // layer.stride_y
        width = _TILE_W + (taps_x - 1) // layer.stride_x
        return min(layer.stride_y, layer.kernel_h) * height * min(layer.stride_x, taps_x) * width

    def stage_bytes(self, layer: Layer) -> int:
        """Bytes of a stage of weights."""
        return self.columns * self.depths * layer.kernel_h * self.block_channels * 32

    def weight_bytes(self, layer: Layer) -> int:
        """Bytes of the weights that a block holds at once."""
        return (self.stages or self.steps(layer)) * self.stage_bytes(layer)

    def shared_bytes(self, layer: Layer) -> int:
        """Dynamic shared memory of a block, as csrc/mma_tile.cuh lays it out."""
        pixels = self.halo_pixels(layer)
        pitch = self.chunk_bytes + (0 if self.chunk_bytes < 32 else 16)
        affines = 8 * self.chunks(layer) * self.chunk_bytes // layer.size if layer.transform else 0
        by_pixel = 256 * (self.group_tiles * layer.size // 2 | 1)
        staged = self.group_tiles * 8 * (16 * layer.size + 16) if layer.out_planar else by_pixel
        sums = 16 * self.threads * self.tiles_n // self.group_tiles if layer.statistics else 0
        twice = -(-pixels * pitch // 16) * 16 + -(-pixels * 4 // 16) * 16 + affines
        return self.weight_bytes(layer) + 2 * twice + 4 * 32 + sums + self.threads // 32 * staged

    def registers(self, layer: Layer) -> int:
        """Registers with which a thread spills none: its sums, and the pixels that it has on their way."""
        slim = layer.vector * layer.size > 2 and not layer.residual
        sums = 4 * self.rows * self.tiles_n
        if sums <= 32:
            return 96 if slim else 128
        if sums > 64:
            return 256
        steps = self.threads * self.x_steps(layer)
        few = self.halo_pixels(layer) * max(1, self.chunk_bytes // 16) <= steps  # one unit a step
        return 128 if sums <= 48 or (slim and few and self.tiles_n <= 4 and layer.kernel_h <= 5) else 168

    def clocks(self, layer: Layer) -> float:
        """About what a tile costs a multiprocessor that has other blocks to turn to."""
        pixels = self.tile[0] * _TILE_W
        taps = layer.kernel_h * self.x_steps(layer) * self.depths * self.chunks(layer)
        products = pixels * self.block_channels * 16 * taps / _PRODUCTS  # a depth of 32 bytes each
        planes = min(layer.stride_y, layer.kernel_h)
        row_loads = (self.rows * planes + layer.kernel_h - planes) / layer.kernel_h
        loads = self.threads // 32 * taps * (512 * row_loads + 256 * self.tiles_n) / _SHARED_BYTES
        units = self.halo_pixels(layer) * self.chunks(layer) * self.chunk_bytes / 16
        weights = 0.0 if self.stages == 0 else self.steps(layer) * self.stage_bytes(layer) / _L2_BYTES
        barriers = self.steps(layer) if self.stages else self.chunks(layer)
        beside = units * _UNIT_CLOCKS[layer.vector * layer.size]
        beside += pixels * self.block_channels / 128 * _OUT_CLOCKS
        waits = (_TILE_CLOCKS + barriers * _BARRIER_CLOCKS) / self.blocks
        # Products wait for what is loaded for them, now and then.
        return max(products + loads / 2, weights) + beside + waits


def _candidates(layer: Layer) -> Iterator[Tiling]:
    """Every way to cut ``layer``, with one block resident."""
    pixel = layer.channels * layer.size
    chunks = (8,) if pixel <= 8 else (16,) if pixel <= 16 else (32,) if pixel <= 32 else (32, 64)
    # Tiles of fewer rows are for small pictures, and for kernels and strides that leave no room for more.
    heights = ((4, 4), (2, 4), (1, 4), (1, 2), (1, 1))
    for chunk_bytes, (rows, warps_m), warps_n, tiles_n in product(chunks, heights, (1, 2), _TILES_N):
        if warps_n == 2 and tiles_n < 3:
            continue  # as many channels as one warp takes
        whole = Tiling(chunk_bytes, rows, warps_m, warps_n, tiles_n, 1, 0)
        if layer.subpixel and layer.out_channels // 4 % (8 * whole.group_tiles):
            continue  # results that leave together are of one parity
        steps = whole.x_steps(layer)
        yield whole._replace(columns=steps)
        if whole.chunks(layer) * steps > 1:
            yield whole._replace(stages=3)
            if steps > 1 and whole.chunks(layer) > 1:
                yield whole._replace(columns=steps, stages=2)


@functools.lru_cache(maxsize=4096)
def fastest(
    layer: Layer, shared: int, multiprocessors: int, output: tuple[int, int, int]
) -> Tiling | None:  # fmt: skip
    """The cut that should take the least time, or None where a block would need more than ``shared`` bytes.

    ``shared`` is what a block may have; a multiprocessor has 1 KB more, for all its blocks. ``output`` is
    (N, rows, columns) of windows.
    """
    best, least = None, float("inf")
    n, height, width = output
    for tiling in _candidates(layer):
        needed = tiling.shared_bytes(layer)
        if needed > shared:
            continue
        room = (shared + _RESERVED_BYTES) // (needed + _RESERVED_BYTES)
        # Each of a multiprocessor's four schedulers has a quarter of the registers, for whole warps.
        warps = _REGISTERS // 4 // (32 * tiling.registers(layer)) * 4
        rows = tiling.tile[0]
        tiles = n * -(-height // rows) * -(-width // _TILE_W) * tiling.channel_blocks(layer)
        # Blocks that a multiprocessor never has at once would take registers from those that it has.
        blocks = min(room, warps * 32 // tiling.threads, -(-tiles // multiprocessors))
        tiling = tiling._replace(blocks=blocks)
        rounds = -(-tiles // (multiprocessors * blocks))
        # Latencies are hidden by other warps, and by other products of a warp.
        alone = 1 + (4 + 16 / (tiling.rows * tiling.tiles_n)) / (blocks * tiling.threads / 32)
        time = rounds * blocks * tiling.clocks(layer) * alone
        if time < least:
            best, least = tiling, time
    return best
