// All residual blocks of a style network in one cooperative launch, for pictures of one tile a block:
//
//   z = norm(x) (with ReLU);  every block: r = conv(pad(relu(norm(conv(pad(z)))))), z = norm(r) + z
//
// with 3x3 convolutions, reflection padding by 1 and instance norms whose statistics the kernel takes itself. The last
// r leaves raw, with its mean and variance, and beside it the z that is still to be added to it.
//
// A block keeps its tile of 8 x 16 pixels on chip throughout. Two tiles with halo lie in shared memory: z, and what
// is between a block's two convolutions (of float32 one, see residual_pixels.cuh). The product has output channels as
// its rows and pixels as its columns; its sums stay in registers until all blocks have met, once a layer: by then every
// block has added its sums of each channel to the totals and published the raw pixels that its neighbours' halos need.
// After that it turns the totals into a scale and a shift, finishes its own pixels out of its registers and its halo
// out of the published ones, both straight into the other tile (z is added to where it lies), and multiplies again.
//
// Weights stream through a ring in shared memory, ahead of the products, also over the meetings.
//
// Constants: DTYPE (0: multiplied in TF32), PARAMETER, CHANNELS (64, 128), RELU (of x's norm), STAGES of the ring.
#define MMA_N 128
#define COPIES 1  // of the totals: a block has one tile, so few blocks add to them
// All blocks add at once, and then all read: neighbours would wait for one part of the L2 cache.
#define SECTOR_STRIDE 64
#include "channel_sums.cuh"
#include "residual_pixels.cuh"

// Wait until `expected` blocks have arrived. What threads of the block wrote before its last barrier is seen by the
// others afterwards.
DEVICE void meet(u32* arrivals, u32 expected) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
  u32 arrived;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(arrivals) : "memory");
  } while (arrived < expected);
}

DEVICE Affine affine_at(const unsigned char* shared, int channel) {
  return *reinterpret_cast<const Affine*>(shared + AFFINES + channel * 8);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    residual_trunk(const __grid_constant__ Layers layers, const element* x, const float* mean, const float* variance,
                   const parameter* norm_weight, const parameter* norm_bias, float eps, float inner_eps,
                   element* exchange, element* out, element* z, SumsWorkspace* workspace, float* out_mean,
                   float* out_variance, int depth, int height, int width, int tiles_x) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = shared_address(shared), ring = base + RING, affines = base + AFFINES;
  const u32 full = base + BARRIERS, empty = full + 8 * STAGES;
  const int group = of_warp(threadIdx.x >> 7), thread = threadIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Tile tile(blockIdx.x, tiles_x, height, width);
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++)
      barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, CONSUMERS / 32);
    barrier_init_fence();
  }
  __syncthreads();
  // Not the other way round: blocks that wait for each other may not begin while others still hold their places.
  launch_dependents();

  if (group == GROUPS) {
    if (GROUPS == 2) give_registers_back<DTYPE == 0 ? 24 : 40>();
    if (thread == CONSUMERS) {  // fetches the weights
#pragma unroll 1
      for (int use = 0; use < depth * LAYER_STAGES; use++) {
        const int layer = use / LAYER_STAGES, slot = use % STAGES;
        const unsigned char* from = layers.at[layer].weights + use % LAYER_STAGES * STAGE_BYTES;
        if (use >= STAGES) barrier_wait(empty + 8 * slot, use / STAGES - 1 & 1);
        barrier_expect(full + 8 * slot, STAGE_BYTES);
        bulk_copy(ring + slot * STAGE_BYTES, from, STAGE_BYTES, full + 8 * slot);
      }
    } else if (DTYPE != 0 && warp > CONSUMERS / 32) {  // three warps write the last z, while the others multiply
      named_barrier(2, CONSUMERS + 96);
      for (int i = thread - CONSUMERS - 32; i < TILE_H * TILE_W * CHUNKS; i += 96) {
        const int chunk = i % CHUNKS, column = i / CHUNKS % TILE_W, row = i / CHUNKS / TILE_W;
        if (!tile.has(row, column)) continue;
        element* to = z + ((tile.y + row) * width + tile.x + column) * CHANNELS + chunk * CHUNK_CHANNELS;
        *reinterpret_cast<uint4*>(to) = load_shared(base + offset_in_tile(row + 1, column + 1, chunk));
      }
    }
    __syncwarp();
  } else {
    // 128 x 40 + 256 x 232, or 128 x 24 + 256 x 240: what 384 threads are launched with.
    if (GROUPS == 2) take_registers<DTYPE == 0 ? 240 : 232>();
    // Two of this thread's accumulators belong to neighbouring rows of one column of the tile, all to one of two
    // channels: `channel` and the eighth after it.
    const int quad = lane & 3, channel = warp * 16 + (lane >> 2);
    OwnPixels own(tile, warp, lane);
    const bool whole = tile.rows == TILE_H && tile.columns == TILE_W;
    const u32 all_totals = 3 * CHANNELS;  // one set each for this layer, the one before and the next
    const double per_pixel = 1.0 / ((double)height * width);

    // This thread's chunk of channels of the halo, in the picture and in a tile.
    const int chunk = thread % CHUNKS;
    const u32 z_halo = base + Z_HALO + thread * 16;  // of float32: where it keeps z of the first of them
    int from[THREAD_CELLS];
    u32 to[THREAD_CELLS];
#pragma unroll
    for (int i = 0; i < THREAD_CELLS; i++) {
      int row, column;
      halo_cell((thread + i * CONSUMERS) / CHUNKS, tile.rows, tile.columns, row, column);
      const bool any = (i + 1) * CONSUMERS <= HALO_CELLS * CHUNKS || thread + i * CONSUMERS < HALO_CELLS * CHUNKS;
      from[i] = any ? tile.offset_in_picture(row, column, chunk) : -1;
      to[i] = offset_in_tile(row, column, chunk);
    }

    // z = norm(x), with its halo.
    if (thread < CHANNELS) {
      const Affine affine = Norm{mean, variance, norm_weight, norm_bias, eps, 0, 0, 0}.at(0, thread);
      store_shared(affines + thread * 8, affine.scale, affine.shift);
    }
    named_barrier(1, CONSUMERS);
    {
      Affine affine[CHUNK_CHANNELS];
      load_affines(affines + chunk * CHUNK_CHANNELS * 8, affine);
      constexpr int kBatch = 6;
#pragma unroll 1
      for (int begin = thread / CHUNKS; begin < CELLS; begin += kBatch * CONSUMERS / CHUNKS) {
        uint4 v[kBatch];
        int at[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int cell = begin + i * (CONSUMERS / CHUNKS);
          at[i] = cell < CELLS ? tile.offset_in_picture(cell % PLANE_H, cell / PLANE_H, chunk) : -1;
          if (at[i] >= 0) v[i] = *reinterpret_cast<const uint4*>(x + at[i]);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int cell = begin + i * (CONSUMERS / CHUNKS);
          if (at[i] >= 0)
            store_shared(base + offset_in_tile(cell % PLANE_H, cell / PLANE_H, chunk),
                         operand(finished<RELU, false>(v[i], affine, v[i])));
        }
      }
#if DTYPE == 0
#pragma unroll
      for (int i = 0; i < THREAD_CELLS; i++)
        if (from[i] >= 0) {
          const uint4 raw = *reinterpret_cast<const uint4*>(x + from[i]);
          store_shared(z_halo + i * CONSUMERS * 16, finished<RELU, false>(raw, affine, raw));
        }
      const Affine two[2] = {affine_at(shared, channel), affine_at(shared, channel + 8)};
      own.begin(x, two);
#endif
    }

#pragma unroll 1
    for (int layer = 0; layer < depth; layer++) {
      const bool second = layer & 1, last = layer == depth - 1;  // of its block's two, of all
      async_fence();
      named_barrier(1, CONSUMERS);
#if DTYPE == 0
      if (layer == depth - 2) own.publish(own.z, z, true);
#else
      if (layer == depth - 2) named_barrier_arrive(2, CONSUMERS + 96);
#endif
#if DTYPE == 0
      float d[MMA_N / 2] = {};  // else the loop wants more registers
#else
      float d[MMA_N / 2];
#endif
      const u64 pixels = descriptor(base + (second ? BETWEEN : 0), 16, PLANE_H * PIXEL_BYTES, SWIZZLE_64);
      const u64 weights = descriptor(ring + group * 2048, 1024, 128, SWIZZLE_NONE);
      auto release = [&](int use) {
        if (lane == 0) barrier_arrive(empty + 8 * (use % STAGES));
        __syncwarp();
      };
#pragma unroll 1
      for (int part = 0; part < LAYER_STAGES / PART_STAGES; part++) {
#pragma unroll
        for (int stage = 0; stage < PART_STAGES; stage++) {
          const int use = layer * LAYER_STAGES + part * PART_STAGES + stage;
          barrier_wait(full + 8 * (use % STAGES), use / STAGES & 1);
          const u64 a = weights + (u64)(use % STAGES * STAGE_BYTES >> 4);
          const u64 b = pixels + (u64)(part * 2 * PLANE_BYTES >> 4);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < STAGE_STEPS; i++) {
            const int step = stage * STAGE_STEPS + i, plane = step / 18, k = step % 18 / 9, tap = step % 9;
            const int pixel = tap % 3 * PLANE_H + tap / 3;
            multiply(d, a + (u64)(i * STEP_BYTES >> 4),
                     b + (u64)((plane * PLANE_BYTES + pixel * PIXEL_BYTES + k * 32) >> 4), part || step);
          }
          wgmma_commit();
          if (part || stage) {
            wgmma_wait<1>();
            release(use - 1);
          }
        }
      }
      wgmma_wait<0>();
      release(layer * LAYER_STAGES + LAYER_STAGES - 1);

      RawPixels raw;
#pragma unroll
      for (int i = 0; i < MMA_N / 4; i++) raw[i / 2][i % 2] = rounded(d[2 * i], d[2 * i + 1]);

      // First what travels longest: the totals, then the pixels that others need.
      QuadSums statistics = {};
#pragma unroll
      for (int k = 0; k < 2; k++) statistics.sums[k].start(__shfl_sync(~0u, low(raw[0][k]), lane & ~3));
      if (whole) {
#pragma unroll
        for (int i = 0; i < MMA_N / 4; i++)
          statistics.sums[i % 2].add(low(raw[i / 2][i % 2])), statistics.sums[i % 2].add(high(raw[i / 2][i % 2]));
        statistics.count = 2 * TILE_W;
      } else {
        const bool first_row = 2 * quad < tile.rows, second_row = 2 * quad + 1 < tile.rows;
#pragma unroll
        for (int i = 0; i < MMA_N / 4; i++) {
          const bool column = i / 2 < tile.columns;
          statistics.sums[i % 2].add(low(raw[i / 2][i % 2]), column && first_row);
          statistics.sums[i % 2].add(high(raw[i / 2][i % 2]), column && second_row);
        }
        statistics.count = tile.columns * (first_row + second_row);
      }
      const int totals = layer % 3 * CHANNELS;
      statistics.flush(workspace, 0, all_totals, totals + channel, 8, all_totals, per_pixel);

      element* published = (second ? out : exchange);  // `out` until the last layer writes it
      own.publish(raw, published, last);

      if (last) break;

      float scale = 1.f, shift = 0.f;  // of the norm, before its statistics
      if (thread < CHANNELS) {
        scale = to_float<PARAMETER>(layers.at[layer].norm_weight[thread]);
        shift = to_float<PARAMETER>(layers.at[layer].norm_bias[thread]);
      }
      named_barrier(1, CONSUMERS);
      if (thread == 0) meet(&workspace->arrivals, (layer + 1) * gridDim.x);
      named_barrier(1, CONSUMERS);
      uint4 v[THREAD_CELLS];
#pragma unroll
      for (int i = 0; i < THREAD_CELLS; i++)
        if (from[i] >= 0) v[i] = __ldcg(reinterpret_cast<const uint4*>(published + from[i]));
      if (thread < CHANNELS) {
        float m, s;
        load_total(workspace, all_totals, totals + thread, m, s);
        const Affine affine = affine_of(m, s, inner_eps, scale, shift);
        store_shared(affines + thread * 8, affine.scale, affine.shift);
        // Read by all before they came to this meeting, added to again after the next one.
        if (blockIdx.x == 0 && layer > 0) clear_total(workspace, all_totals, (layer - 1) % 3 * CHANNELS + thread);
      }
      named_barrier(1, CONSUMERS);
      const u32 into = base + (second ? 0 : BETWEEN);
      const Affine two[2] = {affine_at(shared, channel), affine_at(shared, channel + 8)};
      if (second) own.finish<true>(raw, two, into, base + DUMP);
      else own.finish<false>(raw, two, into, base + DUMP);
      Affine affine[CHUNK_CHANNELS];
      load_affines(affines + chunk * CHUNK_CHANNELS * 8, affine);
#pragma unroll
      for (int i = 0; i < THREAD_CELLS; i++)
        if (from[i] >= 0) {
          const u32 at = into + to[i], kept = DTYPE == 0 ? z_halo + i * CONSUMERS * 16 : at;
          const uint4 pixel = second ? finished<false, true>(v[i], affine, load_shared(kept))
                                     : finished<true, false>(v[i], affine, v[i]);
          if (DTYPE == 0 && second) store_shared(kept, pixel);
          store_shared(at, operand(pixel));
        }
    }

    if (completes(&workspace->tickets, 1, gridDim.x, thread, CONSUMERS, 1)) {
      if (thread < CHANNELS) {
        load_total(workspace, all_totals, (depth - 1) % 3 * CHANNELS + thread, out_mean[thread], out_variance[thread]);
        for (int i = 0; i < 3; i++) clear_total(workspace, all_totals, i * CHANNELS + thread);
      }
      if (thread == 0) workspace->arrivals = 0;
    }
  }
}
