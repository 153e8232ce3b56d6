// A convolution on the tensor cores of compute capability 9.0 that finishes its producer's norm on the way in
// and takes the statistics of its own output on the way out:
//
//   z   = act((x - mean) / sqrt(variance + eps) * weight + bias)
//   out = conv(pad(z)),  or conv3x3(pad1(upsample_nearest2(z))) in its sub-pixel form
//
// Pictures are channels_last. The product has output channels as its 64 rows (a block of the grid keeps one
// such row block) and the 32 x 8 pixels of a tile as its 256 columns: reading 80 bytes of shared memory a clock,
// it leaves room for the copies around it.
//  * A tile's input with its halo comes in slots of SLOT_CHANNELS channels, raw, by tensor copies into a ring. With
//    stride 2 a slot has four planes, the pixels of even and odd rows and columns: a tap is always a start address.
//  * One warpgroup prepares the slots: it normalises and activates in place, and mirrors the border.
//  * Two warpgroups multiply in turns, so that one stores its tile while the other multiplies.
//  * Weights stay in shared memory for the whole (persistent) block where they fit; else (STREAMED) they
//    come with the slots.
//  * A 3x3 convolution of a picture enlarged by 2 sees only 2x2 source pixels: one 2x2 convolution for
//    each parity (p, q) of the output's row and column, with weights summed beforehand (4/9 of the products). Row block
//    (p, q) reads from source pixel (y - 1 + p, x - 1 + q). Where several q (or p) share a row block, they share the
//    window (x - 1, x) instead and write the columns 2x and 2x - 1, over one window more.
//  * A transposed convolution of stride 2 with up to 4x4 taps, cut to twice the picture, sees the same 2x2 pixels: it
//    is this form with zeros around the source, and with weights of another packing.
//  * QUANTIZED, a finished input and the weights are 8-bit integers, the sums exact. Each row of the product has a
//    scale of its own, behind the weights, which times `input_scale` is what a sum is multiplied by. Integers have no
//    NaN: where a mean or a variance of the input's norm is not finite, so is all of that image's output.
//
// Constants: DTYPE, PARAMETER, CHANNELS (in), OUT_CHANNELS, KERNEL_H, KERNEL_W, STRIDE (1, 2), SUBPIXEL, PAD (0 none,
// 1 zeros, 2 reflect, 3 replicate; of the source when SUBPIXEL), SLOT_CHANNELS (16, 32; of float32 8, 16; of 8 bits 32,
// 64), SLOTS, STREAMED, QUANTIZED (of wgmma.cuh), TRANSFORM (0 where the input is finished), ACTIVATION (of
// activation.cuh: one of its first few), STATISTICS, BIAS, OUTPUT_ACTIVATION.
#define MMA_N 256
#define WIDE_STRIDE (STRIDE == 2 && PIXEL_BYTES == 64)  // needs more registers to prepare its slots
#include "activation.cuh"
#include "channel_sums.cuh"
#include "halo_input.cuh"
#include "halo_tile.cuh"

#if QUANTIZED
#define INPUT_SCALE , float input_scale
#else
#define INPUT_SCALE
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
    halo_conv(const __grid_constant__ TensorMap map, const __grid_constant__ OutMaps out_maps,
              const unsigned char* __restrict__ weights, const float* mean, const float* variance,
              const parameter* norm_weight, const parameter* norm_bias, float eps, i64 image_stride, i64 weight_stride,
              i64 bias_stride, Activation activation, Activation output_activation, element* out, const element* bias,
              SumsWorkspace* workspace, float* out_mean, float* out_variance, int images, int height, int width,
              int out_height, int out_width, int top, int left, int tiles_x, int tiles_per_image, u64 line_reciprocal,
              u64 image_reciprocal INPUT_SCALE) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 stages = shared_address(shared), slots = stages + 4 * STAGE_BYTES, weight_base = slots + SLOTS * SLOT_BYTES;
  const u32 affines = weight_base + (STREAMED ? 0 : DEPTH * WEIGHT_BYTES);
  const u32 barriers = affines + DEPTH * SLOT_CHANNELS * 8;
  const u32 raw = barriers, full = raw + 8 * SLOTS, empty = full + 8 * SLOTS, weights_full = empty + 8 * SLOTS;
  const u32 order = weights_full + 8 * DEPTH, counts = order + 8;
  const int group = of_warp(threadIdx.x >> 7), thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp = thread >> 5;
  const int row_block = blockIdx.x % ROW_BLOCKS, worker = blockIdx.x / ROW_BLOCKS, workers = gridDim.x / ROW_BLOCKS;
  // Of one picture, tiles in turn with the other blocks: halos that neighbours share are in L2. Of several, a range of
  // tiles: another image has another norm, and statistics of its own to add up.
  const bool ranges = images > 1;
  const i64 all_tiles = images * tiles_per_image;
  const int first = ranges ? (int)(all_tiles * worker / workers) : worker, step = ranges ? 1 : workers;
  const int end = (int)(ranges ? all_tiles * (worker + 1) / workers : all_tiles);
  const int tiles = (end - first + step - 1) / step, total = tiles * DEPTH;
  // Where this row block's taps start in the source.
  const int parity = row_block * 64 / PHASE_ROWS;
  const int origin_y = (SUBPIXEL && !SHARED_Y ? parity >> 1 : 0) - top,
            origin_x = (SUBPIXEL && !SHARED_X ? parity & 1 : 0) - left;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(raw + 8 * i, 1), barrier_init(full + 8 * i, TRANSFORM ? 4 : 1), barrier_init(empty + 8 * i, 4);
    }
    for (int i = 0; i < DEPTH; i++) barrier_init(weights_full + 8 * i, 1);
    barrier_init(order, 4);
    store_shared_word(counts + 8, tiles);
    barrier_init_fence();
  }
  __syncthreads();
  launch_dependents();

  const Input input = {map, weights, slots, weight_base, affines, raw, full, empty, weights_full, row_block, origin_y,
                       origin_x, first, step, tiles, total, tiles_x, tiles_per_image, line_reciprocal,
                       image_reciprocal, height, width};
  const Norm norm = {mean,         variance,      norm_weight, norm_bias, eps,
                     image_stride, weight_stride, bias_stride};

  if (group == 2) {  // the warpgroup that prepares slots
    give_registers_back<WIDE_STRIDE ? 152 : 120>();
    if (!TRANSFORM) input.pass_on(warp, lane);
    else input.finish(norm, activation, images, thread, lane);
    if (!STREAMED && thread == 0)  // no exit with a copy under way
      for (int i = 0; i < DEPTH; i++) barrier_wait(weights_full + 8 * i, 0);
  } else {                  // two warpgroups that multiply, a tile each in turn
    // 128 x 120 + 256 x 192, or 152 and 176, is what 384 threads are launched with.
    take_registers<WIDE_STRIDE ? 176 : 192>();
    Sum d[MMA_N / 2];
    // A lane's two rows of the product are output channels channel and channel + 8.
    const int row = row_block * 64 + warp * 16, phase = row / PHASE_ROWS, channel0 = row % PHASE_ROWS;
    const int channel = channel0 + (lane >> 2);
    const int shift_y = SUBPIXEL ? (SHARED_Y ? -(phase >> 1) : phase >> 1) : 0,
              shift_x = SUBPIXEL ? (SHARED_X ? -(phase & 1) : phase & 1) : 0;
    QuadSums statistics = {};
    int image = -1;
    float add[2] = {0.f, 0.f};
    if (BIAS) {
      wait_for_previous();
      for (int i = 0; i < 2; i++)
        if (channel + 8 * i < OUT_CHANNELS) add[i] = to_float<DTYPE>(bias[channel + 8 * i]);
    }
#if QUANTIZED
    float unit[2];  // of this lane's two rows
    wait_for_previous();
    auto take_unit = [&](int image) {
      u32 finite = 1;
      for (int c = thread; c < CHANNELS; c += 128) {
        const i64 at = image * image_stride + c;
        finite &= fabsf(mean[at]) + fabsf(variance[at]) < __int_as_float(0x7f800000);
      }
      finite = all_of(2 + group, 128, finite);
      const float* scales = reinterpret_cast<const float*>(weights + (i64)ROW_BLOCKS * DEPTH * WEIGHT_BYTES);
      for (int k = 0; k < 2; k++)
        unit[k] = finite ? scales[row + (lane >> 2) + 8 * k] * input_scale : __int_as_float(0x7fffffff);
    };
    auto sum = [&](int i) { return __int2float_rn(d[i]) * unit[i >> 1 & 1]; };
#else
    auto sum = [&](int i) { return d[i]; };
#endif
    // Registers are scarce: the block's number of tiles is in shared memory, and what follows too.
    // Of the first thread: tiles of the image that this warpgroup has added.
    auto counted = [&](int more) {
      if (thread != 0) return 0u;
      const u32 at = counts + 4 * group, before = load_shared_word(at);
      store_shared_word(at, more < 0 ? 0 : before + more);
      return before;
    };
    counted(-1);
    auto flush = [&]() {
      const i64 before = (i64)image * OUT_CHANNELS;
      int rows = out_height;
      asm volatile("" : "+r"(rows));  // or the division is done beforehand, and takes two registers from the products
      if (image < 0) return;
      const i64 channels = (i64)images * OUT_CHANNELS;
      statistics.flush(workspace, worker % COPIES, channels, before + channel, 8, before + OUT_CHANNELS,
                       1.0 / ((double)rows * out_width));
      // Whoever adds the last tile of an image turns the totals of the channels that share a row block into statistics.
      constexpr int kGroups = PHASE_ROWS < 64 ? 1 : PHASE_ROWS / 64;
      const int together = row_block % kGroups, own = together * 64 + thread;
      const u32 whole = ROW_BLOCKS / kGroups * tiles_per_image;
      if (completes(workspace->count(channels, before + together), counted(-1), whole, thread, 128, 2 + group) &&
          thread < 64 && own < OUT_CHANNELS) {
        load_total(workspace, channels, before + own, out_mean[before + own], out_variance[before + own]);
        clear_total(workspace, channels, before + own);
      }
    };
#pragma unroll 1
    for (int j = group; j < (int)load_shared_word(counts + 8); j += 2) {
      auto release = [&](int use, const Tile& next) {  // its slot has been read: warp 0 refills it, with part of `next`
        if (lane == 0) {
          barrier_arrive(empty + 8 * (use % SLOTS));
          // With four planes to a slot registers are scarcer still.
          const int uses = STRIDE == 1 ? total : (int)load_shared_word(counts + 8) * DEPTH;
          if (TRANSFORM && warp % 4 == 0 && use + SLOTS < uses) {
            barrier_wait(empty + 8 * (use % SLOTS), use / SLOTS & 1);
            input.fetch(use + SLOTS, next);
          }
        }
        __syncwarp();
      };
#if QUANTIZED
      if (const int next_image = input.tile_at(j).image; next_image != image) take_unit(next_image);
#endif
      if (j > 0) barrier_wait(order, (j - 1) & 1);  // the other warpgroup has issued all products of tile j - 1
      int use = j * DEPTH;
#pragma unroll 1
      for (int depth = 0; depth < DEPTH; depth++, use++) {
        const Tile next = input.tile_at((use - 1 + SLOTS) / DEPTH);  // found before there is any hurry
        if (!STREAMED && j == group) barrier_wait(weights_full + 8 * depth, 0);
        barrier_wait(full + 8 * (use % SLOTS), use / SLOTS & 1);
        const u32 slot = input.slot_of(use);
        const u64 a = descriptor(STREAMED ? slot + SLOT_BYTES - WEIGHT_BYTES : weight_base + depth * WEIGHT_BYTES, 1024,
                                 128, SWIZZLE_NONE);
        const u64 b = descriptor(slot, 16, PLANE_H * PIXEL_BYTES, SWIZZLE);
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
          const int k = m / TAPS, tap = m % TAPS, dx = tap % TAPS_X, dy = tap / TAPS_X;
          const int plane = dy % STRIDE * STRIDE + dx % STRIDE, pixel = dx / STRIDE * PLANE_H + dy / STRIDE;
          multiply(d, a + (u64)((tap * 64 * PIXEL_BYTES + k * 2048) >> 4),
                   b + (u64)((plane * PLANE_BYTES + pixel * PIXEL_BYTES + k * 32) >> 4), (depth | m) != 0);
          if (m == EARLY - 1) {
            wgmma_commit();
            if (depth > 0) {
              wgmma_wait<1>();
              release(use - 1, next);
            }
            wgmma_fence();
          }
        }
        wgmma_commit();
      }
      if (lane == 0) barrier_arrive(order);
      const Tile tile = input.tile_at(j), next = input.tile_at((use - 1 + SLOTS) / DEPTH);
      wgmma_wait<0>();
      release(use - 1, next);
      // Two neighbouring accumulators, of one channel, as they are written.
      auto finished = [&](int i) {
        const float bias_i = add[i >> 1 & 1];
        const float a = BIAS ? sum(i) + bias_i : sum(i), b = BIAS ? sum(i + 1) + bias_i : sum(i + 1);
        if (OUTPUT_ACTIVATION == RECTIFIED) return rounded_relu(a, b);
        return rounded(activate_and_scale<OUTPUT_ACTIVATION>(a, output_activation),
                       activate_and_scale<OUTPUT_ACTIVATION>(b, output_activation));
      };
      if (STATISTICS && tile.image != image) {
        flush();
        image = tile.image;
        // The pivot is the tile's first pixel that is written: the second where the first window is the other parity's.
        const bool next_x = SHARED_X && tile.x == 0, next_y = SHARED_Y && tile.y == 0;
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const Pair pair = next_x ? finished(4 + 2 * k) : finished(2 * k);
          statistics.sums[k].start(__shfl_sync(~0u, next_y ? high(pair) : low(pair), lane & ~3));
        }
      }
      counted(1);
      if (tile.y >= SHARED_Y && tile.x >= SHARED_X && (tile.y + TILE_H) * ZOOM <= out_height &&
          (tile.x + TILE_W) * ZOOM <= out_width) {
        // The block of the stage that has this warp's channels, and the first of their chunks.
        const int block = warp * 16 / STORED_CHANNELS * (STAGE_BYTES / STORES);
        const int chunk = warp * 16 % STORED_CHANNELS / CHUNK_CHANNELS;
#pragma unroll
        for (int round = 0; round < TILE_W / ROUND; round++) {
          const u32 stage = stages + (group * 2 + round % 2) * STAGE_BYTES;
          if (thread == 0) store_wait_read<1>();  // the store before the last one has left this buffer
          named_barrier(2 + group, 128);
#pragma unroll
          for (int g = 0; g < ROUND; g += 2) {
            Pair pairs[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
              pairs[k] = finished(4 * (round * ROUND + g + k / 2) + 2 * (k % 2));
              if (STATISTICS) statistics.sums[k % 2].add(low(pairs[k])), statistics.sums[k % 2].add(high(pairs[k]));
            }
            stage_pairs(stage + block, pairs, g, chunk, lane);
          }
          async_fence();
          named_barrier(2 + group, 128);
          if (thread == 0) {
#pragma unroll
            for (int i = 0; i < STORES; i++) {
              const int which = SUBPIXEL ? parity + i * STORED_CHANNELS / PHASE_ROWS : 0, p = which >> 1, q = which & 1;
              const int to = (row_block * 64 + i * STORED_CHANNELS) % PHASE_ROWS;
              if (STORES == BLOCK_PHASES || to < OUT_CHANNELS)
                tensor_store(out_maps.phase[which], to, tile.y - SHARED_Y * p, tile.x + round * ROUND - SHARED_X * q,
                             tile.image, stage + i * (STAGE_BYTES / STORES));
            }
            store_commit();
          }
        }
        statistics.count += 2 * TILE_W;
      } else {
        // No warp may run ahead to the next tile's barriers, whose phases it could mistake.
        named_barrier(2 + group, 128);
        const int quad = lane & 3, line = lane >> 2;
        // In each thread's own registers: the compiler would compare a warp's at once for all columns, and then spill.
        const int out_y = of_thread(tile.y * ZOOM + shift_y, lane), out_x = of_thread(tile.x * ZOOM + shift_x, lane);
        // Of 16 bits a pixel's channels are brought together first; of 32 eight lanes have a whole sector of them.
        const int first_line = DTYPE == 0 ? 2 * quad : line, first_channel = DTYPE == 0 ? line : 2 * quad;
        element* to = out + channel0 + first_channel +
                      (((i64)tile.image * out_height + out_y + first_line * ZOOM) * out_width + out_x) * OUT_CHANNELS;
        const bool counts0 = (u32)(out_y + 2 * quad * ZOOM) < (u32)out_height,
                   counts1 = (u32)(out_y + (2 * quad + 1) * ZOOM) < (u32)out_height;
#pragma unroll
        for (int g = 0; g < TILE_W; g++, to += ZOOM * OUT_CHANNELS) {
          const bool inside = (u32)(out_x + g * ZOOM) < (u32)out_width;
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const Pair pair = finished(4 * g + 2 * k);
            if (STATISTICS)
              statistics.sums[k].add(low(pair), inside && counts0),
                  statistics.sums[k].add(high(pair), inside && counts1);
#if DTYPE == 0
            const bool counts = inside && channel0 + 8 * k < OUT_CHANNELS;
            if (counts && counts0) to[8 * k] = low(pair);
            if (counts && counts1) to[8 * k + ZOOM * out_width * OUT_CHANNELS] = high(pair);
#else
            const bool stored = (u32)(out_y + line * ZOOM) < (u32)out_height;
            const u32 two = transpose_8x8(pair);
            if (stored && inside && channel0 + 8 * k < OUT_CHANNELS) *reinterpret_cast<u32*>(to + 8 * k) = two;
#endif
          }
          if (inside) statistics.count += (counts0 ? 1 : 0) + (counts1 ? 1 : 0);
        }
      }
    }
    if (STATISTICS) flush();
    if (thread == 0) store_wait<0>();
  }
}
