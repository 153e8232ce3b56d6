// The geometry of csrc/mma_conv.cu, from its compile-time constants, and the way of a tile's input into shared memory.
#pragma once
#include "mma.cuh"
// Of the products side by side in a warp those whose results leave, and are summed, at once.
#define GROUP_TILES (TILES_N <= 4 ? TILES_N : TILES_N % 4 ? 3 : 4)
#define GROUPS (TILES_N / GROUP_TILES)
#include "mma_statistics.cuh"
#include "norm.cuh"
#include "source.cuh"

#define ELEMENT_BYTES (DTYPE == 0 ? 4 : 2)
#define CHUNK (CHUNK_BYTES / ELEMENT_BYTES)  // channels of a chunk
#define THREADS (32 * WARPS_M * WARPS_N)
#define TILE_W 16
#define TILE_H (ROWS * WARPS_M)
#define BLOCK_CHANNELS (WARPS_N * TILES_N * 8)  // output channels of a block
#define CHANNEL_BLOCKS ((OUT_CHANNELS + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS)
#define CHUNKS ((CHANNELS + CHUNK - 1) / CHUNK)
#define DEPTHS (CHUNK_BYTES < 32 ? 1 : CHUNK_BYTES / 32)     // products for one tap of a chunk
#define STEP_TAPS (CHUNK_BYTES < 32 ? 32 / CHUNK_BYTES : 1)  // taps of a row that one product takes
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
#define PITCH (CHUNK_BYTES < 32 ? CHUNK_BYTES : CHUNK_BYTES + 16)
#define HALO_BYTES ((PIXELS * PITCH + 15) / 16 * 16)

// A thread moves units of up to 16 bytes of a pixel, of 8 channels or of 4 of float32.
#define UNIT_BYTES (CHUNK_BYTES < 16 ? CHUNK_BYTES : 16)
#define UNIT (UNIT_BYTES / ELEMENT_BYTES)  // channels
#define UNIT_WORDS (UNIT_BYTES / 4)
#define PIXEL_UNITS (CHUNK / UNIT)
#define UNITS (PIXELS * PIXEL_UNITS)
#define STEP_UNITS ((UNITS + THREADS * X_STEPS - 1) / (THREADS * X_STEPS))  // of a thread, beside a step's products
#define MOST_BATCH (VECTOR == 1 ? 1 : VECTOR == 2 || RESIDUAL ? 2 : ROWS * TILES_N > 12 ? 3 : 4)
#define BATCH (STEP_UNITS < MOST_BATCH ? STEP_UNITS : MOST_BATCH)  // that it has in registers at once
// No step, and no batch of a step, goes past the last unit: else the last steps may have units that do not exist.
#define ALL_EXIST (UNITS % (THREADS * X_STEPS) == 0 && STEP_UNITS % BATCH == 0)

#define TOGETHER (TILES_N % 2 ? 1 : 2)  // products whose weights one load brings
#define PRODUCT_BYTES (BLOCK_CHANNELS * 32)  // weights of one product of all warps
#define STAGE_BYTES (COLUMNS * DEPTHS * KERNEL_H * PRODUCT_BYTES)
#define STEPS (CHUNKS * X_STEPS / COLUMNS)  // stages of weights that a tile takes
#define RESIDENT (STAGES == 0)
#define RING (RESIDENT ? STEPS : STAGES)
#define WEIGHT_BYTES (RING * STAGE_BYTES)

#define PICTURE_CHANNELS (SUBPIXEL ? OUT_CHANNELS / 4 : OUT_CHANNELS)  // of the output

#define TABLE_BYTES ((PIXELS * 4 + 15) / 16 * 16)
#define AFFINE_BYTES (TRANSFORM ? CHUNKS * CHUNK * 8 : 0)
// A warp's pixels of one row on their way out, by pixel or by channel, free of bank conflicts.
#define STAGED_PITCH (OUT_PLANAR ? 16 * ELEMENT_BYTES + 16 : 16 * (GROUP_TILES * ELEMENT_BYTES / 2 | 1))
#define STAGED_BYTES (OUT_PLANAR ? GROUP_TILES * 8 * STAGED_PITCH : 16 * STAGED_PITCH)

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
  DEVICE OwnedSum* sum(int thread, int group) const {
    return reinterpret_cast<OwnedSum*>(&tile(0) + 4) + group * THREADS + thread;
  }
  DEVICE unsigned char* staged(int warp) const {
    return reinterpret_cast<unsigned char*>(sum(0, STATISTICS ? GROUPS : 0)) + warp * STAGED_BYTES;
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

// Windows along one dimension, from number `first` on, and which of `size` there are: in the sub-pixel form those that
// make a pixel of a parity inside of the picture, all but the last for 0, all but the first for 1.
struct Span {
  int first, begin, end, parity;

  DEVICE Span(int first, int length, int size, int parity) : first(first), parity(parity) {
    begin = SUBPIXEL && parity == 1 && first == 0;
    end = min(max(size - (SUBPIXEL ? 1 - parity : 0) - first, 0), length);
  }
  DEVICE bool has(int i) const { return (!SUBPIXEL || i >= begin) && i < end; }
  DEVICE int count() const { return end - begin; }
  // The number, in the picture, of the pixel that window i makes.
  DEVICE int pixel(int i) const { return SUBPIXEL ? 2 * (first + i) - parity : first + i; }
};

// A unit as it was loaded. Left as it is until it is used: anything else would wait for the load.
struct Raw {
#if VECTOR * ELEMENT_BYTES > 2
  u32 words[UNIT_WORDS];
  DEVICE u32 word(int i) const { return words[i]; }
#else
  u16 values[UNIT];
  DEVICE u32 word(int i) const { return values[2 * i] | (u32)values[2 * i + 1] << 16; }
#endif

  // Channels from `channel` on; zeros of those that do not exist.
  DEVICE void load(const Picture& from, i64 offset, int channel) {
#pragma unroll
    for (int i = 0; i < UNIT; i += VECTOR) {
      const bool there = CHANNELS % CHUNK == 0 || channel + i < CHANNELS;
      const element* at = from.pixels + offset + (VECTOR == 1 ? i * from.channel : i);
#if VECTOR * ELEMENT_BYTES == 16
      const uint4 v = there ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
#elif VECTOR * ELEMENT_BYTES == 8
      const uint2 v = there ? *reinterpret_cast<const uint2*>(at) : make_uint2(0, 0);
      words[i * ELEMENT_BYTES / 4] = v.x, words[i * ELEMENT_BYTES / 4 + 1] = v.y;
#elif VECTOR * ELEMENT_BYTES == 4
      words[i * ELEMENT_BYTES / 4] = there ? *reinterpret_cast<const u32*>(at) : 0;
#else
      values[i] = there ? *at : 0;
#endif
    }
  }
};

// Word `i` of a unit of z: one channel of float32, or two as they are rounded. `affines` has scale and shift of one
// channel, then of the next.
DEVICE u32 finished(const float4* affines, int i, u32 word, u32 more) {
#if DTYPE == 0
  const float4 two = affines[i / 2];
  float a = fmaf(__uint_as_float(word), i % 2 ? two.z : two.x, i % 2 ? two.w : two.y);
  if (RELU) a = clamp_below(a, 0.f);
  if (RESIDUAL) a += __uint_as_float(more);
  return __float_as_uint(a);
#else
  const float4 two = affines[i];
  float a = fmaf(low(word), two.x, two.y), b = fmaf(high(word), two.z, two.w);
  if (RELU) a = clamp_below(a, 0.f), b = clamp_below(b, 0.f);
  if (RESIDUAL) a += low(more), b += high(more);
  return pack<DTYPE>(a, b);
#endif
}
// That word as an operand of a product.
DEVICE u32 operand_of(u32 word) { return DTYPE == 0 ? round_to_tf32(__uint_as_float(word)) : word; }
// Channel `i` of a unit.
DEVICE element element_of(const u32 (&words)[UNIT_WORDS], int i) {
#if DTYPE == 0
  return __uint_as_float(words[i]);
#else
  return (element)(words[i / 2] >> i % 2 * 16);
#endif
}

// Two neighbouring channels of a pixel of the output, as they are written.
struct Results {
#if DTYPE == 0
  float a, b;
  DEVICE Results(float a, float b) : a(a), b(b) {}
  DEVICE float first() const { return a; }
  DEVICE float second() const { return b; }
  // To the warp's lines for product `n` of a group: of pixels, or of channels if OUT_PLANAR.
  DEVICE void stage(unsigned char* staged, int n, int half, int lane) const {
    const int pixel = half * 8 + (lane >> 2), channel = n * 8 + (lane & 3) * 2;
    if (OUT_PLANAR) {
      float* to = reinterpret_cast<float*>(staged + channel * STAGED_PITCH) + pixel;
      to[0] = a, to[STAGED_PITCH / 4] = b;
    } else {
      uint2* to = reinterpret_cast<uint2*>(staged + pixel * STAGED_PITCH + channel * 4);
      *to = make_uint2(__float_as_uint(a), __float_as_uint(b));
    }
  }
#else
  u32 pair;
  DEVICE Results(float a, float b) : pair(pack<DTYPE>(a, b)) {}
  DEVICE float first() const { return low(pair); }
  DEVICE float second() const { return high(pair); }
  DEVICE void stage(unsigned char* staged, int n, int half, int lane) const {
    const int line = (OUT_PLANAR ? n : half) * 8 + (lane >> 2), unit = OUT_PLANAR ? half : n;
    u32* to = reinterpret_cast<u32*>(staged + line * STAGED_PITCH + unit * 16 + (lane & 3) * 4);
    *to = OUT_PLANAR ? transpose_8x8(pair) : pair;
  }
#endif
};

// Taps of a column in the planes before one.
DEVICE constexpr int taps_before(int plane) {
  return plane * (KERNEL_H / STRIDE_Y) + (plane < KERNEL_H % STRIDE_Y ? plane : KERNEL_H % STRIDE_Y);
}

// Where a lane finds its share of a row's 16 x 16 operand, for one column of taps, from the first pixel of the row on.
struct Lane {
  u32 offset[2];

  static DEVICE u32 column(int tap) { return (tap % STRIDE_X * PLANE_W + tap / STRIDE_X) * PITCH; }

  DEVICE Lane(int lane, int step) {
    if (CHUNK_BYTES == 8) {  // a word of its own for each register: of pixel lane / 4
      const int tap = step * 4 + (lane & 3) / 2;
      const u32 word = (lane >> 2) * PITCH + (lane & 1) * 4;
      offset[0] = column(tap) + word, offset[1] = column(tap + 2) + word;
    } else {  // an address for ldmatrix: eight pixels, the other eight, then the second half of the depth
      const int half = lane >> 4;
      offset[0] = (CHUNK_BYTES == 16 ? column(2 * step + half) : column(step) + half * 16) + (lane & 15) * PITCH;
      offset[1] = 0;
    }
  }

  // Of the row `bytes` after `first`: a constant, which costs no instruction.
  DEVICE void load(u32 (&a)[4], const unsigned char* first, int bytes) const {
    if constexpr (CHUNK_BYTES == 8) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = *reinterpret_cast<const u32*>(first + offset[i / 2] + (bytes + i % 2 * 8 * PITCH));
    } else {
      load_matrices(a, shared_address(first) + offset[0] + bytes);
    }
  }
};
