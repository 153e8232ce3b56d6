// A whole instance norm in one launch:
//
//   out = act((x - mean) / sqrt(variance + eps) * weight + bias) + residual
//
// Each block reduces a slab (slab.cuh) and keeps as much of it as fits into shared memory. The
// slices of a group exchange their moments through global memory and wait for each other (a
// cooperative launch: all blocks are resident), then each writes its slab: what it kept, and what
// it must read again, last read first, because that is still in the L2 cache. Dynamic shared memory:
// slots * 2 * THREADS vectors.
// Absent parts are null pointers. Constants: DTYPE, PARAMETER, CHANNELS_LAST, VECTOR, LANES.
#define THREADS 640  // with up to 96 registers each, none is spilled
#include "slab.cuh"

// Every slice of the group has arrived. `arrivals` returns to its value modulo 2^31 at each use: the
// slices add up to 2^31 together, and wait for its top bit to flip.
DEVICE void wait_for_group(u32* arrivals, int slice, int slices) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const u32 before = atomicAdd(arrivals, slice == 0 ? 0x80000000u - (slices - 1) : 1u);
    u32 now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
    } while (((now ^ before) & 0x80000000u) == 0);
  }
  __syncthreads();
}

struct Finish {
  float center[SUMS], scale[SUMS], shift[SUMS], lower;  // (x - center) * scale + shift is the normalised value

  DEVICE Vector<VECTOR> operator()(const Vector<VECTOR>& in, const element* residual) const {
    float out[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
      const int s = SUMS == 1 ? 0 : v;
      out[v] = clamp_below(fmaf(to_float<DTYPE>(in.values[v]) - center[s], scale[s], shift[s]), lower);
    }
    if (residual) {
      const Vector<VECTOR> more = load<VECTOR>(residual);
#pragma unroll
      for (int v = 0; v < VECTOR; v++) out[v] += to_float<DTYPE>(more.values[v]);
    }
    return from_floats(out);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) instance_norm(
    const element* __restrict__ x, const element* __restrict__ residual, element* __restrict__ out,
    const parameter* weight, const parameter* bias, Moments* published, u32* arrivals, float eps, float lower,
    i64 channels, i64 pixels, int slices, int slots) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Moments result[GROUP];
  Vector<VECTOR>* ring = reinterpret_cast<Vector<VECTOR>*>(shared);
  const Slab slab(x, channels, pixels, slices);
  Finish finish;
  finish.lower = lower;
  float bases[SUMS];
  load_bases(slab, bases);
  reduce_slab(slab, bases, ring, slots, result);
  float gamma[SUMS];  // on its way while the slices wait for each other
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
    const i64 channel = (slab.group * GROUP + slab.lane * SUMS + s) % channels;
    gamma[s] = weight ? to_float<PARAMETER>(weight[channel]) : 1.f;
    finish.shift[s] = bias ? to_float<PARAMETER>(bias[channel]) : 0.f;
  }
  if (slices > 1) {
    publish(published, slab, slices, result);
    wait_for_group(arrivals + slab.group, slab.slice, slices);
    merge_slices(published, slab, slices, result);
  }
  const float inverse = 1.f / (float)pixels;
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
    const Moments total = result[slab.lane * SUMS + s];
    finish.scale[s] = gamma[s] * inverse_sqrt(total.m2 * inverse + eps);
    // The mean, and what rounding it lost, which is not small beside sigma when the mean is large.
    finish.center[s] = bases[s] + total.mean;
    const float lost = (bases[s] - finish.center[s]) + total.mean;
    finish.shift[s] = fmaf(-lost, finish.scale[s], finish.shift[s]);
  }
  const i64 offset = slab.base - x;
  const int steps = slab.steps, first_kept = steps > slots ? steps - slots : 0;
  int slot = steps > slots ? steps % slots : 0;
#pragma unroll 2
  for (int i = first_kept; i < steps; i++) {
    const Vector<VECTOR>* held = ring + slot * 2 * THREADS + threadIdx.x;
    const i64 one = offset + slab.first + i * slab.stride, two = one + slab.second;
    const Vector<VECTOR> in_one = held[0], in_two = held[THREADS];
    store<VECTOR>(out + one, finish(in_one, residual ? residual + one : nullptr));
    if (slab.has_second(i)) store<VECTOR>(out + two, finish(in_two, residual ? residual + two : nullptr));
    slot = slot + 1 == slots ? 0 : slot + 1;
  }
#pragma unroll 2
  for (int i = first_kept - 1; i >= 0; i--) {  // never the last step: it was kept
    const i64 one = offset + slab.first + i * slab.stride, two = one + slab.second;
    const Vector<VECTOR> in_one = load<VECTOR>(x + one), in_two = load<VECTOR>(x + two);
    store<VECTOR>(out + one, finish(in_one, residual ? residual + one : nullptr));
    store<VECTOR>(out + two, finish(in_two, residual ? residual + two : nullptr));
  }
}
