// The pixels of csrc/residual_trunk.cu that a multiplying thread has in its accumulators: two neighbouring rows of
// every column of the tile, of two channels, `channel` and the eighth after it. Finished they become operands in shared
// memory, raw they are what neighbours read.
//
// 16-bit pixels lie in shared memory as they are, z too, and change places in matrices of 8x8. Float32 ones are rounded
// to TF32 there, so a thread keeps its z in registers.
#pragma once
#include "hopper.cuh"
#include "residual_trunk.cuh"

typedef Pair RawPixels[TILE_W][2];  // two rows of one column, of either channel

#if DTYPE == 0
// Accesses without a branch: of those the compiler would make many, whose instructions have to be fetched.
DEVICE void store_if(u32 condition, u32 address, u32 v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.shared.b32 [%1], %2;\n}" ::"r"(condition), "r"(address),
               "r"(v)
               : "memory");
}
DEVICE void store_if(u32 condition, void* to, u32 v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"(condition), "l"(to),
               "r"(v)
               : "memory");
}
DEVICE float load_if(u32 condition, const void* from) {
  float v;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.f32 %0, [%2];\n}"
               : "=f"(v)
               : "r"(condition), "l"(from)
               : "memory");
  return v;
}

// A bit for each column of which a row is published: of all its pixels, or of what neighbours' halos and its own need.
DEVICE u32 published_columns(const Tile& tile, int row, bool all) {
  const u32 inside = row < tile.rows ? (1u << tile.columns) - 1 : 0;
  return all || (tile.needed_rows() >> row & 1) ? inside : inside & tile.needed_columns();
}

struct OwnPixels {
  const Tile& tile;
  int row, stored;
  bool odd;  // of the four lanes of a channel
  RawPixels z;

  DEVICE OwnPixels(const Tile& tile, int warp, int lane) : tile(tile) {
    const int channel = warp * 16 + (lane >> 2);
    row = 2 * (lane & 3), odd = lane & 1;
    stored = ((tile.y + row) * tile.width + tile.x) * CHANNELS + channel;
  }
  // z = norm(x).
  DEVICE void begin(const element* x, const Affine (&affine)[2]) {
    const u32 columns[2] = {published_columns(tile, row, true), published_columns(tile, row + 1, true)};
#pragma unroll
    for (int g = 0; g < TILE_W; g++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const element* at = x + stored + g * CHANNELS + 8 * k;
        const float y0 = affine[k](load_if(columns[0] & 1 << g, at));
        const float y1 = affine[k](load_if(columns[1] & 1 << g, at + tile.width * CHANNELS));
        z[g][k] = RELU ? rounded_relu(y0, y1) : make_float2(y0, y1);
      }
  }
  // What neighbours' halos and this one's need; or all.
  DEVICE void publish(const RawPixels& raw, element* to, bool all) const {
    const u32 columns[2] = {published_columns(tile, row, all), published_columns(tile, row + 1, all)};
    element *first = to + stored, *second = first + tile.width * CHANNELS;
#pragma unroll
    for (int g = 0; g < TILE_W; g++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        store_if(columns[0] & 1 << g, first + g * CHANNELS + 8 * k, __float_as_uint(raw[g][k].x));
        store_if(columns[1] & 1 << g, second + g * CHANNELS + 8 * k, __float_as_uint(raw[g][k].y));
      }
  }
  // Of a block's first convolution, or, added to z, of its second.
  template <bool kResidual> DEVICE void finish(const RawPixels& raw, const Affine (&affine)[2], u32 into, u32) {
    const int lane = threadIdx.x & 31, channel = (threadIdx.x >> 5) * 16 + (lane >> 2);
    const int row = of_thread(this->row, lane);
    const u32 columns[2] = {published_columns(tile, row + odd, true), published_columns(tile, row + !odd, true)};
    u32 starts[4][2];  // of every fourth column: of either row; made anew each time, for want of registers
#pragma unroll
    for (int i = 0; i < 8; i++)
      starts[i / 2][i % 2] = into + offset_in_tile(row + (i % 2 ^ odd) + 1, i / 2 + 1, channel / CHUNK_CHANNELS) +
                             channel % CHUNK_CHANNELS * 4;
#pragma unroll
    for (int g = 0; g < TILE_W; g++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        Pair y = {affine[k](raw[g][k].x), affine[k](raw[g][k].y)};
        if (kResidual) z[g][k] = y = make_float2(y.x + z[g][k].x, y.y + z[g][k].y);
        else y = rounded_relu(y.x, y.y);
        // Neighbouring lanes store other rows: they lie in other banks.
        const u32 at = g / 4 * 4 * PLANE_H * PIXEL_BYTES, flip = k * 32;  // to the chunk of the other channel
        store_if(columns[0] & 1 << g, at + (starts[g % 4][0] ^ flip), round_to_tf32(odd ? y.y : y.x));
        store_if(columns[1] & 1 << g, at + (starts[g % 4][1] ^ flip), round_to_tf32(odd ? y.x : y.y));
      }
  }
};
#else
struct OwnPixels {
  const Tile& tile;
  int line, stored;  // after the transposition that gives a lane one row and two channels
  u32 needed_columns;
  bool needed_row;

  DEVICE OwnPixels(const Tile& tile, int warp, int lane) : tile(tile) {
    line = lane >> 2;
    stored = ((tile.y + line) * tile.width + tile.x) * CHANNELS + warp * 16 + 2 * (lane & 3);
    needed_columns = tile.needed_columns(), needed_row = tile.needed_rows() >> line & 1;
  }
  // What neighbours' halos and this one's need; or all.
  DEVICE void publish(const RawPixels& raw, element* to, bool all) const {
#pragma unroll
    for (int g = 0; g < TILE_W; g++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const u32 two = transpose_8x8(raw[g][k]);
        if (tile.has(line, g) && (all || needed_row || (needed_columns >> g & 1)))
          *reinterpret_cast<u32*>(to + stored + g * CHANNELS + 8 * k) = two;
      }
  }
  // Of a block's first convolution, or, added to z, of its second. A lane has the address of one row of four 8x8
  // matrices, two columns' of both channels' eight.
  template <bool kResidual>
  DEVICE void finish(const RawPixels& raw, const Affine (&affine)[2], u32 into, u32 dump) const {
    const int lane = threadIdx.x & 31, matrix = lane >> 3, row = lane & 7, column = matrix >> 1;
    const int chunk = (threadIdx.x >> 5) * 2 + (matrix & 1);
#pragma unroll
    for (int g = 0; g < TILE_W; g += 2) {
      const bool inside = tile.has(row, g + column);
      const u32 at = inside ? into + offset_in_tile(row + 1, g + column + 1, chunk) : dump + lane * 16;
      uint4 more = {};
      if (kResidual) more = load_transposed(at);
      const u32 add[4] = {more.x, more.y, more.z, more.w};
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        pairs[i] = finished<!kResidual, kResidual>(raw[g + i / 2][i % 2], affine[i % 2], affine[i % 2], add[i]);
      store_transposed(at, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
};
#endif
