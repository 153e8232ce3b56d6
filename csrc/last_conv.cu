// The last layer of a network on the tensor cores of compute capability 9.0: a K x K convolution of many
// channels into the few of a picture, with everything around it in the one launch:
//
//   z   = act((x - mean) / sqrt(variance + eps) * weight + bias)
//   out = act(conv(pad(z)) + bias)
//
// So few output channels would leave the tensor cores idle, so the taps of a kernel row are made outputs too:
//  * A unit is two output rows of a strip of pixels. The product's 64 rows are (output row, tap dx, output
//    channel), its MMA_N columns are input pixels, and it sums over K + 1 input rows and the channels: plane
//    (dx, o) at pixel x is what x gives to the output dx pixels to its left. out = bias + the sum of the
//    planes, each shifted by its dx, added in fp32 through shared memory.
//  * Below 32 channels a column is a pair of pixels, which halves the planes; their K + 1 taps are the
//    distances from an output to the pair. A tap that misses a pixel of the pair, like a kernel row that
//    misses an input row, multiplies it by a zero weight: NaN and infinity reach one pixel further than in
//    eager PyTorch.
//  * A block walks down a strip (or several). Input rows lie in a ring, each read by (K + 1) / 2 units. A row
//    of channels_last pixels is contiguous: one warp fetches it by a one-dimensional bulk copy, and what lies
//    in the padding pixel by pixel. Three warps normalise in place and move the 16-byte chunks to where the
//    swizzled operand has them.
//  * Two warpgroups take the units in turns: one multiplies while the other adds the planes and stores.
//
// Float32 pictures are multiplied in TF32, rounded to it when they are normalised.
//
// Constants: DTYPE, PARAMETER, CHANNELS (8, 16, 32; of 16 bits also 64), OUT_CHANNELS, KERNEL, ACTIVATION and
// OUTPUT_ACTIVATION (of activation.cuh; of the former its first few, of the latter FLOOR for a ReLU or none), MMA_N,
// SLOTS (rows of the ring, more than KERNEL), PITCH (floats from plane to plane in shared memory, 8 or 24 modulo
// 32), HELD (products, the first of a unit, whose weights are in registers; those of the others are in shared
// memory), OUTPUT (the DTYPE that is written).
#include "activation.cuh"
#include "hopper.cuh"
#include "last_rows.cuh"

#define SWIZZLE (COLUMN_BYTES == 128 ? SWIZZLE_128 : COLUMN_BYTES == 64 ? SWIZZLE_64 : SWIZZLE_32)
// Of a thread that multiplies; the third warpgroup has the rest of the 3 x 168 that a block is launched with.
#define MULTIPLYING_REGISTERS (4 * HELD + MMA_N / 2 > 160 ? 216 : 200)

DEVICE float load_float(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// The picture that is written: elements from an output channel to the next, and from a pixel to the next.
struct Picture {
  Storage<OUTPUT>::type* out;
  i64 plane;
  int pixel;
};

// Two warpgroups; `group` takes units begin + group, + 2, ...
DEVICE void multiply_and_add(const Shared& shared, const Geometry& g, const uint4* weights,
                             const element* bias, const Activation& activation, const Picture& picture, int begin,
                             int end, int group, int thread) {
  const int lane = thread & 31, warp = thread >> 5;
  uint4 held[HELD ? HELD : 1];
#pragma unroll
  for (int i = 0; i < HELD; i++) held[i] = __ldg(weights + i * 128 + thread);  // packed long before this launch
  if (HELD < STEPS) barrier_wait(shared.weights_full, 0);
  wait_for_previous();
  float added[OUT_CHANNELS];
#pragma unroll
  for (int o = 0; o < OUT_CHANNELS; o++) added[o] = bias ? to_float<DTYPE>(bias[o]) : 0.f;
  // Rows of the product: those of output row p in warps 2p and 2p + 1. A lane holds two of them, 8 apart.
  const int p = warp >> 1, plane = (warp & 1) * 16 + (lane >> 2);
  const u32 keep = shared.planes + ((p * PLANES + plane) * PITCH + 2 * (lane & 3)) * 4;
  const u32 add = shared.planes + (p * PLANES * PITCH + (thread & 63)) * 4;
  const int barrier = 1 + group * 2 + p;  // of the two warps that share an output row

  // The unit's place, and the row of the ring (counted from the first) that its input begins with.
  const int pairs = g.row_pairs();
  int pair = begin % pairs, strip = begin / pairs, row = 0, released = 0;
  auto advance = [&]() {
    const bool bottom = pair == pairs - 1;
    row += bottom ? ROWS : 2, pair = bottom ? 0 : pair + 1, strip += bottom;
  };
  auto release = [&](int rows) {  // hand back what lies before
    for (; released < rows; released++)
      if (lane == 0) barrier_arrive(shared.empty + 8 * (released % SLOTS));
    __syncwarp();
  };
  if (group == 1) {
    advance();
    release(row);
  }
  named_barrier(7, 256);
  float d[MMA_N / 2];
#pragma unroll 1
  for (int j = group; j < end - begin; j += 2) {
    if (j > 0) barrier_wait(shared.order, (j - 1) & 1);  // the other group's products are on their way
    Cursor at = {row % SLOTS, (u32)(row / SLOTS & 1)};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      barrier_wait(shared.full + 8 * at.slot, at.phase);
      wgmma_fence();  // after every wait: ptxas would put its own there, and serialise
      const u64 input = descriptor(shared.ring + at.slot * ROW_BYTES, 16, 8 * COLUMN_BYTES, SWIZZLE);
#pragma unroll
      for (int k = 0; k < ROW_STEPS; k++) {
        const int step = r * ROW_STEPS + k;
        const u64 weight = descriptor(shared.weights, 1024, 128, SWIZZLE_NONE) + (step - HELD) * 128;
        if (step < HELD) multiply(d, held[step], input + 2 * k, step > 0);
        else multiply(d, weight, input + 2 * k, step > 0);
      }
      at.next();
      if (r == 1 || r == 3) wgmma_commit();
      if (r == 3) {  // the first two rows have been read: back with them while the others are multiplied
        wgmma_wait<1>();
        release(row + 2);
      }
    }
    wgmma_commit();
    if (lane == 0) barrier_arrive(shared.order);
    wgmma_wait<0>();
    const int image = strip / g.strips(), x0 = strip % g.strips() * STRIP, y = 2 * pair + p;
    advance();
    advance();
    // A warp two units ahead of another would take a barrier's phase for the one before the last.
    named_barrier(5 + group, 128);
    if (j > 0) barrier_wait(shared.adding, (j - 1) & 1);  // the other group has left the planes
    // All before this group's next unit: its own rows, and rows of the unit in between that it never waited
    // for. By now both groups have handed back what was in the slots of the latter before.
    release(row);

    Storage<OUTPUT>::type* to = picture.out + ((i64)image * g.out_height * g.out_width * OUT_CHANNELS) +
                  ((i64)y * g.out_width + x0) * picture.pixel;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half) named_barrier(barrier, 64);
      const int begin_column = half * HALF, columns = half ? MMA_N - SHIFT - HALF : HALF;
#pragma unroll
      for (int i = 0; i < (half ? (MMA_N - HALF) / 8 : HALF / 8 + 1); i++) {
        const float* values = d + 4 * (i + begin_column / 8);
        if (plane < PLANES) store_shared(keep + i * 32, values[0], values[1]);
        if (plane + 8 < PLANES) store_shared(keep + (8 * PITCH + i * 8) * 4, values[2], values[3]);
      }
      named_barrier(barrier, 64);
#pragma unroll
      for (int c = 0; c < columns; c += 64) {
        const int column = c + (thread & 63);
        if (column >= columns) continue;
#pragma unroll
        for (int e = 0; e < PIXELS; e++) {
          float sum[OUT_CHANNELS];
#pragma unroll
          for (int o = 0; o < OUT_CHANNELS; o++) sum[o] = added[o];
#pragma unroll
          for (int shift = 0; shift <= SHIFT; shift++)
#pragma unroll
            for (int o = 0; o < OUT_CHANNELS; o++) {
              const int tap = PIXELS * shift + PIXELS - 1 - e;
              sum[o] += load_float(add + ((tap * OUT_CHANNELS + o) * PITCH + c + shift) * 4);
            }
          const int x = (begin_column + column) * PIXELS + e;
          if (y < g.out_height && x0 + x < g.out_width) {
#pragma unroll
            for (int o = 0; o < OUT_CHANNELS; o++)
              to[o * picture.plane + x * picture.pixel] =
                  from_float<OUTPUT>(activate_and_scale<OUTPUT_ACTIVATION>(sum[o], activation));
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.adding);
  }
}

// Up to one block a multiprocessor, 384 threads; every block has a unit. At least 3 output rows: else the
// rows that a group passes over could be more than the ring has.
extern "C" __global__ void __launch_bounds__(384, 1) last_conv(
    const element* __restrict__ x, const uint4* __restrict__ weights, const float* mean,
    const float* variance, const parameter* norm_weight, const parameter* norm_bias, float eps,
    i64 image_stride, i64 weight_stride, i64 bias_stride, const element* bias, Storage<OUTPUT>::type* out, int images,
    int height, int width, int out_height, int out_width, int top, int left, int pad, int channels_last,
    Activation activation, Activation output_activation) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared shared(shared_address(memory));
  const Geometry g = {images, height, width, out_height, out_width, top, left, pad};
  const int group = of_warp(threadIdx.x >> 7), thread = threadIdx.x & 127;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  launch_dependents();
  const i64 units = (i64)images * g.strips() * g.row_pairs();
  const int begin = (int)(units * blockIdx.x / gridDim.x), end = (int)(units * (blockIdx.x + 1) / gridDim.x);
  if (group == 2) {
    give_registers_back<504 - 2 * MULTIPLYING_REGISTERS>();
    if (thread >= NORMALIZING) {
      if (HELD < STEPS && thread == NORMALIZING) {
        barrier_expect(shared.weights_full, WEIGHT_BYTES);
        bulk_copy(shared.weights, weights + HELD * 128, WEIGHT_BYTES, shared.weights_full);
      }
      wait_for_previous();
      fetch(shared, g, x, begin, end, thread & 31);
    } else {
      wait_for_previous();
      const Norm norm = {mean,         variance,      norm_weight, norm_bias, eps,
                         image_stride, weight_stride, bias_stride};
      normalize(shared, g, norm, activation, begin, end, thread);
    }
  } else {
    take_registers<MULTIPLYING_REGISTERS>();
    Picture picture = {out, (i64)out_height * out_width, 1};
    if (channels_last) picture = {out, 1, OUT_CHANNELS};
    multiply_and_add(shared, g, weights, bias, output_activation, picture, begin, end, group, thread);
  }
}
