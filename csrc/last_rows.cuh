// The input of csrc/last_conv.cu: its geometry, what lies where in shared memory, and the rows of pixels that are
// fetched into a ring there and finished in place.
//
// Constants, as in csrc/last_conv.cu: DTYPE, PARAMETER, CHANNELS, OUT_CHANNELS, KERNEL, ACTIVATION, MMA_N, SLOTS,
// PITCH, HELD.
#pragma once
#include "hopper.cuh"
#include "norm.cuh"
#include "operand_chunk.cuh"

#define PIXELS (CHANNELS < 32 ? 2 : 1)  // of a column
#define PIXEL_BYTES (CHANNELS * (int)sizeof(element))
#define COLUMN_BYTES (PIXELS * PIXEL_BYTES)
#define CHUNKS (COLUMN_BYTES / 16)  // 16-byte chunks of a column
#define ROW_PIXELS (MMA_N * PIXELS)
#define ROW_BYTES (MMA_N * COLUMN_BYTES)
#define ROWS (KERNEL + 1)               // input rows of a unit
#define SHIFT ((KERNEL - 1) / PIXELS)   // columns from an output's first to its last
#define STRIP ((MMA_N - SHIFT) * PIXELS)  // outputs in a row of a unit
#define PLANES ((KERNEL + PIXELS - 1) * OUT_CHANNELS)
#define ROW_STEPS (COLUMN_BYTES / 32)  // products, 32 bytes deep, of an input row
#define STEPS (ROWS * ROW_STEPS)
#define HALF (MMA_N / 16 * 8)  // columns of outputs that are added first; the rest of the strip comes second
#define WEIGHT_BYTES ((STEPS - HELD) * 2048)
#define PLANES_BYTES (2 * PLANES * PITCH * 4)
#define NORMALIZING 96  // threads
#define BATCH (DTYPE == 0 ? 6 : 5)  // chunks of a thread on their way at once

static_assert(COLUMN_BYTES <= 128 && HELD <= STEPS, "does not fit");
static_assert(PLANES <= 32 && SLOTS > KERNEL && PITCH >= HALF + 8 && PITCH >= MMA_N - HALF, "does not fit");

struct Geometry {
  int images, height, width, out_height, out_width, top, left, pad;

  DEVICE int strips() const { return (out_width + STRIP - 1) / STRIP; }
  DEVICE int row_pairs() const { return (out_height + 1) / 2; }
  // The source of `at` along a dimension of `size` pixels that are padded up to `end`; outside for a zero.
  // Past the end is what only outputs outside the picture, or zero weights, get to see.
  DEVICE int source(int at, int size, int end) const {
    at = min(at, end - 1);
    if (pad == 2) return min(abs(at), 2 * (size - 1) - abs(at));
    if (pad == 3) return min(max(at, 0), size - 1);
    return at;
  }
  DEVICE int source_row(int y) const { return source(y, height, out_height + KERNEL - 1 - top); }
  DEVICE int source_column(int x) const { return source(x, width, out_width + KERNEL - 1 - left); }
};

// The input of units that follow each other down one strip: pixels from (y, x), `rows` rows of `pixels` that
// count. Coordinates are the picture's own, negative in the padding.
struct Band {
  int image, y, x, rows, pixels, units;

  DEVICE Band(const Geometry& g, int unit, int end) {
    const int pairs = g.row_pairs(), pair = unit % pairs, strip = unit / pairs % g.strips();
    const int padded = g.out_width + KERNEL - 1 - strip * STRIP;
    image = unit / pairs / g.strips();
    units = min(end - unit, pairs - pair);
    y = 2 * pair - g.top, x = strip * STRIP - g.left;
    rows = 2 * units + KERNEL - 1, pixels = min(ROW_PIXELS, (padded + PIXELS - 1) / PIXELS * PIXELS);
  }
};

// Where in the ring a role is: the slot of the next row, and the parity of its use.
struct Cursor {
  int slot;
  u32 phase;

  DEVICE void next() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

struct Shared {
  u32 ring, weights, planes, raw, full, empty, weights_full, order, adding;

  DEVICE explicit Shared(u32 base) {
    ring = base, weights = ring + SLOTS * ROW_BYTES, planes = weights + WEIGHT_BYTES;
    raw = planes + PLANES_BYTES, full = raw + 8 * SLOTS, empty = full + 8 * SLOTS;
    weights_full = empty + 8 * SLOTS, order = weights_full + 8, adding = order + 8;
  }
  DEVICE void init() const {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(raw + 8 * i, 1);
      barrier_init(full + 8 * i, NORMALIZING / 32);
      barrier_init(empty + 8 * i, 8);
    }
    barrier_init(weights_full, 1), barrier_init(order, 4), barrier_init(adding, 4);
    barrier_init_fence();
  }
};

// One warp: raw rows into the ring.
DEVICE void fetch(const Shared& shared, const Geometry& g, const element* x, int begin, int end, int lane) {
  Cursor at = {0, 0};
  for (int unit = begin; unit < end;) {
    const Band band(g, unit, end);
    unit += band.units;
    // Pixels of the band inside the picture, and how many lie in the padding before and after them.
    const int from = max(band.x, 0), inside = max(min(band.x + band.pixels, g.width) - from, 0);
    const int before = min(max(-band.x, 0), band.pixels), after = band.pixels - before - inside;
    const int outside = g.pad == 1 ? 0 : before + after;
    for (int i = 0; i < band.rows; i++) {
      const int y = g.source_row(band.y + i);
      const u32 slot = shared.ring + at.slot * ROW_BYTES, barrier = shared.raw + 8 * at.slot;
      const bool zeros = (u32)y >= (u32)g.height;
      const element* row = x + ((i64)band.image * g.height + y) * g.width * CHANNELS;
      barrier_wait(shared.empty + 8 * at.slot, at.phase ^ 1);  // the first round returns at once
      if (lane == 0) {
        barrier_expect(barrier, zeros ? 0 : (inside + outside) * PIXEL_BYTES);
        if (inside > 0 && !zeros) {
          const u32 to = slot + (from - band.x) * PIXEL_BYTES;
          bulk_copy(to, row + (i64)from * CHANNELS, inside * PIXEL_BYTES, barrier);
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int j = zeros ? outside : lane; j < outside; j += 32) {
        const int pixel = j < before ? j : j + inside;
        const element* copied = row + (i64)g.source_column(band.x + pixel) * CHANNELS;
        bulk_copy(slot + pixel * PIXEL_BYTES, copied, PIXEL_BYTES, barrier);
      }
      at.next();
    }
  }
}

// Three warps: the ring's rows made ready. The swizzle moves the chunk at offset o of a row to
// o ^ (o / 128 % CHUNKS * 16); the chunks of a column change places inside one warp.
DEVICE void normalize(const Shared& shared, const Geometry& g, const Norm& norm, const Activation& activation,
                      int begin, int end, int thread) {
  constexpr int kStep = NORMALIZING * 16, kUnits = (ROW_BYTES + kStep - 1) / kStep;
  static_assert(kStep / 128 % 4 == 0, "a thread's chunks differ in their swizzle by an XOR with 4 or 0");
  const int channel = thread % (CHANNELS / CHUNK_CHANNELS) * CHUNK_CHANNELS, mine = thread * 16;
  const int to = mine ^ ((mine / 128 % CHUNKS) * 16);
  Cursor at = {0, 0};
  for (int unit = begin; unit < end;) {
    const Band band(g, unit, end);
    unit += band.units;
    const bool beyond = g.pad == 1 && (band.x < 0 || band.x + band.pixels > g.width);
    Affine affine[CHUNK_CHANNELS];
#pragma unroll
    for (int i = 0; i < CHUNK_CHANNELS; i++) affine[i] = norm.at(band.image, channel + i);
#pragma unroll 1
    for (int i = 0; i < band.rows; i++) {
      const u32 slot = shared.ring + at.slot * ROW_BYTES;
      auto has = [&](int j) { return (j + 1) * kStep <= ROW_BYTES || mine + j * kStep < ROW_BYTES; };
      auto target = [&](int j) { return slot + (to ^ (j * (kStep / 128) % CHUNKS * 16)) + j * kStep; };
      barrier_wait(shared.raw + 8 * at.slot, at.phase);
#pragma unroll
      for (int j0 = 0; j0 < kUnits; j0 += BATCH) {
        uint4 v[BATCH];
#pragma unroll
        for (int j = j0; j < j0 + BATCH && j < kUnits; j++)
          if (has(j)) v[j - j0] = load_shared(slot + mine + j * kStep);
        __syncwarp();
#pragma unroll
        for (int j = j0; j < j0 + BATCH && j < kUnits; j++)
          if (has(j)) store_shared(target(j), finished_chunk<ACTIVATION>(v[j - j0], affine, activation));
      }
      const bool zeros = (u32)g.source_row(band.y + i) >= (u32)g.height;
      if (zeros || beyond) {
#pragma unroll 1
        for (int j = 0; j < kUnits; j++) {
          const int x = band.x + (mine + j * kStep) / PIXEL_BYTES;
          if (has(j) && (zeros || (u32)x >= (u32)g.width)) store_shared(target(j), make_uint4(0, 0, 0, 0));
        }
      }
      async_fence();
      __syncwarp();
      if (thread % 32 == 0) barrier_arrive(shared.full + 8 * at.slot);
      at.next();
    }
  }
}
