// The first layer of a style network on compute capability 9.0: pad, KERNEL x KERNEL convolution of a picture
// of 1 to 4 channels with stride 1, bias and ReLU where asked, into a channels_last picture, and the mean and
// variance of every (image, channel) of what is written.
//
// A unit of work is a strip of output rows, for 32 output channels. Input rows lie in shared memory as
// [x][4 channels], the missing channels zero; 16 bytes of one are a *chunk*: 2 pixels of 16 bits, or 1 of float32.
// Column n of the unit's product stands for the pixels of chunk n, so chunk j of its window lies at 16 (n + j): the
// windows overlap, and nothing is unfolded. The product's 64 rows are 2 outputs of a column x 32 channels: with 16
// bits its 2 pixels, in one row; with float32, in TF32, its pixel in 2 rows. A unit so has 2 MMA_N pixels of a row,
// and reads KERNEL rows of windows of KERNEL + 1 pixels; or MMA_N pixels of 2 rows, and reads KERNEL + 1 rows of
// windows of KERNEL pixels.
//
// A step of the product takes two chunks of a row; an odd last chunk is paired with that of the next row, one row
// pitch away. Such row pairs start at even slots of the ring of rows, so none wraps. Where a unit reads an odd number
// of rows, whether its first one has an even or an odd slot decides between two orders of those weights.
//
// All 12 warps pack the first rows of a block, 4 of them go on packing ahead. Two consumer warpgroups take
// alternate units: one multiplies while the other takes statistics and stores. Blocks walk down a strip, one
// new input row an output row; blockIdx.x % groups is the group of 32 output channels.
//
// A NaN in the input reaches one column more than the convolution has, or one row with float32 (the zero weight of
// what belongs to the other of the 2 outputs).
//
// Constants: DTYPE, PARAMETER, CHANNELS (of the input), KERNEL (3, 5, 7, 9), MMA_N, BOX (pixels of a tensor
// store, which divide a strip), PAD (1 zeros, 2 reflect, 3 replicate), STATISTICS, BIAS,
// OUTPUT_ACTIVATION (of activation.cuh), PICTURE (the input's DTYPE, which is rounded on the way in).
#include "activation.cuh"
#include "channel_sums.cuh"
#include "first_rows.cuh"
#include "hopper.cuh"

#define GROUP 32  // output channels of a block
#define BOXES (STRIP / BOX)  // of an output row

#define CHUNKS ((KERNEL + ADJACENT - 1) / ADJACENT)
#define ROW_STEPS (CHUNKS / 2)
#define ROW_PAIRS (INPUT_ROWS / 2)
#define TAIL_STEPS (CHUNKS % 2 ? ROW_PAIRS + INPUT_ROWS % 2 : 0)  // of the odd last chunks
#define TAIL_ORDERS (1 + INPUT_ROWS % 2)
#define STEP_BYTES 2048  // weights of a step: 2 chunks x 64 rows x 16 bytes
#define WEIGHT_BYTES ((INPUT_ROWS * ROW_STEPS + TAIL_ORDERS * TAIL_STEPS) * STEP_BYTES)

#define OUT_BYTES (GROUP * (int)sizeof(element))        // of an output pixel
#define STAGING_BYTES (UNIT_ROWS * STRIP * OUT_BYTES)  // a finished unit, on its way out

static_assert(STRIP % BOX == 0 && BOX % (8 * ADJACENT) == 0 && BOX <= 256, "boxes are whole groups of 8 columns");

// The unit that a warpgroup is at, and the position of its first input row.
struct Unit {
  int y, column, row;
  DEVICE void advance(int height) {
    const bool last = y == height - 1;
    row += last ? INPUT_ROWS : UNIT_ROWS;
    column += last;
    y = last ? 0 : y + 1;
  }
};

DEVICE Pair finished(float first, float second, float bias, const Activation& a) {
  if (BIAS) first += bias, second += bias;
  if (OUTPUT_ACTIVATION == RECTIFIED) return rounded_relu(first, second);
  return rounded(activate_and_scale<OUTPUT_ACTIVATION>(first, a), activate_and_scale<OUTPUT_ACTIVATION>(second, a));
}

// Where in a unit's staging memory, [row][pixel][32 channels] swizzled by the bytes of a pixel, this lane writes: 16
// bits are written as 8x8 matrices, of which the lane has a row, float32 by words, of the first pixel and channel
// that the lane has. `part` is which of the 2 outputs of a column the warp has, `half` which half of the channels.
DEVICE u32 staged(int lane, int part, int half) {
#if DTYPE == 0
  const int pixel = lane % 4 * 2, chunk = (half * 4 + lane / 16) ^ pixel;
  return part * STRIP * 128 + pixel * 128 + chunk * 16 + lane / 4 % 4 * 4;
#else
  // lane % 8 is the column, of 128 bytes; lane / 8 % 2 says which 8 of the warp's 16 channels, lane / 16 which 8
  // columns.
  const int eighth = (half * 2 + lane / 8 % 2) ^ lane % 4;
  return lane / 16 * 1024 + lane % 8 * 128 + part * 64 + eighth * 16;
#endif
}

// Round a unit, write it to the staging memory and take its statistics. A thread has two channels of both pixels of
// a quarter of the pairs of columns; the first of them is `remaining` pixels from the end of the row.
template <bool kWhole>
DEVICE void write_unit(const float (&d)[MMA_N / 2], const float (&bias)[2], const Activation& activation, u32 to,
                       QuadSums& statistics, int remaining) {
  [[maybe_unused]] Pair before[2];  // of the 8 columns before, that two groups are stored at once
  if (STATISTICS && statistics.count == 0)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float pivot = low(finished(d[2 * i], d[2 * i + 1], bias[i], activation));
      statistics.sums[i].start(kWhole || remaining > 0 ? pivot : 0.f);
    }
#pragma unroll
  for (int g = 0; g < MMA_N / 8; g++) {
    const bool first = 8 * ADJACENT * g < remaining, second = 8 * ADJACENT * g + ADJACENT < remaining;
    Pair pairs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      pairs[i] = finished(d[4 * g + 2 * i], d[4 * g + 2 * i + 1], bias[i], activation);
      if (!STATISTICS) continue;
      PivotSum& sum = statistics.sums[i];
      if (kWhole) sum.add(low(pairs[i])), sum.add(high(pairs[i]));
      else sum.add(low(pairs[i]), first), sum.add(high(pairs[i]), second);
    }
    if (!kWhole) statistics.count += first + second;
#if DTYPE == 0
#pragma unroll
    for (int i = 0; i < 2; i++) {  // channels 8 apart
      store_shared_word((to ^ 32 * i) + g * 1024, __float_as_uint(pairs[i].x));
      store_shared_word((to ^ 32 * i ^ 16) + 128 + g * 1024, __float_as_uint(pairs[i].y));
    }
#else
    if (g % 2) store_transposed(to + (g - 1) * 1024, before[0], before[1], pairs[0], pairs[1]);
    else if (g == MMA_N / 8 - 1) store_transposed(to + g * 1024, pairs[0], pairs[1]);
    before[0] = pairs[0], before[1] = pairs[1];
#endif
  }
  if (kWhole) statistics.count += MMA_N / 4;
}

// Grid groups x blocks, 384 threads; `weights` (groups, steps, 2 chunks, 64 rows, 8) has first the steps of
// whole rows, then the tail for an even and, where there are two, for an odd first slot. `out` is the map of the
// output with boxes of GROUP channels and BOX pixels of a row, swizzled. Images x strips x rows < 2^31.
extern "C" __global__ void __launch_bounds__(384, 1) first_conv(
    const __grid_constant__ TensorMap out, const Storage<PICTURE>::type* x, const element* weights, const element* bias,
    Activation activation, SumsWorkspace* workspace, float* mean, float* variance, i64 x_image, i64 x_channel,
    i64 x_row,
    int x_pixel, int images, int height, int width, int out_channels, int out_height, int out_width, int top,
    int left, int strips) {
  extern __shared__ unsigned char memory[];
  launch_dependents();
  const u32 staging = (shared_address(memory) + 1023) & ~1023u;  // the swizzle's pattern has 512 or 1024 bytes
  const u32 held_weights = staging + 2 * STAGING_BYTES, rows = held_weights + WEIGHT_BYTES;
  const u32 full = rows + SLOTS * PITCH, empty = full + 8 * SLOTS, weights_ready = empty + 8 * SLOTS;
  const u32 turn = weights_ready + 8;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32, warpgroup = of_warp(threadIdx.x >> 7);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 8);
    barrier_init(weights_ready, 1);
    barrier_init(turn, 4);
    barrier_init_fence();
  }
  __syncthreads();
  const int groups = (out_channels + GROUP - 1) / GROUP, group = blockIdx.x % groups;
  const int unit_rows = (out_height + UNIT_ROWS - 1) / UNIT_ROWS;
  const i64 units = (i64)images * strips * unit_rows;
  const int block = blockIdx.x / groups, blocks = gridDim.x / groups;
  const int first_unit = (int)(units * block / blocks), end_unit = (int)(units * (block + 1) / blocks);
  const Share share = {first_unit, end_unit, unit_rows, strips};
  const Picture in = {x,     x_image, x_channel, x_row, x_pixel,
                      height, width,   top,       left,  out_width + KERNEL - 1};
  const Ring ring = {rows, full, empty};

  if (warpgroup == 2) {
    give_registers_back<104>();
    if (thread == 0) {
      barrier_expect(weights_ready, WEIGHT_BYTES);
      bulk_copy(held_weights, (const char*)weights + (i64)group * WEIGHT_BYTES, WEIGHT_BYTES, weights_ready);
    }
    __syncwarp();
    wait_for_previous();
#pragma unroll 1  // one copy of these instructions: in a kernel that just began they come from the L2 cache
    for (int more = 0; more < 2; more++)
      pack_rows<IN_FLIGHT>(in, ring, share, more * FIRST_ROWS + warp - 8, more ? 4 : FIRST_ROWS,
                           more ? 0x7fffffff : FIRST_ROWS);
    if (thread == 0) barrier_wait(weights_ready, 0);  // no exit with a copy under way
    return;
  }

  take_registers<200>();
  wait_for_previous();
  pack_rows<PIXELS_A_LANE>(in, ring, share, 4 + warp, FIRST_ROWS, FIRST_ROWS);
  const int part = warp % 4 / 2;                                // which of the 2 outputs of a column
  const int channel = group * GROUP + warp % 2 * 16 + lane / 4;  // and the one 8 above it
  float d[MMA_N / 2], added[2] = {0.f, 0.f};
  if (BIAS)
    for (int i = 0; i < 2; i++)
      if (channel + 8 * i < out_channels) added[i] = to_float<DTYPE>(bias[channel + 8 * i]);
  QuadSums statistics = {};
  const double per_pixel = 1.0 / ((double)out_height * out_width);
  const u32 stage = staging + warpgroup * STAGING_BYTES;
  const u32 to = stage + staged(lane, part, warp % 2);

  const int count = share.end - share.first;
  Unit unit = {share.first % unit_rows, share.first / unit_rows, 0};
  if (warpgroup == 1) unit.advance(unit_rows);
  int released = 0;  // rows that this warpgroup has passed on
  if (warpgroup < count) barrier_wait(weights_ready, 0);
#pragma unroll 1
  for (int j = warpgroup; j < count; j += 2) {
    // Rows that only the other warpgroup reads.
    for (; released < unit.row; released++) {
      ring.wait_full(released);
      if (lane == 0) ring.arrive_empty(released);
    }
    if (j > 0) barrier_wait(turn, (j - 1) & 1);  // the other warpgroup has issued the products of unit j - 1
    const u64 a = descriptor(held_weights, STEP_BYTES / 2, 128, SWIZZLE_NONE);
#pragma unroll
    for (int r = 0; r < INPUT_ROWS; r++) {
      ring.wait_full(unit.row + r);
      const u64 windows = descriptor(ring.row(unit.row + r), 16, 128, SWIZZLE_NONE);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < ROW_STEPS; k++)
        multiply(d, a + (r * ROW_STEPS + k) * (STEP_BYTES / 16), windows + 2 * k, r + k > 0);
    }
    if (TAIL_STEPS) {
      const int odd = INPUT_ROWS % 2 ? unit.row & 1 : 0, alone = odd ? 0 : INPUT_ROWS - 1;
      const u64 tail = a + (INPUT_ROWS * ROW_STEPS + odd * TAIL_STEPS) * (STEP_BYTES / 16);
#pragma unroll
      for (int k = 0; k < ROW_PAIRS; k++) {
        const u32 last_chunk = ring.row(unit.row + odd + 2 * k) + 16 * (CHUNKS - 1);
        multiply(d, tail + k * (STEP_BYTES / 16), descriptor(last_chunk, PITCH, 128, SWIZZLE_NONE), 1);
      }
      if (INPUT_ROWS % 2) {  // the row without a partner: its last two chunks, the former with zero weights
        const u32 last_chunks = ring.row(unit.row + alone) + 16 * (CHUNKS - 2);
        multiply(d, tail + ROW_PAIRS * (STEP_BYTES / 16), descriptor(last_chunks, 16, 128, SWIZZLE_NONE), 1);
      }
    }
    wgmma_commit();
    if (lane == 0) barrier_arrive(turn);
    const int image = unit.column / strips, y = UNIT_ROWS * unit.y, x0 = unit.column % strips * STRIP;
    const int read = unit.row + INPUT_ROWS;
    unit.advance(unit_rows);
    unit.advance(unit_rows);
    if (lane == 0) store_wait_read<0>();  // the unit before has left the staging memory
    wgmma_wait<0>();
    const int keep = j + 2 < count ? min(read, unit.row) : read;
    if (lane == 0)
      for (int i = released; i < keep; i++) ring.arrive_empty(i);
    released = keep;
    named_barrier(1 + warpgroup, 128);
    const int end = UNIT_ROWS == 1 || y + part < out_height ? out_width : 0;  // of the row
    const int remaining = end - x0 - lane % 4 * 2 * ADJACENT - part * (ADJACENT - 1);
    if (x0 + STRIP <= end) write_unit<true>(d, added, activation, to, statistics, remaining);
    else write_unit<false>(d, added, activation, to, statistics, remaining);
    async_fence();
    named_barrier(1 + warpgroup, 128);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < UNIT_ROWS * BOXES; i += 4) {
        const int box = i + warp % 4, second = UNIT_ROWS == 2 && box >= BOXES;  // the second output row
        const int at = x0 + (box - second * BOXES) * BOX;
        if (box < UNIT_ROWS * BOXES && at < out_width && (!second || y + 1 < out_height))
          tensor_store(out, group * GROUP, y + second, at, image, stage + box * BOX * OUT_BYTES);
      }
      store_commit();
    }
    if (STATISTICS && (j + 2 >= count || unit.column / strips != image))
      statistics.flush(workspace, block % COPIES, (i64)images * out_channels, (i64)image * out_channels + channel, 8,
                       (i64)(image + 1) * out_channels, per_pixel);
  }
  if (STATISTICS) finish_sums(workspace, images * out_channels, mean, variance, threadIdx.x, 256, 3);
  if (lane == 0) store_wait<0>();
}
