// The rate at which a GPU multiplies matrices by mma.sync: every warp repeats products that stay in registers and of
// which none waits for the one before. What csrc/mma_conv.cu is measured against (sf_compile/bench/ceilings.py).
//
// Constants: DTYPE (0 float32 in TF32, 1 float16, 2 bfloat16), PARAMETER (unused), THREADS, BLOCKS (of a multiprocessor).
#include "mma.cuh"

#define ROWS 4     // products with one right operand
#define COLUMNS 4  // products with one left operand

// `operands` has 4 * ROWS words of left operands, then 2 * COLUMNS of right ones, each for 32 lanes; `sums` gets the sum
// of what each thread has of all products, `rounds` times each.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    mma_ceiling(const u32* __restrict__ operands, float* sums, int rounds) {
  const int thread = threadIdx.x, lane = thread & 31;
  u32 a[ROWS][4], b[COLUMNS][2];
#pragma unroll
  for (int i = 0; i < 4 * ROWS; i++) a[i / 4][i % 4] = operands[i * 32 + lane];
#pragma unroll
  for (int i = 0; i < 2 * COLUMNS; i++) b[i / 2][i % 2] = operands[(4 * ROWS + i) * 32 + lane];
  float d[ROWS][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS * 4; i++) d[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.f;
#pragma unroll 1
  for (int round = 0; round < rounds; round += 4)
#pragma unroll
    for (int i = 0; i < 4 * ROWS * COLUMNS; i++)
      multiply(d[i / COLUMNS % ROWS][i % COLUMNS], a[i / COLUMNS % ROWS], b[i % COLUMNS][0], b[i % COLUMNS][1]);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS * 4; i++) sum += d[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4];
  sums[blockIdx.x * THREADS + thread] = sum;
}
