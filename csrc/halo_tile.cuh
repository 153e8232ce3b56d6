// The geometry of csrc/halo_conv.cu, from its compile-time constants: tiles of the output, the taps of the convolution
// as it is computed, slots of input in shared memory, and where a finished tile waits for its way out.
#pragma once
#include "hopper.cuh"

#define TILE_W 32
#define TILE_H 8
#define TAPS_X (SUBPIXEL ? 2 : KERNEL_W)
#define TAPS_Y (SUBPIXEL ? 2 : KERNEL_H)
#define TAPS (TAPS_X * TAPS_Y)
#define PHASES (SUBPIXEL ? 4 : 1)
#define PHASE_ROWS \
  (OUT_CHANNELS <= 16 && SUBPIXEL ? 16 : OUT_CHANNELS <= 32 && SUBPIXEL ? 32 : (OUT_CHANNELS + 63) / 64 * 64)
#define ROW_BLOCKS (PHASES * PHASE_ROWS / 64)
#define SHARED_X (PHASE_ROWS < 64)  // both q in one row block
#define SHARED_Y (PHASE_ROWS < 32)
#define ZOOM (SUBPIXEL ? 2 : 1)

#define PIXEL_BYTES (SLOT_CHANNELS * 2)
#define CHUNKS (SLOT_CHANNELS / 8)  // 16-byte chunks of a pixel
#define PLANE_W (TILE_W + (TAPS_X - 1) / STRIDE)
#define PLANE_H (TILE_H + (TAPS_Y - 1) / STRIDE)
#define PLANE_PIXELS (PLANE_W * PLANE_H)
#define PLANE_BYTES ((PLANE_PIXELS * PIXEL_BYTES + 511) / 512 * 512)  // a whole number of swizzle patterns
#define PLANES (STRIDE * STRIDE)
#define HALO_W ((TILE_W - 1) * STRIDE + TAPS_X)
#define HALO_H ((TILE_H - 1) * STRIDE + TAPS_Y)
#define DEPTH ((CHANNELS + SLOT_CHANNELS - 1) / SLOT_CHANNELS)  // slots of a tile
#define WEIGHT_BYTES (TAPS * 64 * PIXEL_BYTES)                  // of one slot's channels and one row block
#define PICTURE_BYTES (PLANES * PLANE_BYTES)
#define SLOT_BYTES (PICTURE_BYTES + (STREAMED ? WEIGHT_BYTES : 0))
#define SWIZZLE (SLOT_CHANNELS == 32 ? SWIZZLE_64 : SWIZZLE_32)

#define PRODUCTS (TAPS * SLOT_CHANNELS / 16)  // of one slot
#define EARLY (PRODUCTS < 3 ? PRODUCTS : 3)   // after so many the slot before is known to have been read
#define UNITS ((PLANE_PIXELS * CHUNKS + 127) / 128)
#define BATCH 6  // chunks that a thread has in registers at once

// Whole tiles leave through shared memory, for full lines of memory: ROUND columns of 8 pixels at a time, in two
// buffers a warpgroup, for each phase that the row block has as [pixel][channel], swizzled by the size of a pixel.
#define ROUND 4
#define PHASE_CHANNELS (PHASE_ROWS < 64 ? PHASE_ROWS : 64)
#define BLOCK_PHASES (64 / PHASE_CHANNELS)
#define STAGE_BYTES (ROUND * TILE_H * 128)

// The physical chunk of a pixel's logical one: the swizzle of the tensor map and the operand descriptor.
DEVICE int swizzled(int pixel, int chunk) {
  return chunk ^ (SLOT_CHANNELS == 32 ? (pixel >> 1) & 3 : (pixel >> 2) & 1);
}

// Where a slot has a chunk of the pixel `y` rows and `x` columns into the tile's halo.
DEVICE int address_in_slot(int y, int x, int chunk) {
  const int pixel = x / STRIDE * PLANE_H + y / STRIDE;
  return (y % STRIDE * STRIDE + x % STRIDE) * PLANE_BYTES + pixel * PIXEL_BYTES + swizzled(pixel, chunk) * 16;
}

struct Tile {
  int image, y, x;
};

// Of the output, or of its pixels of each parity (p, q) as a picture of their own.
struct OutMaps {
  TensorMap phase[PHASES];
};

// n / d for n < 2^21, from 2^42 / d rounded up: no division stands in front of a slot.
DEVICE int quotient(int n, u64 reciprocal) { return (int)((u64)n * reciprocal >> 42); }

// What coordinate `at` outside [0, size) is a copy of; for zeros itself.
DEVICE int mirrored(int at, int size) {
  if (PAD == 2) return at < 0 ? -at : at >= size ? 2 * size - 2 - at : at;
  if (PAD == 3) return min(max(at, 0), size - 1);
  return at;
}
