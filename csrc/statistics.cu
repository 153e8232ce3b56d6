// Mean and biased variance of every (image, channel), in one read of the picture.
//
// Each block reduces a slab (slab.cuh). Where a group of channels has several slices, each block
// publishes its moments and takes a ticket; the block that takes the last one merges them all.
// Which block that is does not matter to the result.
// Dynamic shared memory: AHEAD * 2 * THREADS vectors. Constants: DTYPE, PARAMETER (unused), CHANNELS_LAST, VECTOR, LANES.
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
    const element* __restrict__ x, float* __restrict__ mean, float* __restrict__ variance,
    Moments* __restrict__ published, u32* __restrict__ tickets, i64 channels, i64 pixels, int slices) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Moments result[GROUP];
  __shared__ bool last;
  const Slab slab(x, channels, pixels, slices);
  float bases[SUMS];
  load_bases(slab, bases);
  reduce_slab(slab, bases, reinterpret_cast<Vector<VECTOR>*>(shared), AHEAD, result);
  if (slices > 1) {
    publish(published, slab, slices, result);
    __threadfence();
    __syncthreads();
    // atomicInc wraps to 0 at the last ticket: the counter is ready for the next launch.
    if (threadIdx.x == 0) last = atomicInc(tickets + slab.group, slices - 1) == slices - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    merge_slices(published, slab, slices, result);
  }
  // Thread `lane` holds the bases of channels lane * SUMS ... of the group.
  const float inverse = 1.f / (float)pixels;
  if (threadIdx.x < LANES)
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
      const Moments& total = result[slab.lane * SUMS + s];
      const i64 to = slab.group * GROUP + slab.lane * SUMS + s;
      mean[to] = bases[s] + total.mean;
      variance[to] = total.m2 * inverse;
    }
}
