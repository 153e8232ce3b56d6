// A convolution of any shape on the tensor cores of compute capability 8.0 and later, that finishes its producer's norm
// on the way in and takes the statistics of its own output on the way out:
//
//   z   = act((x - mean) / sqrt(variance + eps) * weight + bias) (+ residual),  written to `kept` if asked for
//   out = act(conv(pad(upsample_nearest(z))) + bias)
//
// The product's rows are 16 pixels of a row of the output, its columns 8 output channels, its depth 16 input channels
// of one tap (of fewer channels, several taps of a row).
//  * A tile's input, enlarged and padded by an index map that is made once a tile, comes with its halo in chunks of
//    CHUNK channels, through registers, where it is finished. The next chunk's loads are under way while one is
//    multiplied.
//  * A tap is another start address in the chunk, so a stride costs nothing. Taps of one column are taken in an order
//    in which a warp's rows of pixels move up by one: each is loaded once.
//  * Weights come in the order of the products' registers, in stages of COLUMNS columns of taps, through a ring that
//    cp.async fills, or stay in shared memory for the whole of a persistent block (STAGES 0).
//  * Results leave by rows of 16 pixels, through shared memory of the warp's own.
//
// Constants: DTYPE, PARAMETER, CHANNELS (in), OUT_CHANNELS, KERNEL_H, KERNEL_W, STRIDE_Y, STRIDE_X, UPSAMPLE, PAD (0
// none, 1 zeros, 2 reflect, 3 replicate), VECTOR (channels a load takes of a channels_last picture; 1 of any other),
// PLANAR (the input is contiguous: neighbouring threads load neighbouring pixels), OUT_PLANAR, OUT_VECTOR (elements a
// store takes), RELU, RESIDUAL, KEEP (strides 1), TRANSFORM (0 where the input is finished), STATISTICS, BIAS,
// OUTPUT_RELU; and how it is cut: CHUNK (4, 8, 16, 32), ROWS (of a warp), WARPS_M, WARPS_N, TILES_N (products side by
// side in a warp, up to 4), COLUMNS (1 or all), STAGES, BLOCKS (of a multiprocessor).
#include "dependent_launch.cuh"
#include "mma_tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    mma_conv(const element* __restrict__ x, const element* __restrict__ residual,
             const unsigned char* __restrict__ weights, const float* mean, const float* variance,
             const parameter* norm_weight, const parameter* norm_bias, float eps, i64 image_stride, i64 weight_stride,
             i64 bias_stride, element* kept, element* out, const element* bias, SumsWorkspace* workspace,
             float* out_mean, float* out_variance,
             i64 residual_channel, i64 residual_pixel, double per_pixel, int images, int height, int width,
             int out_height, int out_width, int top, int left, int padded_height, int padded_width, int tiles_x,
             int tiles_per_image) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Shared shared = {memory};
  const int thread = threadIdx.x, lane = thread & 31, warp_m = thread / 32 % WARPS_M, warp_n = thread / (32 * WARPS_M);
  const int channel_block = blockIdx.x % CHANNEL_BLOCKS, worker = blockIdx.x / CHANNEL_BLOCKS;
  const int workers = gridDim.x / CHANNEL_BLOCKS;
  // Of one picture, tiles in turn with the other blocks: halos that neighbours share are in L2. Of several, a range of
  // tiles: another image has another norm, and statistics of its own to add up.
  const i64 all_tiles = (i64)images * tiles_per_image;
  const int first = images > 1 ? (int)(all_tiles * worker / workers) : worker, stride = images > 1 ? 1 : workers;
  const int end = (int)(images > 1 ? all_tiles * (worker + 1) / workers : all_tiles);
  const int tiles = (end - first + stride - 1) / stride;
  const i64 pixels = (i64)height * width, out_pixels = (i64)out_height * out_width;
  const Picture picture = {x, PLANAR ? pixels : 1, PLANAR ? 1 : CHANNELS};
  const Picture more = {residual, residual_channel, residual_pixel};
  const Geometry geometry = {height, width, top, left, padded_height, padded_width, out_height, out_width};
  const Norm norm = {mean,         variance,      norm_weight, norm_bias, eps,
                     image_stride, weight_stride, bias_stride};
  launch_dependents();

  // ---- weights ----
  const int stages = tiles * STEPS;
  auto fetch_weights = [&](int stage) {  // the copies of one stage, in a group of their own
    if (stage < stages) {
      const int thread = thread_index();
      const unsigned char* from = weights + ((i64)channel_block * STEPS + stage % STEPS) * STAGE_BYTES + thread * 16;
      const u32 to = shared_address(memory) + stage % RING * STAGE_BYTES + thread * 16;
#pragma unroll 1
      for (int i = 0; i < STAGE_BYTES; i += THREADS * 16)
        if (i + THREADS * 16 <= STAGE_BYTES || i + thread * 16 < STAGE_BYTES) copy_async(to + i, from + i);
    }
    copy_commit();
  };
  for (int i = 0; i < (RESIDENT ? RING : RING - 1); i++) fetch_weights(i);
  wait_for_previous();

  // ---- the input ----
  // The place of this block's j-th tile, which is tile `number` of all, its index map, and the norm of its image where
  // that of the tile two before it, whose maps lay there, was another.
  auto prepare = [&](int j, int number, int image_before) {
    if (j >= tiles) return;
    const int image = number / tiles_per_image, rest = number - image * tiles_per_image;
    const Tile tile = {image * (CHANNELS * pixels), number, image, rest / tiles_x * TILE_H, rest % tiles_x * TILE_W};
    const int thread = thread_index();
    if (thread == 0) shared.tile(j) = tile;
#pragma unroll 1
    for (int i = thread; i < PIXELS; i += THREADS) shared.table(j)[i] = geometry.entry(tile, i);
    if (TRANSFORM && image != image_before) {
#pragma unroll 1
      for (int c = thread; c < CHUNKS * CHUNK; c += THREADS)
        shared.affines(j)[c] = c < CHANNELS ? norm.at(image, c) : Affine{0.f, 0.f};
    }
  };
  struct Unit {
    Raw raw, more;
    int entry;
  };
  struct Place {
    u32 pixel, channel;  // of the halo; of the chunk
  };
  auto place = [&](int i) {  // of this thread's unit i of a chunk
    const u32 unit = i * THREADS + thread;
    return PLANAR ? Place{unit % PIXELS, unit / PIXELS * UNIT} : Place{unit / PIXEL_UNITS, unit % PIXEL_UNITS * UNIT};
  };
  auto load_unit = [&](Unit& unit, int i, int j, int chunk) {
    const Place at = place(i);
    const bool exists = i * THREADS + thread < UNITS;
    unit.entry = exists ? shared.table(j)[at.pixel] : -1;
    const int channel = chunk * CHUNK + at.channel;
    const i64 pixel = unit.entry >> 1, image = shared.tile(j).offset;
    unit.raw.load(picture, image + pixel * picture.pixel + channel * picture.channel, channel, unit.entry >= 0);
    if (RESIDUAL) unit.more.load(more, image + pixel * more.pixel + channel * more.channel, channel, unit.entry >= 0);
  };
  auto store_unit = [&](const Unit& unit, int i, int j, int chunk, int buffer) {
    if (i * THREADS + thread >= UNITS) return;
    const Place at = place(i);
    const int channel = chunk * CHUNK + at.channel;
    const float4* affines = reinterpret_cast<const float4*>(shared.affines(j) + channel);
    u32 pairs[UNIT / 2];
#pragma unroll
    for (int k = 0; k < UNIT / 2; k++) {
      pairs[k] = unit.raw.pair(k);
      if (TRANSFORM)  // what padding with zeros adds is not transformed
        pairs[k] = unit.entry < 0 ? 0 : finished(affines[k], pairs[k], RESIDUAL ? unit.more.pair(k) : 0);
    }
    unsigned char* to = shared.halo(buffer) + at.pixel * PITCH + at.channel * 2;
    if constexpr (UNIT == 8) *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    else *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
    // The blocks of other output channels read the same input: they share the writing of it.
    if (KEEP && unit.entry >= 0 && (unit.entry & 1) && chunk * CHANNEL_BLOCKS / CHUNKS == channel_block) {
      const i64 pixel = unit.entry >> 1;
      element* keep =
          kept + shared.tile(j).offset + (OUT_PLANAR ? pixel + channel * pixels : pixel * CHANNELS + channel);
      if (!OUT_PLANAR && CHANNELS % 8 == 0 && UNIT == 8) {
        if (channel < CHANNELS) *reinterpret_cast<uint4*>(keep) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      } else {
#pragma unroll
        for (int k = 0; k < UNIT; k++)
          if (channel + k < CHANNELS) keep[OUT_PLANAR ? k * pixels : k] = (element)(pairs[k / 2] >> k % 2 * 16);
      }
    }
  };
  // Units of a thread from `begin` on, all but those that were loaded before.
  auto fill = [&](int begin, int count, int j, int chunk, int buffer) {
#pragma unroll 1
    for (int i = begin; i < begin + count; i += BATCH) {
      Unit units[BATCH];
#pragma unroll
      for (int k = 0; k < BATCH; k++) load_unit(units[k], i + k, j, chunk);
#pragma unroll
      for (int k = 0; k < BATCH; k++) store_unit(units[k], i + k, j, chunk, buffer);
    }
  };

  prepare(0, first, -1);
  prepare(1, first + stride, -1);
  __syncthreads();
  fill(0, STEP_UNITS * X_STEPS, 0, 0, 0);

  if (STATISTICS) *shared.sum(thread) = {};
  int use = 0;
#pragma unroll 1
  for (int j = 0; j < tiles; j++) {
    float d[ROWS][TILES_N][4];
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
      for (int n = 0; n < TILES_N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) d[m][n][i] = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++, use++) {
      const bool last = chunk + 1 == CHUNKS;
      const int buffer = use & 1;
      const int next_j = j + last, next_chunk = last ? 0 : chunk + 1;
      const bool fills = next_j < tiles;
      const unsigned char* stage_weights = nullptr;
#pragma unroll 1
      for (int step = 0; step < X_STEPS; step++) {
        if (COLUMNS == 1 || step == 0) {
          // What comes next was stored, or copied, by all threads, and nobody reads what is overwritten.
          copy_wait<RESIDENT ? 0 : RING - 2>();
          __syncthreads();
          const int stage = COLUMNS == 1 ? use * X_STEPS + step : use;
          stage_weights = memory + stage % RING * STAGE_BYTES + warp_n * (TILES_N * 256);
          stage_weights += lane * (TILES_N % 2 ? 8 : 16);
          if (!RESIDENT) fetch_weights(stage + RING - 1);
        }
        Unit units[BATCH];
        if (fills) {
#pragma unroll
          for (int k = 0; k < BATCH; k++) load_unit(units[k], step * STEP_UNITS + k, next_j, next_chunk);
        }
        const Lane at(thread_index() & 31, step);
        const unsigned char* halo = shared.halo(buffer) + warp_m * ROWS * HALO_W * PITCH;
        const unsigned char* column = stage_weights + (COLUMNS == 1 ? 0 : step) * (DEPTHS * KERNEL_H * PRODUCT_BYTES);
#pragma unroll
        for (int depth = 0; depth < DEPTHS; depth++)
#pragma unroll
          for (int plane = 0; plane < PLANES_Y; plane++) {
            u32 a[ROWS][4];
#pragma unroll
            for (int up = 0; up * STRIDE_Y + plane < KERNEL_H; up++) {
              const int tap = up * STRIDE_Y + plane;
#pragma unroll
              for (int m = 0; m < ROWS; m++) {
                if (up > 0 && m + 1 < ROWS) {
#pragma unroll
                  for (int i = 0; i < 4; i++) a[m][i] = a[m + 1][i];
                } else {
                  at.load(a[m], halo + (plane * PLANE_H + m + up) * (HALO_W * PITCH) + depth * 32);
                }
              }
              const unsigned char* from = column + (depth * KERNEL_H + tap) * PRODUCT_BYTES;
              u32 b[TILES_N][2];
              if constexpr (TILES_N % 2) {
#pragma unroll
                for (int n = 0; n < TILES_N; n++) {
                  const uint2 v = *reinterpret_cast<const uint2*>(from + n * 256);
                  b[n][0] = v.x, b[n][1] = v.y;
                }
              } else {
#pragma unroll
                for (int n = 0; n < TILES_N; n += 2) {
                  const uint4 v = *reinterpret_cast<const uint4*>(from + n * 256);
                  b[n][0] = v.x, b[n][1] = v.y, b[n + 1][0] = v.z, b[n + 1][1] = v.w;
                }
              }
#pragma unroll
              for (int m = 0; m < ROWS; m++)
#pragma unroll
                for (int n = 0; n < TILES_N; n++) multiply(d[m][n], a[m], b[n][0], b[n][1]);
            }
          }
        if (fills) {
#pragma unroll
          for (int k = 0; k < BATCH; k++) store_unit(units[k], step * STEP_UNITS + k, next_j, next_chunk, buffer ^ 1);
          if (STEP_UNITS > BATCH)
            fill(step * STEP_UNITS + BATCH, STEP_UNITS - BATCH, next_j, next_chunk, buffer ^ 1);
        }
      }
    }
    // ---- the way out ----
    const Tile tile = shared.tile(j);
    const int thread = thread_index(), lane = thread & 31, warp = thread >> 5, warp_m = warp % WARPS_M;
    const int channel0 = channel_block * BLOCK_CHANNELS + warp / WARPS_M * (TILES_N * 8);
    OwnedSum* const statistics = shared.sum(thread);
    const int rows = min(max(out_height - (tile.y + warp_m * ROWS), 0), ROWS);
    const int columns = min(out_width - tile.x, TILE_W);
    if (rows > 0 && channel0 < OUT_CHANNELS) {
      float add[2 * TILES_N];
#pragma unroll
      for (int i = 0; i < 2 * TILES_N; i++) {
        const int channel = channel0 + i / 2 * 8 + (lane & 3) * 2 + i % 2;
        add[i] = BIAS && channel < OUT_CHANNELS ? to_float<DTYPE>(bias[channel]) : 0.f;
      }
      // Two neighbouring channels of pixel lane / 4, or of that plus 8, as they are written.
      auto result = [&](int m, int n, int half) {
        float a = d[m][n][2 * half], b = d[m][n][2 * half + 1];
        if (BIAS) a += add[2 * n], b += add[2 * n + 1];
        if (OUTPUT_RELU) a = clamp_below(a, 0.f), b = clamp_below(b, 0.f);
        return pack<DTYPE>(a, b);
      };
      TileSums sums;
      if (STATISTICS) {
        float pivots[2 * TILES_N];
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
          const u32 pair = result(0, n, 0);
          pivots[2 * n] = low(pair), pivots[2 * n + 1] = high(pair);
        }
        sums = statistics->begin(pivots, lane);
      }
      unsigned char* staged = shared.staged(warp);
      const i64 out_image = tile.image * OUT_CHANNELS * out_pixels;
#pragma unroll
      for (int m = 0; m < ROWS; m++) {
        if (m >= rows) break;
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const u32 pair = result(m, n, half);
            if (STATISTICS) {
              const bool counts = (lane >> 2) + 8 * half < columns;
              sums.add(2 * n, low(pair), counts);
              sums.add(2 * n + 1, high(pair), counts);
            }
            const int line = lane >> 2, two = (lane & 3) * 4;
            const int to_line = (OUT_PLANAR ? n : half) * 8 + line, to_unit = OUT_PLANAR ? half : n;
            *reinterpret_cast<u32*>(staged + to_line * STAGED_PITCH + to_unit * 16 + two) =
                OUT_PLANAR ? transpose_8x8(pair) : pair;
          }
        __syncwarp();
        const i64 row = (i64)(tile.y + warp_m * ROWS + m) * out_width + tile.x;
        constexpr int kVectors = (OUT_PLANAR ? 16 : TILES_N * 8) / OUT_VECTOR, kLines = OUT_PLANAR ? TILES_N * 8 : 16;
#pragma unroll
        for (int begin = 0; begin < kVectors * kLines; begin += 32) {
          const int i = begin + lane, line = i / kVectors, at = i % kVectors * OUT_VECTOR;
          const int channel = channel0 + (OUT_PLANAR ? line : at), pixel = OUT_PLANAR ? at : line;
          if (line < kLines && channel < OUT_CHANNELS && pixel < columns) {
            const i64 to = OUT_PLANAR ? channel * out_pixels + row + pixel : (row + pixel) * OUT_CHANNELS + channel;
            const unsigned char* from = staged + line * STAGED_PITCH + at * 2;
            store(out + out_image + to, *reinterpret_cast<const Vector<OUT_VECTOR>*>(from));
          }
        }
        __syncwarp();
      }
      if (STATISTICS) statistics->end(sums, lane, rows * columns);
    }
    if (STATISTICS && (j + 1 == tiles || shared.tile(j + 1).image != tile.image)) {
      const i64 before = (i64)tile.image * OUT_CHANNELS;
      statistics->flush(workspace, worker % COPIES, (i64)images * OUT_CHANNELS, before + channel0,
                        before + OUT_CHANNELS, per_pixel, lane);
    }
    // The map of tile j was read for the last time before the barrier of its last chunk.
    prepare(j + 2, tile.number + 2 * stride, tile.image);
  }
  if (STATISTICS) finish_sums(workspace, images * OUT_CHANNELS, out_mean, out_variance, thread, THREADS, 1);
}
