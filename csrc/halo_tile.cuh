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

#define ELEMENT_BYTES (DTYPE == 0 ? 4 : 2)
#define OPERAND_BYTES (QUANTIZED ? 1 : ELEMENT_BYTES)
#define PIXEL_BYTES (SLOT_CHANNELS * OPERAND_BYTES)  // of a slot: 32 or 64
#define CHUNKS (PIXEL_BYTES / 16)
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
#define SWIZZLE (PIXEL_BYTES == 64 ? SWIZZLE_64 : SWIZZLE_32)

#define PRODUCTS (TAPS * PIXEL_BYTES / 32)    // of one slot
#define EARLY (PRODUCTS < 3 ? PRODUCTS : 3)   // after so many the slot before is known to have been read
#define UNITS ((PLANE_PIXELS * CHUNKS + 127) / 128)
#define BATCH 6  // chunks that a thread has in registers at once

// Whole tiles leave through shared memory, for full lines of memory: ROUND columns of 8 pixels at a time, in two
// buffers a warpgroup, for each phase that the row block has as [pixel][channel], swizzled by the size of a pixel. What
// a pixel has beyond 128 bytes is a block of its own.
#define ROUND (DTYPE == 0 ? 2 : 4)
#define PHASE_CHANNELS (PHASE_ROWS < 64 ? PHASE_ROWS : 64)
#define STORED_CHANNELS (PHASE_CHANNELS * ELEMENT_BYTES > 128 ? 128 / ELEMENT_BYTES : PHASE_CHANNELS)
#define STORED_BYTES (STORED_CHANNELS * ELEMENT_BYTES)
#define STORES (64 / STORED_CHANNELS)
#define BLOCK_PHASES (64 / PHASE_CHANNELS)
#define STAGE_BYTES (ROUND * TILE_H * 64 * ELEMENT_BYTES)

// Where the stage of a block of channels has a chunk of a pixel.
DEVICE u32 address_in_stage(int pixel, int chunk) {
  const int swizzle = STORED_BYTES == 128 ? pixel & 7 : STORED_BYTES == 64 ? pixel >> 1 & 3 : pixel >> 2 & 1;
  return pixel * STORED_BYTES + ((chunk ^ swizzle) << 4);
}

// A lane's results of columns `g` and `g + 1` of pixels into a block of the stage, in which the warp's 16 channels
// begin with chunk `chunk`: of two pixels of channel lane / 4, then of the channel 8 above it, then of the next column.
DEVICE void stage_pairs(u32 stage, const Pair (&pairs)[4], int g, int chunk, int lane) {
#if DTYPE == 0
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int pixel = (g + k / 2) * 8 + 2 * (lane & 3);
    const int at = chunk + k % 2 * 2 + (lane >> 4), word = (lane >> 2 & 3) * 4;
    store_shared_word(stage + address_in_stage(pixel, at) + word, __float_as_uint(low(pairs[k])));
    store_shared_word(stage + address_in_stage(pixel + 1, at) + word, __float_as_uint(high(pairs[k])));
  }
#else
  // A lane's address is of a row of four 8x8 matrices: channels 0 to 7 and 8 to 15 of either column.
  const int matrix = lane >> 3, pixel = (g + (matrix >> 1)) * 8 + (lane & 7);
  store_transposed(stage + address_in_stage(pixel, chunk + (matrix & 1)), pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
}

// The physical chunk of a pixel's logical one: the swizzle of the tensor map and the operand descriptor.
DEVICE int swizzled(int pixel, int chunk) {
  return chunk ^ (PIXEL_BYTES == 64 ? (pixel >> 1) & 3 : (pixel >> 2) & 1);
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
