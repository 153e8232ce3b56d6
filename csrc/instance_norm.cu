// A whole instance norm in one launch:
//
//   out = act((x - mean) / sqrt(variance + eps) * weight + bias) + residual
//
// Each block reduces a slab (slab.cuh) and keeps as much of it as fits into shared memory. The
// slices of a group exchange their moments through global memory and wait for each other (a
// cooperative launch: all blocks are resident), then each writes its slab: what it kept, and what
// it must read again, last read first, because that is still in the L2 cache. Dynamic shared memory:
// slots * 2 * THREADS vectors, slots >= AHEAD.
//
// `published`, groups * slices * GROUP words, is of one phase before the launch and of the other after it.
// Absent parts are null pointers. Constants: DTYPE, PARAMETER, CHANNELS_LAST, VECTOR, LANES, ACTIVATION (of
// activation.cuh).
#define THREADS 640  // with up to 96 registers each, none is spilled
#include "activation.cuh"
#include "slab.cuh"

// (x - center) * scale + shift is the normalised value.
struct Maps {
  float center[GROUP], scale[GROUP], shift[GROUP];
};

// The map of channel threadIdx.x of the group, whose moments are known.
DEVICE void set_map(Maps& maps, const Part& total, float base, float pixels, float eps, float gamma,
                    float beta) {
  const float scale = gamma * inverse_sqrt(total.m2 / pixels + eps), center = base + total.mean;
  // What rounding the mean lost, which is not small beside sigma when the mean is large.
  const float lost = (base - center) + total.mean;
  maps.center[threadIdx.x] = center;
  maps.scale[threadIdx.x] = scale;
  maps.shift[threadIdx.x] = fmaf(-lost, scale, beta);
}

struct Finish {
  float center[SUMS], scale[SUMS], shift[SUMS];
  Activation activation;

  DEVICE Finish(const Maps& maps, int lane, const Activation& activation) : activation(activation) {
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
      const int channel = lane * SUMS + s;
      center[s] = maps.center[channel], scale[s] = maps.scale[channel], shift[s] = maps.shift[channel];
    }
  }
  // `more`, if not null, is added to the result.
  DEVICE Vector<VECTOR> operator()(const Vector<VECTOR>& in, const Vector<VECTOR>* more) const {
    float out[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
      const int s = SUMS == 1 ? 0 : v;
      const float normed = fmaf(to_float<DTYPE>(in.values[v]) - center[s], scale[s], shift[s]);
      out[v] = activate_and_scale<ACTIVATION>(normed, activation);
    }
    if (more) {
#pragma unroll
      for (int v = 0; v < VECTOR; v++) out[v] += to_float<DTYPE>(more->values[v]);
    }
    return from_floats(out);
  }
};

// A thread's two vectors of one step.
struct Pair {
  Vector<VECTOR> one, two;

  DEVICE void read(const element* from, i64 second, bool both) {
    one = load<VECTOR>(from);
    if (both) two = load<VECTOR>(from + second);
  }
};

// Write the slab: first the steps that are still in the ring, then those that must be read again, last read
// first.
template <bool kResidual>
DEVICE void write_slab(const Slab& slab, const Finish& finish, const element* x, const element* residual,
                       element* out, const Vector<VECTOR>* ring, int slots) {
  const i64 offset = slab.base - x + slab.first, stride = slab.stride, second = slab.second;
  const int steps = slab.steps, left = max(steps - slots, 0);
  const auto write = [&](int step, bool both, const Pair& in, const Pair& more) {
    element* to = out + offset + step * stride;
    store<VECTOR>(to, finish(in.one, kResidual ? &more.one : nullptr));
    if (both) store<VECTOR>(to + second, finish(in.two, kResidual ? &more.two : nullptr));
  };
  int slot = left ? steps % slots : 0;
  Pair next_more;
  if (kResidual && steps)
    next_more.read(residual + offset + left * stride, second, slab.has_second(left));
  for (int step = left; step < steps; step++) {
    const Pair more = next_more;
    if (kResidual && step + 1 < steps)
      next_more.read(residual + offset + (step + 1) * stride, second, slab.has_second(step + 1));
    const Vector<VECTOR>* held = ring + slot * 2 * THREADS + threadIdx.x;
    const Pair in = {held[0], held[THREADS]};
    write(step, slab.has_second(step), in, more);
    slot = slot + 1 == slots ? 0 : slot + 1;
  }
  constexpr int kTogether = kResidual ? 2 : 4;  // steps; none is the slab's last, so all have two vectors
  for (int to_do = left; to_do > 0; to_do -= kTogether) {
    Pair in[kTogether], more[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (i >= to_do) continue;
      const i64 at = offset + (to_do - 1 - i) * stride;
      in[i].read(x + at, second, true);
      if (kResidual) more[i].read(residual + at, second, true);
    }
#pragma unroll
    for (int i = 0; i < kTogether; i++)
      if (i < to_do) write(to_do - 1 - i, true, in[i], more[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) instance_norm(
    const element* __restrict__ x, const element* __restrict__ residual, element* __restrict__ out,
    const parameter* weight, const parameter* bias, u64* published, i64 weight_stride,
    i64 bias_stride, float eps, Activation activation,    int channels, i64 pixels, int turns, int rest, int slots) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Meeting meeting;
  __shared__ __align__(16) Maps maps;
  Vector<VECTOR>* ring = reinterpret_cast<Vector<VECTOR>*>(shared);
  const Slab slab(x, channels, pixels, turns, rest);
  const bool alone = gridDim.y == 1, leads = threadIdx.x < GROUP;  // thread c leads channel c
  const u32 phase = alone ? 0 : phase_of(peek(word_of(published, blockIdx.y))) ^ 1;
  element base = 0;  // needed at the end, but on their way from now
  parameter gamma = 0, beta = 0;
  if (leads) {
    base = base_of_channel(slab);
    if (weight) gamma = weight[slab.image * weight_stride + slab.channel + threadIdx.x];
    if (bias) beta = bias[slab.image * bias_stride + slab.channel + threadIdx.x];
  }
  float bases[SUMS];
  load_bases(slab, bases);
  Part total = reduce_slab(slab, bases, ring, slots, meeting);
  if (!alone) {
    if (leads) publish(published, phase, total);
    __syncthreads();  // `meeting` is used again
    total = merge_slices(published, phase, slab, pixels, meeting);
  }
  if (leads)
    set_map(maps, total, to_float<DTYPE>(base), (float)pixels, eps, weight ? to_float<PARAMETER>(gamma) : 1.f,
            bias ? to_float<PARAMETER>(beta) : 0.f);
  __syncthreads();
  const Finish finish(maps, slab.lane, activation);
  if (residual) write_slab<true>(slab, finish, x, residual, out, ring, slots);
  else write_slab<false>(slab, finish, x, residual, out, ring, slots);
}
