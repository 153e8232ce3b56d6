// Sums of what a warp writes, of the products of mma.cuh with pixels as rows and channels as columns: eight lanes share
// two channels of each product. Constant: GROUP_TILES, the products side by side that are summed at once, up to 4.
#pragma once
#include "channel_sums.cuh"

#define SHARED_CHANNELS (GROUP_TILES > 2 ? 8 : GROUP_TILES == 2 ? 4 : 2)  // of eight lanes, rounded up
#define OWNED_SHIFT (SHARED_CHANNELS >= 8 ? 2 : SHARED_CHANNELS == 4 ? 3 : 4)

// What eight lanes have seen of their channels in one tile, about the pivots of the channels' owners.
struct TileSums {
  float pivots[2 * GROUP_TILES], sums[SHARED_CHANNELS], squares[SHARED_CHANNELS];

  DEVICE void add(int i, float x, bool counts) {
    const float d = counts ? x - pivots[i] : 0.f;
    sums[i] += d;
    squares[i] = fmaf(d, d, squares[i]);
  }
};

// Each lane owns one of its eight lanes' channels (one of two, or four, lanes where there are fewer). It has its sum
// in shared memory: registers are for the products.
struct alignas(16) OwnedSum {
  PivotSum sum;
  int count;  // pixels

  static DEVICE int owned(int lane) { return lane >> OWNED_SHIFT; }

  // `first` has the pixels of lane 0 to 3 that the pivots are to be, if there are none yet.
  DEVICE TileSums begin(const float (&first)[2 * GROUP_TILES], int lane) {
    if (count == 0) {
#pragma unroll
      for (int i = 0; i < 2 * GROUP_TILES; i++) {
        const float pivot = __shfl_sync(~0u, first[i], lane & 3);
        if (owned(lane) == i) sum.start(pivot);
      }
    }
    TileSums tile;
#pragma unroll
    for (int i = 0; i < 2 * GROUP_TILES; i++) tile.pivots[i] = __shfl_sync(~0u, sum.pivot, i << OWNED_SHIFT | (lane & 3));
#pragma unroll
    for (int i = 0; i < SHARED_CHANNELS; i++) tile.sums[i] = tile.squares[i] = 0.f;
    return tile;
  }

  // By recursive halving: at each step a lane hands half of its channels to its partner, while there are two or more.
  DEVICE void end(TileSums& tile, int lane, int pixels) {
#pragma unroll
    for (int partner = 16, channels = SHARED_CHANNELS; partner >= 4; partner /= 2, channels = (channels + 1) / 2) {
      const bool upper = lane & partner;
      const int half = channels / 2;
      if (channels == 1) {
        tile.sums[0] += __shfl_xor_sync(~0u, tile.sums[0], partner);
        tile.squares[0] += __shfl_xor_sync(~0u, tile.squares[0], partner);
      }
#pragma unroll
      for (int i = 0; i < half; i++) {
        const float sums = upper ? tile.sums[i] : tile.sums[i + half];
        const float squares = upper ? tile.squares[i] : tile.squares[i + half];
        tile.sums[i] = (upper ? tile.sums[i + half] : tile.sums[i]) + __shfl_xor_sync(~0u, sums, partner);
        tile.squares[i] = (upper ? tile.squares[i + half] : tile.squares[i]) + __shfl_xor_sync(~0u, squares, partner);
      }
    }
    sum.sum += tile.sums[0];
    sum.squares += tile.squares[0];
    count += pixels;
  }

  // Add them to (image, channel) numbers from `first` on, of `channels`, those below `end`.
  DEVICE void flush(SumsWorkspace* workspace, int copy, i64 channels, i64 first, i64 end, double per_pixel, int lane) {
    const int i = owned(lane);
    const i64 channel = first + i / 2 * 8 + (lane & 3) * 2 + i % 2;
    const bool owner = (lane >> 2 & ((1 << (OWNED_SHIFT - 2)) - 1)) == 0 && i < 2 * GROUP_TILES;
    if (count > 0 && owner && channel < end) {
      add_share(workspace, copy, channels, channel, false, sum.about_zero(count) * per_pixel);
      add_share(workspace, copy, channels, channel, true, sum.squares_about_zero(count) * per_pixel);
    }
    count = 0;
  }
};
