// The geometry of csrc/residual_trunk.cu: a block's tile of pixels with its halo in shared memory, and which pixels
// neighbouring blocks need of each other.
#pragma once
#include "operand_chunk.cuh"

#define TILE_H 8
#define TILE_W 16
#define PLANE_H (TILE_H + 2)  // with the halo
#define PLANE_W (TILE_W + 2)
#define CELLS (PLANE_H * PLANE_W)
#define HALO_CELLS (CELLS - TILE_H * TILE_W)
#define GROUPS (CHANNELS / 64)  // warpgroups that multiply, for 64 output channels each
#define CONSUMERS (GROUPS * 128)
#define CHUNKS (CHANNELS / CHUNK_CHANNELS)  // 16-byte chunks of a pixel
#define THREAD_CELLS ((HALO_CELLS * CHUNKS + CONSUMERS - 1) / CONSUMERS)  // chunks of the halo, of a thread

// A tile is planes of 64 bytes of channels, [column][row][channel], swizzled in 64 bytes: any 8 rows of a column can be
// a group of an operand's 8 columns, so that a tap is a start address.
#define PIXEL_BYTES 64
#define PLANE_BYTES ((CELLS * PIXEL_BYTES + 511) / 512 * 512)  // a whole number of swizzle patterns
#define TILE_BYTES (CHUNKS / 4 * PLANE_BYTES)

// What a step (plane, 32 bytes of its channels, tap) has of the weights, and how they are streamed.
#define STEP_BYTES (CHANNELS * 32)
#define STEPS (9 * CHUNKS / 2)
#define STAGE_STEPS 4
#define STAGE_BYTES (STAGE_STEPS * STEP_BYTES)
#define LAYER_STAGES (STEPS / STAGE_STEPS)
// The body of a loop: of float32 two planes, for a layer has twice as many stages as in 16 bits, and in one piece they
// would make the kernel's instructions a sixth more.
#define PART_STAGES (DTYPE == 0 ? 9 : LAYER_STAGES)

// Offsets in shared memory. In 16 bits z has a tile of its own. In float32 the tile has what is multiplied, of z and of
// what is between a block's convolutions in turn, and z lies in registers, and its halo in chunks of threads' own.
#define BETWEEN (DTYPE == 0 ? 0 : TILE_BYTES)
#define Z_HALO TILE_BYTES
#define RING (DTYPE == 0 ? Z_HALO + THREAD_CELLS * CONSUMERS * 16 : 2 * TILE_BYTES)
#define AFFINES (RING + STAGES * STAGE_BYTES)
#define DUMP (AFFINES + CHANNELS * 8)                    // for what lies outside the picture
#define BARRIERS (DUMP + 512)

#define MOST_LAYERS 20
struct Layer {
  const unsigned char* weights;
  const parameter *norm_weight, *norm_bias;  // of the norm after it; null for the last layer's, which is not applied
};
struct Layers {
  Layer at[MOST_LAYERS];
  u64 unused[4];
};

// Inside [0, size), for coordinates one pixel outside at most.
DEVICE int reflected(int at, int size) { return at < 0 ? -at : at >= size ? 2 * size - 2 - at : at; }

// Where a tile in shared memory has a chunk of a cell.
DEVICE u32 offset_in_tile(int row, int column, int chunk) {
  const int pixel = column * PLANE_H + row;
  return chunk / 4 * PLANE_BYTES + pixel * PIXEL_BYTES + ((chunk % 4 ^ (pixel >> 1 & 3)) << 4);
}

// The pixels of one block, a `rows` x `columns` part of the picture.
struct Tile {
  int y, x, rows, columns, height, width;

  DEVICE Tile(int tile, int tiles_x, int height, int width) : height(height), width(width) {
    y = tile / tiles_x * TILE_H, x = tile % tiles_x * TILE_W;
    rows = min(TILE_H, height - y), columns = min(TILE_W, width - x);
  }
  DEVICE bool has(int row, int column) const { return row < rows && column < columns; }
  // Where a picture has a chunk of the cell (0, 0 is the halo's first); -1 for one that no product of a pixel needs.
  DEVICE int offset_in_picture(int row, int column, int chunk) const {
    if (row > rows + 1 || column > columns + 1) return -1;
    const int pixel = reflected(y - 1 + row, height) * width + reflected(x - 1 + column, width);
    return pixel * CHANNELS + chunk * CHUNK_CHANNELS;
  }
  // A bit for every row that a halo has a pixel of: a neighbour's the first and the last, or at the picture's border
  // this block's own, mirrored, the second and the last but one.
  DEVICE u32 needed_rows() const { return needed(y, rows, height); }
  DEVICE u32 needed_columns() const { return needed(x, columns, width); }
  DEVICE static u32 needed(int begin, int count, int size) {
    const u32 mirrored = (begin == 0 ? 2u : 0u) | (begin + count == size && count > 1 ? 1u << (count - 2) : 0u);
    return 1u | 1u << (count - 1) | mirrored;
  }
};

// Cell number `i` of the halo of a tile with so many rows and columns, in the order above, below, left, right.
DEVICE void halo_cell(int i, int rows, int columns, int& row, int& column) {
  if (i < 2 * PLANE_W) {
    row = i < PLANE_W ? 0 : rows + 1, column = i % PLANE_W;
  } else {
    i -= 2 * PLANE_W;
    // Rows below those of the tile have no such cell: they lie outside what offset_in_picture admits.
    row = i % TILE_H + 1 > rows ? PLANE_H : i % TILE_H + 1, column = i < TILE_H ? 0 : columns + 1;
  }
}

// A chunk of a pixel: normalised, then activated or added to `more`; `operand` is what is multiplied of it.
#if DTYPE == 0
template <bool kRelu, bool kResidual>
DEVICE uint4 finished(uint4 v, const Affine (&affine)[CHUNK_CHANNELS], uint4 more) {
  auto apply = [&](u32 word, int i, u32 add) {
    const float y = affine[i](__uint_as_float(word)) + (kResidual ? __uint_as_float(add) : 0.f);
    return __float_as_uint(kRelu ? clamp_below(y, 0.f) : y);
  };
  return make_uint4(apply(v.x, 0, more.x), apply(v.y, 1, more.y), apply(v.z, 2, more.z), apply(v.w, 3, more.w));
}
DEVICE uint4 operand(uint4 v) {
  auto round = [](u32 word) { return round_to_tf32(__uint_as_float(word)); };
  return make_uint4(round(v.x), round(v.y), round(v.z), round(v.w));
}
#else
// Two channels of a pixel, or one of two.
template <bool kRelu, bool kResidual>
DEVICE u32 finished(u32 pair, const Affine& first, const Affine& second, u32 more) {
  const float a = first(low(pair)), b = second(high(pair));
  if (kResidual) return pack<DTYPE>(a + low(more), b + high(more));
  return kRelu ? rounded_relu(a, b) : pack<DTYPE>(a, b);
}
template <bool kRelu, bool kResidual>
DEVICE uint4 finished(uint4 v, const Affine (&affine)[CHUNK_CHANNELS], uint4 more) {
  return make_uint4(finished<kRelu, kResidual>(v.x, affine[0], affine[1], more.x),
                    finished<kRelu, kResidual>(v.y, affine[2], affine[3], more.y),
                    finished<kRelu, kResidual>(v.z, affine[4], affine[5], more.z),
                    finished<kRelu, kResidual>(v.w, affine[6], affine[7], more.w));
}
DEVICE uint4 operand(uint4 v) { return v; }
#endif
DEVICE void load_affines(u32 from, Affine (&affine)[CHUNK_CHANNELS]) {
#pragma unroll
  for (int i = 0; i < CHUNK_CHANNELS / 2; i++) {
    const uint4 two = load_shared(from + i * 16);
    affine[2 * i] = {__uint_as_float(two.x), __uint_as_float(two.y)};
    affine[2 * i + 1] = {__uint_as_float(two.z), __uint_as_float(two.w)};
  }
}
