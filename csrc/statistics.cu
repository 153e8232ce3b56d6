// Mean and biased variance of every (image, channel), in one read of the picture.
//
// Each block reduces a slab (slab.cuh). Where a group of channels has several slices, each block
// publishes its moments and takes a ticket; the block that takes the last one merges them all.
// Which block that is does not matter to the result.
// Dynamic shared memory: AHEAD * 2 * THREADS vectors. Constants: DTYPE, PARAMETER (unused), CHANNELS_LAST,
// VECTOR, LANES.
#define THREADS 512
// Two blocks a multiprocessor leave 64 registers: too few for one lane a pixel, and for what ptxas makes of
// the kernel from compute capability 10 on.
#if __CUDA_ARCH__ >= 1000 || (CHANNELS_LAST && LANES == 1)
#define RESIDENT 1
#else
#define RESIDENT 2
#endif
#include "slab.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) statistics(
    const element* __restrict__ x, float* __restrict__ mean, float* __restrict__ variance, u64* published,
    u32* __restrict__ tickets, int channels, i64 pixels, int turns, int rest) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Meeting meeting;
  __shared__ bool last;
  const Slab slab(x, channels, pixels, turns, rest);
  float bases[SUMS];
  load_bases(slab, bases);
  Part total = reduce_slab(slab, bases, reinterpret_cast<Vector<VECTOR>*>(shared), AHEAD, meeting);
  if (gridDim.y > 1) {
    if (threadIdx.x < GROUP) publish(published, 0, total);
    __syncthreads();
    // atomicInc wraps to 0 at the last ticket: the counter is ready for the next launch.
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicInc(tickets + blockIdx.x, gridDim.y - 1) == gridDim.y - 1;
      __threadfence();
    }
    __syncthreads();
    if (!last) return;
    total = merge_slices(published, 0, slab, pixels, meeting);
  }
  if (threadIdx.x < GROUP) {
    const i64 to = (i64)blockIdx.x * GROUP + threadIdx.x;
    mean[to] = to_float<DTYPE>(base_of_channel(slab)) + total.mean;
    variance[to] = total.m2 / (float)pixels;
  }
}
