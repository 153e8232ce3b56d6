// The input of csrc/first_conv.cu: rows of the padded picture, packed as [x][4 channels] into a ring in shared memory
// from where the products read them, and which rows and pixels a unit of work takes.
//
// Constants, as in csrc/first_conv.cu: DTYPE, PICTURE, CHANNELS, KERNEL, MMA_N, PAD.
#pragma once
#include "hopper.cuh"

#if DTYPE == 0
#define ADJACENT 1  // pixels of a column of the product
#define SLOTS 12    // rows in the ring: even, and no fewer than a unit reads
#define IN_FLIGHT PIXELS_A_LANE  // that a lane of the warps that pack ahead reads at once
#else
#define ADJACENT 2
#define SLOTS 16
#define IN_FLIGHT 6
#endif
#define UNIT_ROWS (2 / ADJACENT)
#define INPUT_ROWS (KERNEL + UNIT_ROWS - 1)  // that a unit reads
#define STRIP (ADJACENT * MMA_N)

#define ROW_PIXELS (STRIP + KERNEL - 1)
#define PIXEL_BYTES (16 / ADJACENT)
#define PITCH (PIXEL_BYTES * ROW_PIXELS)
#define PIXELS_A_LANE ((ROW_PIXELS + 31) / 32)
#define FIRST_ROWS 12  // packed by all warps, one each

static_assert(SLOTS % 2 == 0 && SLOTS >= INPUT_ROWS && SLOTS >= FIRST_ROWS, "ring");
static_assert(INPUT_ROWS % 2 || UNIT_ROWS % 2 == 0, "units with an even number of rows start at even slots");

// The input, with strides in elements.
struct Picture {
  const Storage<PICTURE>::type* pixels;
  i64 image, channel, row;
  int pixel, height, width, top, left, padded_width;
};

// The pixel that stands at position `i` of a dimension of `size`, which may lie in the padding; -1 is a zero.
DEVICE int source(int i, int size) {
  const int last = size - 1;
  if (PAD == 1 && (i < 0 || i > last)) return -1;
  if (PAD == 2) i = abs(i), i = min(i, 2 * last - i);
  if (PAD == 3) i = min(max(i, 0), last);
  return i;
}

// Rows by their position in the order in which this block packs them; row i is in slot i % SLOTS. `full` and
// `empty` are the barriers of slot 0. Both warpgroups pass every row on, after having seen it full.
struct Ring {
  u32 rows, full, empty;
  DEVICE u32 row(int i) const { return rows + (u32)i % SLOTS * PITCH; }
  DEVICE void wait_full(int i) const { barrier_wait(full + 8 * ((u32)i % SLOTS), (u32)i / SLOTS & 1); }
  DEVICE void wait_empty(int i) const {
    if (i >= SLOTS) barrier_wait(empty + 8 * ((u32)i % SLOTS), ((u32)i / SLOTS - 1) & 1);
  }
  DEVICE void arrive_full(int i) const { barrier_arrive(full + 8 * ((u32)i % SLOTS)); }
  DEVICE void arrive_empty(int i) const { barrier_arrive(empty + 8 * ((u32)i % SLOTS)); }
};

// A block's units, by image, strip and output rows; a *column* is a strip of an image, of `height` units.
struct Share {
  int first, end, height, strips;
};

// A number of the picture as the kernel computes with it.
DEVICE element rounded(Storage<PICTURE>::type value) {
  if constexpr (PICTURE == DTYPE) return value;
  else return from_float<DTYPE>(to_float<PICTURE>(value));
}

// A pixel as an operand of the products.
DEVICE void store_pixel(u32 to, const element (&channels)[4]) {
#if DTYPE == 0
  u32 words[4];
#pragma unroll
  for (int c = 0; c < 4; c++) words[c] = c < CHANNELS ? round_to_tf32(channels[c]) : 0;
  store_shared(to, make_uint4(words[0], words[1], words[2], words[3]));
#else
  store_shared(to, channels[0] | (u32)channels[1] << 16, channels[2] | (u32)channels[3] << 16);
#endif
}

// One warp packs one row of the padded picture from `column` on, kInFlight pixels of a lane on their way.
template <int kInFlight>
DEVICE void pack_row(const Picture& in, const Ring& ring, int position, int image, int row, int column) {
  const int lane = threadIdx.x % 32, from_y = source(row - in.top, in.height);
  const Storage<PICTURE>::type* pixels = in.pixels + image * in.image + max(from_y, 0) * in.row;
#pragma unroll
  for (int start = 0; start < PIXELS_A_LANE; start += kInFlight) {
    element values[kInFlight][4];
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int at = column + lane + 32 * (start + i);
      // Beyond the padded picture are only pixels of zero weight and of outputs that are not stored.
      const int from = from_y >= 0 && at < in.padded_width ? source(at - in.left, in.width) : -1;
      const bool reads = start + i < PIXELS_A_LANE && from >= 0;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        values[i][c] = 0;
        if (c < CHANNELS && reads) values[i][c] = rounded(pixels[c * in.channel + from * in.pixel]);
      }
    }
    if (start == 0) ring.wait_empty(position);
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int x = lane + 32 * (start + i);
      if (x < ROW_PIXELS) store_pixel(ring.row(position) + PIXEL_BYTES * x, values[i]);
    }
  }
  async_fence();
  __syncwarp();
  if (lane == 0) ring.arrive_full(position);
}

// The rows at the positions `next`, `next` + `step`, ... below `end` of this block.
template <int kInFlight>
DEVICE void pack_rows(const Picture& in, const Ring& ring, const Share& share, int next, int step, int end) {
  int position = 0;
#pragma unroll 1
  for (int unit = share.first; unit < share.end && next < end;) {
    const int y = unit % share.height, column = unit / share.height;
    const int units = min(share.end - unit, share.height - y), rows = UNIT_ROWS * units + KERNEL - 1;
    const int image = column / share.strips, x = column % share.strips * STRIP;
#pragma unroll 1
    for (; next < min(end, position + rows); next += step)
      pack_row<kInFlight>(in, ring, next, image, UNIT_ROWS * y + next - position, x);
    position += rows;
    unit += units;
  }
}
