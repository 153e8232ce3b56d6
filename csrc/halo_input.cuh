// The input of csrc/halo_conv.cu on its way through a block's ring of slots: fetched, finished in place, mirrored at
// the picture's border.
//
// Constants, as in csrc/halo_conv.cu: CHANNELS, STRIDE, PAD, SLOT_CHANNELS, SLOTS, STREAMED, ACTIVATION; and what
// halo_tile.cuh makes of those and the others.
#pragma once
#include "halo_tile.cuh"
#include "operand_chunk.cuh"

// What a block takes and where it has it. Tiles are counted in the order in which this block takes them; use number
// `use` of the ring is slot use % SLOTS, with channels from use % DEPTH * SLOT_CHANNELS on of tile use / DEPTH.
struct Input {
  const TensorMap& map;
  const unsigned char* weights;
  u32 slots, weight_base, affines;     // in shared memory
  u32 raw, full, empty, weights_full;  // barriers, of the first slot and of the first weights
  int row_block, origin_y, origin_x;   // which rows of the product, and where their taps start in the source
  int first, step, tiles, total;       // the first tile and the way to the next; how many; uses of the ring
  int tiles_x, tiles_per_image;
  u64 line_reciprocal, image_reciprocal;
  int height, width;

  DEVICE Tile tile_at(int j) const {
    const int tile = first + j * step, image = quotient(tile, image_reciprocal), rest = tile - image * tiles_per_image;
    const int line = quotient(rest, line_reciprocal);
    return Tile{image, line * TILE_H, (rest - line * tiles_x) * TILE_W};
  }
  DEVICE u32 slot_of(int use) const { return slots + use % SLOTS * SLOT_BYTES; }
  DEVICE const unsigned char* weights_of(int depth) const {
    return weights + (i64)(row_block * DEPTH + depth) * WEIGHT_BYTES;
  }
  // Of one thread: the copies into a slot that is free.
  DEVICE void fetch(int use, const Tile& tile) const {
    const u32 barrier = raw + 8 * (use % SLOTS);
    barrier_expect(barrier, PLANES * PLANE_PIXELS * PIXEL_BYTES + (STREAMED ? WEIGHT_BYTES : 0));
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
      tensor_copy(slot_of(use) + plane * PLANE_BYTES, map, use % DEPTH * SLOT_CHANNELS,
                  tile.y * STRIDE + origin_y + plane / STRIDE, tile.x * STRIDE + origin_x + plane % STRIDE, tile.image,
                  barrier);
    if (STREAMED) bulk_copy(slot_of(use) + SLOT_BYTES - WEIGHT_BYTES, weights_of(use % DEPTH), WEIGHT_BYTES, barrier);
  }

  // In a tile at the picture's border, what lies outside is a copy of finished pixels of the same tile. Of threads with
  // the same `chunk` of every `pixels`-th pixel from `first_pixel` on.
  DEVICE void mirror(u32 slot, int y0, int x0, int first_pixel, int pixels, int chunk) const {
    // Rows above and below the picture, then columns left and right of it; farther out no window that counts reads.
    const int above = max(-y0, 0), rows = above + min(max(y0 + HALO_H - height, 0), TAPS_Y - 1);
    const int before = max(-x0, 0), columns = before + min(max(x0 + HALO_W - width, 0), TAPS_X - 1);
    auto copy = [&](int y, int x) {
      const int from_y = mirrored(y0 + y, height) - y0, from_x = mirrored(x0 + x, width) - x0;
      uint4 z = make_uint4(0, 0, 0, 0);
      if (PAD != 1) {
        if ((u32)from_y >= HALO_H || (u32)from_x >= HALO_W) return;
        z = load_shared(slot + address_in_slot(from_y, from_x, chunk));
      }
      store_shared(slot + address_in_slot(y, x, chunk), z);
    };
#pragma unroll 1
    for (int i = 0; i < rows + columns; i++) {
      const bool is_row = i < rows;
      const int line = is_row ? i : i - rows, outside = is_row ? above : before;
      const int at = line < outside ? line : (is_row ? height - y0 : width - x0) + line - outside;
#pragma unroll 1
      for (int k = first_pixel; k < (is_row ? HALO_W : HALO_H); k += pixels) copy(is_row ? at : k, is_row ? k : at);
    }
  }
  DEVICE bool at_border(int y0, int x0) const {
    return PAD && (y0 < 0 || x0 < 0 || y0 + HALO_H > height || x0 + HALO_W > width);
  }
  DEVICE void fetch_weights(int i) const {
    barrier_expect(weights_full + 8 * i, WEIGHT_BYTES);
    bulk_copy(weight_base + i * WEIGHT_BYTES, weights_of(i), WEIGHT_BYTES, weights_full + 8 * i);
  }
  // Of one thread: the first copies. The copy engine works in order: slots and weights alternate, or the first tile
  // would wait for all weights.
  DEVICE void fetch_first() const {
    prefetch(map);
    if (!STREAMED) fetch_weights(0);
    wait_for_previous();
    for (int i = 0; i < (DEPTH > SLOTS ? DEPTH : SLOTS); i++) {
      if (i < SLOTS && i < total) fetch(i, tile_at(i / DEPTH));
      if (!STREAMED && i + 1 < DEPTH) fetch_weights(i + 1);
    }
  }

  // The warpgroup that prepares slots, where the input is finished already: one warp fetches, one mirrors.
  DEVICE void pass_on(int warp, int lane) const {
    if (warp == 0) {
      if (lane == 0) {
        fetch_first();
#pragma unroll 1
        for (int use = SLOTS; use < total; use++) {
          barrier_wait(empty + 8 * (use % SLOTS), (use / SLOTS - 1) & 1);
          fetch(use, tile_at(use / DEPTH));
        }
      }
    } else if (warp == 1) {
#pragma unroll 1
      for (int use = 0; use < total; use++) {
        const Tile tile = tile_at(use / DEPTH);
        const int y0 = tile.y * STRIDE + origin_y, x0 = tile.x * STRIDE + origin_x;
        barrier_wait(raw + 8 * (use % SLOTS), use / SLOTS & 1);
        if (at_border(y0, x0)) {
          mirror(slot_of(use), y0, x0, lane / CHUNKS, 32 / CHUNKS, lane % CHUNKS);
          async_fence();
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(full + 8 * (use % SLOTS));
      }
    }
  }

  // The same where it is not: all of its threads normalise and activate, then mirror the border. The warpgroups that
  // multiply refill the slots.
  DEVICE void finish(const Norm& norm, const Activation& activation, int images, int thread, int lane) const {
    if (thread == 0) fetch_first();
    __syncwarp();
    // A thread has the same chunk of channels of every pixel it touches.
    const int first_pixel = thread / CHUNKS, chunk = swizzled(first_pixel, thread % CHUNKS);
    wait_for_previous();
    int image = -1;
    Affine coming = {0.f, 0.f};  // of this thread's first channel, loaded a tile before its image's first slot
    auto affine_of = [&](int image, int c) { return c < CHANNELS ? norm.at(image, c) : Affine{0.f, 0.f}; };
    if (tiles > 0) coming = affine_of(tile_at(0).image, thread);
#pragma unroll 1
    for (int use = 0; use < total; use++) {
      const Tile tile = tile_at(use / DEPTH);
      const int channel = use % DEPTH * SLOT_CHANNELS + chunk * CHUNK_CHANNELS;
      const int y0 = tile.y * STRIDE + origin_y, x0 = tile.x * STRIDE + origin_x;
      const u32 slot = slot_of(use);
      if (tile.image != image) {
        image = tile.image;
        named_barrier(1, 128);
        for (int c = thread; c < DEPTH * SLOT_CHANNELS; c += 128) {
          const Affine affine = c < 128 ? coming : affine_of(image, c);
          store_shared(affines + c * 8, affine.scale, affine.shift);
        }
        named_barrier(1, 128);
      }
      if (use % DEPTH == 0 && images > 1) {
        const int next = tile_at(min(use / DEPTH + 1, tiles - 1)).image;
        if (next != image) coming = affine_of(next, thread);
      }
      Affine affine[CHUNK_CHANNELS];
#pragma unroll
      for (int i = 0; i < CHUNK_CHANNELS / 2; i++) {
        const uint4 two = load_shared(affines + channel * 8 + i * 16);
        affine[2 * i] = {__uint_as_float(two.x), __uint_as_float(two.y)};
        affine[2 * i + 1] = {__uint_as_float(two.z), __uint_as_float(two.w)};
      }
      barrier_wait(raw + 8 * (use % SLOTS), use / SLOTS & 1);
#pragma unroll 1  // every instruction of a kernel that just began comes from the L2 cache
      for (int plane = 0; plane < PLANES; plane++) {
        const u32 offset = plane * PLANE_BYTES + thread * 16;
#pragma unroll
        for (int begin = 0; begin < UNITS; begin += BATCH) {
          uint4 v[BATCH];
#pragma unroll
          for (int i = begin; i < begin + BATCH && i < UNITS; i++)
            if ((i + 1) * 128 <= PLANE_PIXELS * CHUNKS || thread + i * 128 < PLANE_PIXELS * CHUNKS)
              v[i - begin] = load_shared(slot + offset + i * 2048);
#pragma unroll
          for (int i = begin; i < begin + BATCH && i < UNITS; i++)
            if ((i + 1) * 128 <= PLANE_PIXELS * CHUNKS || thread + i * 128 < PLANE_PIXELS * CHUNKS)
              store_shared(slot + offset + i * 2048, finished_chunk<ACTIVATION>(v[i - begin], affine, activation));
        }
      }
      if (at_border(y0, x0)) {
        named_barrier(1, 128);
        mirror(slot, y0, x0, first_pixel, 128 / CHUNKS, chunk);
      }
      async_fence();
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8 * (use % SLOTS));
    }
  }
};
