// A convolution of any shape on the tensor cores of compute capability 8.0 and later, that finishes its producer's norm
// on the way in and takes the statistics of its own output on the way out:
//
//   z   = act((x - mean) / sqrt(variance + eps) * weight + bias) (+ residual),  written to `kept` if asked for
//   out = act(conv(pad(upsample_nearest(z))) + bias)
//
// The product's rows are 16 pixels of a row of the output, its columns 8 output channels, its depth 32 bytes: 16 input
// channels of one tap, or 8 of float32 in TF32 (of fewer channels, several taps of a row).
//  * A tile's input, enlarged and padded by an index map that is made once a tile, comes with its halo in chunks of
//    CHUNK_BYTES a pixel, through registers, where it is finished. The next chunk's loads are under way while one is
//    multiplied.
//  * A tap is another start address in the chunk, so a stride costs nothing. Taps of one column are taken in an order
//    in which a warp's rows of pixels move up by one: each is loaded once. What a product needs is loaded while those
//    before it are multiplied.
//  * Weights come in the order of the products' registers, in stages of COLUMNS columns of taps, through a ring that
//    cp.async fills, or stay in shared memory for the whole of a persistent block (STAGES 0).
//  * Results leave by rows of 16 pixels, through shared memory of the warp's own.
//  * A 3x3 convolution behind an upsampling by 2 is one of 2x2 taps for each parity of the output's rows and columns
//    (sf_compile/subpixel.py): the window at (i, j) of the source, padded by 1, makes pixel (2i - p, 2j - q) of parity
//    (p, q), of which the picture has all but those beyond its edges.
//
// Constants: DTYPE, PARAMETER, CHANNELS (in), OUT_CHANNELS, KERNEL_H, KERNEL_W, STRIDE_Y, STRIDE_X, UPSAMPLE, PAD (0
// none, 1 zeros, 2 reflect, 3 replicate), SUBPIXEL (the kernel and OUT_CHANNELS are those of four parities), VECTOR
// (channels a load takes of a channels_last picture; 1 of any other), PLANAR (the input is contiguous: neighbouring
// threads load neighbouring pixels), OUT_PLANAR, OUT_VECTOR (elements a store takes), RELU, RESIDUAL, KEEP (strides 1),
// TRANSFORM (0 where the input is finished), STATISTICS, BIAS, OUTPUT_RELU; and how it is cut: CHUNK_BYTES (8, 16, 32,
// 64), ROWS (of a warp), WARPS_M, WARPS_N, TILES_N (products side by side in a warp: 1 to 4, 6, 8), COLUMNS (1 or all),
// STAGES, BLOCKS (of a multiprocessor).
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
  const int picture_width = SUBPIXEL ? 2 * width : out_width;
  const i64 pixels = (i64)height * width, out_pixels = (i64)(SUBPIXEL ? 2 * height : out_height) * picture_width;
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
#pragma unroll 16
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
  auto exists = [&](int i) { return ALL_EXIST || i * THREADS + thread < UNITS; };
  auto place = [&](int i) {  // of this thread's unit i of a chunk; of its last unit where that does not exist
    const u32 unit = exists(i) ? i * THREADS + thread : UNITS - 1;
    return PLANAR ? Place{unit % PIXELS, unit / PIXELS * UNIT} : Place{unit / PIXEL_UNITS, unit % PIXEL_UNITS * UNIT};
  };
  // Free of branches, to be done among products: a unit that is a zero, or that nobody asks for, is read from the
  // image's first pixel and thrown away.
  auto load_unit = [&](Unit& unit, int i, int j, int chunk, bool wanted) {
    const Place at = place(i);
    const int entry = shared.table(j)[at.pixel];
    unit.entry = exists(i) && wanted ? entry : -1;
    const int channel = chunk * CHUNK + at.channel;
    const i64 pixel = max(unit.entry, 0) >> 1, image = shared.tile(j).offset;
    unit.raw.load(picture, image + pixel * picture.pixel + channel * picture.channel, channel);
    if (RESIDUAL) unit.more.load(more, image + pixel * more.pixel + channel * more.channel, channel);
  };
  auto store_unit = [&](const Unit& unit, int i, int j, int chunk, int buffer) {
    const Place at = place(i);
    const int channel = chunk * CHUNK + at.channel;
    const float4* affines = reinterpret_cast<const float4*>(shared.affines(j) + channel);
    u32 z[UNIT_WORDS], operand[UNIT_WORDS];
#pragma unroll
    for (int k = 0; k < UNIT_WORDS; k++) {
      z[k] = unit.raw.word(k);
      if (TRANSFORM) z[k] = finished(affines, k, z[k], RESIDUAL ? unit.more.word(k) : 0);
      operand[k] = unit.entry < 0 ? 0 : operand_of(z[k]);  // what padding with zeros adds is not transformed
    }
    unsigned char* to = shared.halo(buffer) + at.pixel * PITCH + at.channel * ELEMENT_BYTES;
    if (exists(i)) {
      if constexpr (UNIT_WORDS == 4)
        *reinterpret_cast<uint4*>(to) = make_uint4(operand[0], operand[1], operand[2], operand[3]);
      else
        *reinterpret_cast<uint2*>(to) = make_uint2(operand[0], operand[1]);
    }
    // The blocks of other output channels read the same input: they share the writing of it.
    if (KEEP && unit.entry >= 0 && (unit.entry & 1) && chunk * CHANNEL_BLOCKS / CHUNKS == channel_block) {
      const i64 pixel = unit.entry >> 1;
      element* keep =
          kept + shared.tile(j).offset + (OUT_PLANAR ? pixel + channel * pixels : pixel * CHANNELS + channel);
      if constexpr (!OUT_PLANAR && CHANNELS % UNIT == 0 && UNIT_WORDS == 4) {
        if (channel < CHANNELS) *reinterpret_cast<uint4*>(keep) = make_uint4(z[0], z[1], z[2], z[3]);
      } else {
#pragma unroll
        for (int k = 0; k < UNIT; k++)
          if (channel + k < CHANNELS) keep[OUT_PLANAR ? k * pixels : k] = element_of(z, k);
      }
    }
  };
  // Units of a thread from `begin` on, all but those that were loaded before.
  auto fill = [&](int begin, int count, int j, int chunk, int buffer) {
#pragma unroll 1
    for (int i = begin; i < begin + count; i += BATCH) {
      Unit units[BATCH];
#pragma unroll
      for (int k = 0; k < BATCH; k++) load_unit(units[k], i + k, j, chunk, true);
#pragma unroll
      for (int k = 0; k < BATCH; k++) store_unit(units[k], i + k, j, chunk, buffer);
    }
  };

  prepare(0, first, -1);
  prepare(1, first + stride, -1);
  __syncthreads();
  fill(0, STEP_UNITS * X_STEPS, 0, 0, 0);

  if (STATISTICS)
#pragma unroll
    for (int group = 0; group < GROUPS; group++) *shared.sum(thread, group) = {};
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
      const bool fills = j + last < tiles;
      const int next_j = fills ? j + last : j, next_chunk = last ? 0 : chunk + 1;
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
#pragma unroll
        for (int k = 0; k < BATCH; k++) load_unit(units[k], step * STEP_UNITS + k, next_j, next_chunk, fills);
        const Lane at(thread_index() & 31, step);
        const unsigned char* halo = shared.halo(buffer) + warp_m * ROWS * HALO_W * PITCH;
        const unsigned char* column = stage_weights + (COLUMNS == 1 ? 0 : step) * (DEPTHS * KERNEL_H * PRODUCT_BYTES);
        // Right operands of the products of one load, and those of the next.
        u32 b[2][TOGETHER][2];
        auto load_weights = [&](u32 (&to)[TOGETHER][2], int depth, int tap, int n) {
          const unsigned char* from = column + ((depth * KERNEL_H + tap) * PRODUCT_BYTES + n * 256);
          if constexpr (TOGETHER == 2) {
            const uint4 v = *reinterpret_cast<const uint4*>(from);
            to[0][0] = v.x, to[0][1] = v.y, to[1][0] = v.z, to[1][1] = v.w;
          } else {
            const uint2 v = *reinterpret_cast<const uint2*>(from);
            to[0][0] = v.x, to[0][1] = v.y;
          }
        };
        load_weights(b[0], 0, 0, 0);
#pragma unroll
        for (int depth = 0; depth < DEPTHS; depth++)
#pragma unroll
          for (int plane = 0; plane < PLANES_Y; plane++) {
            u32 a[ROWS + (KERNEL_H - 1) / STRIDE_Y][4];  // rows of pixels, from the warp's first on
            auto load_row = [&](int row) {
              at.load(a[row], halo, (plane * PLANE_H + row) * (HALO_W * PITCH) + depth * 32);
            };
#pragma unroll
            for (int row = 0; row < ROWS; row++) load_row(row);
#pragma unroll
            for (int up = 0; up * STRIDE_Y + plane < KERNEL_H; up++) {
              const int tap = up * STRIDE_Y + plane;
              const bool ends = tap + STRIDE_Y >= KERNEL_H;  // this plane's column
              if (!ends) load_row(ROWS + up);
#pragma unroll
              for (int n = 0; n < TILES_N; n += TOGETHER) {
                const int now = (depth * KERNEL_H + up + taps_before(plane)) * (TILES_N / TOGETHER) + n / TOGETHER;
                if (n + TOGETHER < TILES_N) load_weights(b[(now + 1) % 2], depth, tap, n + TOGETHER);
                else if (!ends) load_weights(b[(now + 1) % 2], depth, tap + STRIDE_Y, 0);
                else if (plane + 1 < PLANES_Y) load_weights(b[(now + 1) % 2], depth, plane + 1, 0);
                else if (depth + 1 < DEPTHS) load_weights(b[(now + 1) % 2], depth + 1, 0, 0);
#pragma unroll
                for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                  for (int m = 0; m < ROWS; m++) multiply(d[m][n + i], a[m + up], b[now % 2][i][0], b[now % 2][i][1]);
              }
            }
          }
#pragma unroll
        for (int k = 0; k < BATCH; k++) store_unit(units[k], step * STEP_UNITS + k, next_j, next_chunk, buffer ^ 1);
        if (STEP_UNITS > BATCH && fills)
          fill(step * STEP_UNITS + BATCH, STEP_UNITS - BATCH, next_j, next_chunk, buffer ^ 1);
      }
    }
    // ---- the way out ----
    const Tile tile = shared.tile(j);
    const int thread = thread_index(), lane = thread & 31, warp = thread >> 5, warp_m = warp % WARPS_M;
    const bool flushes = STATISTICS && (j + 1 == tiles || shared.tile(j + 1).image != tile.image);
    unsigned char* staged = shared.staged(warp);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const int column0 = channel_block * BLOCK_CHANNELS + (warp / WARPS_M * TILES_N + group * GROUP_TILES) * 8;
      // All of a group are of one parity.
      const int parity = SUBPIXEL ? column0 / PICTURE_CHANNELS : 0, channel0 = column0 - parity * PICTURE_CHANNELS;
      const Span rows(tile.y + warp_m * ROWS, ROWS, out_height, parity >> 1);
      const Span columns(tile.x, TILE_W, out_width, parity & 1);
      OwnedSum* const statistics = shared.sum(thread, group);
      if (rows.end > 0 && column0 < OUT_CHANNELS) {
        float add[2 * GROUP_TILES];
#pragma unroll
        for (int i = 0; i < 2 * GROUP_TILES; i++) {
          const int channel = channel0 + i / 2 * 8 + (lane & 3) * 2 + i % 2;
          add[i] = BIAS && channel < PICTURE_CHANNELS ? to_float<DTYPE>(bias[channel]) : 0.f;
        }
        // Two neighbouring channels of pixel lane / 4, or of that plus 8, as they are written.
        auto result = [&](int m, int n, int half) {
          const float(&sums)[4] = d[m][group * GROUP_TILES + n];
          float a = sums[2 * half], b = sums[2 * half + 1];
          if (BIAS) a += add[2 * n], b += add[2 * n + 1];
          if (OUTPUT_RELU) a = clamp_below(a, 0.f), b = clamp_below(b, 0.f);
          return Results(a, b);
        };
        TileSums sums;
        if (STATISTICS) {
          float pivots[2 * GROUP_TILES];
#pragma unroll
          for (int n = 0; n < GROUP_TILES; n++) {
            const Results two = result(0, n, 0);
            pivots[2 * n] = two.first(), pivots[2 * n + 1] = two.second();
          }
          sums = statistics->begin(pivots, lane);
        }
        const i64 out_image = tile.image * PICTURE_CHANNELS * out_pixels;
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
          if (m >= rows.end) break;
          if (m < rows.begin) continue;
#pragma unroll
          for (int n = 0; n < GROUP_TILES; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const Results two = result(m, n, half);
              if (STATISTICS) {
                const bool counts = columns.has((lane >> 2) + 8 * half);
                sums.add(2 * n, two.first(), counts);
                sums.add(2 * n + 1, two.second(), counts);
              }
              two.stage(staged, n, half, lane);
            }
          __syncwarp();
          const i64 row = (i64)rows.pixel(m) * picture_width + columns.pixel(0);
          constexpr int kLines = OUT_PLANAR ? GROUP_TILES * 8 : 16;
          constexpr int kVectors = (OUT_PLANAR ? 16 : GROUP_TILES * 8) / OUT_VECTOR;
#pragma unroll
          for (int begin = 0; begin < kVectors * kLines; begin += 32) {
            const int i = begin + lane, line = i / kVectors, at = i % kVectors * OUT_VECTOR;
            const int channel = channel0 + (OUT_PLANAR ? line : at), place = OUT_PLANAR ? at : line;
            if (line < kLines && channel < PICTURE_CHANNELS && columns.has(place)) {
              const i64 pixel = row + (SUBPIXEL ? 2 : 1) * place;
              const i64 to = OUT_PLANAR ? channel * out_pixels + pixel : pixel * PICTURE_CHANNELS + channel;
              const unsigned char* from = staged + line * STAGED_PITCH + at * ELEMENT_BYTES;
              store(out + out_image + to, *reinterpret_cast<const Vector<OUT_VECTOR>*>(from));
            }
          }
          __syncwarp();
        }
        if (STATISTICS) statistics->end(sums, lane, rows.count() * columns.count());
      }
      if (flushes) {
        const i64 before = (i64)tile.image * PICTURE_CHANNELS;
        statistics->flush(workspace, worker % COPIES, (i64)images * PICTURE_CHANNELS, before + channel0,
                          before + PICTURE_CHANNELS, per_pixel, lane);
      }
    }
    // The map of tile j was read for the last time before the barrier of its last chunk.
    prepare(j + 2, tile.number + 2 * stride, tile.image);
  }
  if (STATISTICS) finish_sums(workspace, images * PICTURE_CHANNELS, out_mean, out_variance, thread, THREADS, 1);
}
