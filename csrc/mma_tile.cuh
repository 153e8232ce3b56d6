// The geometry of csrc/mma_conv.cu, from its compile-time constants, and the way of a tile's input into shared memory.
#pragma once
#include "mma.cuh"
#include "mma_statistics.cuh"
#include "norm.cuh"
#include "source.cuh"

#define THREADS (32 * WARPS_M * WARPS_N)
#define TILE_W 16
#define TILE_H (ROWS * WARPS_M)
#define BLOCK_CHANNELS (WARPS_N * TILES_N * 8)  // output channels of a block
#define CHANNEL_BLOCKS ((OUT_CHANNELS + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS)
#define CHUNKS ((CHANNELS + CHUNK - 1) / CHUNK)
#define DEPTHS (CHUNK < 16 ? 1 : CHUNK / 16)             // products for one tap of a chunk
#define STEP_TAPS (CHUNK < 16 ? 16 / CHUNK : 1)          // taps of a row that one product takes
#define X_STEPS ((KERNEL_W + STEP_TAPS - 1) / STEP_TAPS)  // products for a row of taps
#define TAPS_X (X_STEPS * STEP_TAPS)

// The tile's input with its halo. Rows and columns lie in planes, those of a plane a stride apart in the picture: the
// pixels that a tap needs are then neighbours whatever the stride, and no row is kept that no tap needs.
#define PLANES_Y (STRIDE_Y < KERNEL_H ? STRIDE_Y : KERNEL_H)
#define PLANES_X (STRIDE_X < TAPS_X ? STRIDE_X : TAPS_X)
#define PLANE_H (TILE_H + (KERNEL_H - 1) / STRIDE_Y)
#define PLANE_W (TILE_W + (TAPS_X - 1) / STRIDE_X)
#define HALO_W (PLANES_X * PLANE_W)
#define PIXELS (PLANES_Y * PLANE_H * HALO_W)
// An odd number of 16-byte units from a pixel to the next: eight in a row meet no bank twice.
#define PITCH (CHUNK < 16 ? CHUNK * 2 : CHUNK * 2 + 16)
#define HALO_BYTES ((PIXELS * PITCH + 15) / 16 * 16)

// A thread moves units of up to 8 channels of a pixel.
#define UNIT (CHUNK < 8 ? CHUNK : 8)
#define PIXEL_UNITS (CHUNK / UNIT)
#define UNITS (PIXELS * PIXEL_UNITS)
#define STEP_UNITS ((UNITS + THREADS * X_STEPS - 1) / (THREADS * X_STEPS))  // of a thread, beside a step's products
#define MOST_BATCH (VECTOR == 1 ? 1 : VECTOR == 2 || RESIDUAL ? 2 : ROWS * TILES_N > 12 ? 3 : 4)
#define BATCH (STEP_UNITS < MOST_BATCH ? STEP_UNITS : MOST_BATCH)  // that it has in registers at once

#define PRODUCT_BYTES (BLOCK_CHANNELS * 32)  // weights of one product of all warps
#define STAGE_BYTES (COLUMNS * DEPTHS * KERNEL_H * PRODUCT_BYTES)
#define STEPS (CHUNKS * X_STEPS / COLUMNS)  // stages of weights that a tile takes
#define RESIDENT (STAGES == 0)
#define RING (RESIDENT ? STEPS : STAGES)
#define WEIGHT_BYTES (RING * STAGE_BYTES)

#define TABLE_BYTES ((PIXELS * 4 + 15) / 16 * 16)
#define AFFINE_BYTES (TRANSFORM ? CHUNKS * CHUNK * 8 : 0)
// A warp's pixels of one row on their way out, by pixel or by channel, free of bank conflicts.
#define STAGED_PITCH (OUT_PLANAR ? 48 : 16 * (TILES_N | 1))
#define STAGED_BYTES (OUT_PLANAR ? TILES_N * 8 * STAGED_PITCH : 16 * STAGED_PITCH)

struct alignas(16) Tile {
  i64 offset;  // of the image's first pixel
  int number, image, y, x;
};

// What shared memory has. Of the halo there are two, of the chunk at work and of the next, and so there are of what
// belongs to tile `j` of the block; a tile's place is read longer, while the maps of the one after the next are made.
struct Shared {
  unsigned char* base;
  DEVICE unsigned char* halo(int i) const { return base + WEIGHT_BYTES + i * HALO_BYTES; }
  // Of each pixel of the halo twice the number of its source in the image, plus 1 where it writes `kept`; -1 is a zero.
  DEVICE int* table(int j) const { return reinterpret_cast<int*>(halo(2) + j % 2 * TABLE_BYTES); }
  DEVICE unsigned char* maps_end() const { return halo(2) + 2 * TABLE_BYTES; }
  DEVICE Affine* affines(int j) const { return reinterpret_cast<Affine*>(maps_end() + j % 2 * AFFINE_BYTES); }
  DEVICE Tile& tile(int j) const { return reinterpret_cast<Tile*>(maps_end() + 2 * AFFINE_BYTES)[j % 4]; }
  DEVICE OwnedSum* sum(int thread) const { return reinterpret_cast<OwnedSum*>(&tile(0) + 4) + thread; }
  DEVICE unsigned char* staged(int warp) const {
    return reinterpret_cast<unsigned char*>(sum(STATISTICS ? THREADS : 0)) + warp * STAGED_BYTES;
  }
};

// A picture (N, CHANNELS, height, width), channels_last or contiguous.
struct Picture {
  const element* pixels;
  i64 channel, pixel;  // strides
};

// Sizes of the padded, enlarged input, and where its pixels come from.
struct Geometry {
  int height, width, top, left, padded_height, padded_width, out_height, out_width;

  DEVICE int entry(const Tile& tile, int i) const {
    const int row = i / HALO_W, column = i % HALO_W;
    const int y = (tile.y + row % PLANE_H) * STRIDE_Y + row / PLANE_H;
    const int x = (tile.x + column % PLANE_W) * STRIDE_X + column / PLANE_W;
    if (y >= padded_height || x >= padded_width) return -1;
    const int from_y = source(y, top, height, UPSAMPLE), from_x = source(x, left, width, UPSAMPLE);
    if (from_y < 0 || from_x < 0) return -1;
    // Neighbouring tiles share their halos; with stride 1 all tiles together have every pixel.
    const bool mine = (y < tile.y + TILE_H || tile.y + TILE_H >= out_height) &&
                      (x < tile.x + TILE_W || tile.x + TILE_W >= out_width);
    const bool writes = KEEP && mine && owns(y, top, height, UPSAMPLE) && owns(x, left, width, UPSAMPLE);
    return (from_y * width + from_x) * 2 + writes;
  }
};

// A unit as it was loaded. Left as it is until it is used: anything else would wait for the load.
struct Raw {
#if VECTOR > 1
  u32 words[UNIT / 2];
#else
  u16 values[UNIT];
#endif

  DEVICE u32 pair(int i) const {
#if VECTOR > 1
    return words[i];
#else
    return values[2 * i] | (u32)values[2 * i + 1] << 16;
#endif
  }

  // Channels from `channel` on; zeros of what does not exist.
  DEVICE void load(const Picture& from, i64 offset, int channel, bool exists) {
#pragma unroll
    for (int i = 0; i < UNIT; i += VECTOR) {
      const bool there = exists && (CHANNELS % CHUNK == 0 || channel + i < CHANNELS);
#if VECTOR == 8
      const uint4 v = there ? *reinterpret_cast<const uint4*>(from.pixels + offset + i) : make_uint4(0, 0, 0, 0);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
#elif VECTOR == 4
      const uint2 v = there ? *reinterpret_cast<const uint2*>(from.pixels + offset + i) : make_uint2(0, 0);
      words[i / 2] = v.x, words[i / 2 + 1] = v.y;
#elif VECTOR == 2
      words[i / 2] = there ? *reinterpret_cast<const u32*>(from.pixels + offset + i) : 0;
#else
      values[i] = there ? from.pixels[offset + i * from.channel] : 0;
#endif
    }
  }
};

// Two channels of z, as they are rounded; `affines` has scale and shift of one, then of the other.
DEVICE u32 finished(const float4& affines, u32 pair, u32 more) {
  float a = fmaf(low(pair), affines.x, affines.y), b = fmaf(high(pair), affines.z, affines.w);
  if (RELU) a = clamp_below(a, 0.f), b = clamp_below(b, 0.f);
  if (RESIDUAL) a += low(more), b += high(more);
  return pack<DTYPE>(a, b);
}

// Where a lane finds its share of a row's 16 x 16 operand, for one column of taps, from the first pixel of the row on.
struct Lane {
  u32 offset[2];

  static DEVICE u32 column(int tap) { return (tap % STRIDE_X * PLANE_W + tap / STRIDE_X) * PITCH; }

  DEVICE Lane(int lane, int step) {
    if (CHUNK == 4) {  // a word of its own for each register: two channels of pixel lane / 4
      const int tap = step * 4 + (lane & 3) / 2;
      const u32 word = (lane >> 2) * PITCH + (lane & 1) * 4;
      offset[0] = column(tap) + word, offset[1] = column(tap + 2) + word;
    } else {  // an address for ldmatrix: eight pixels, the other eight, then the second half of the depth
      const int half = lane >> 4;
      offset[0] = (CHUNK == 8 ? column(2 * step + half) : column(step) + half * 16) + (lane & 15) * PITCH;
      offset[1] = 0;
    }
  }

  DEVICE void load(u32 (&a)[4], const unsigned char* row) const {
    if constexpr (CHUNK == 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = *reinterpret_cast<const u32*>(row + offset[i / 2] + i % 2 * 8 * PITCH);
    } else {
      load_matrices(a, shared_address(row) + offset[0]);
    }
  }
};
