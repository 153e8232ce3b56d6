// How the statistics kernels cut a picture: a *slab* is the share of one block in one group of
// channels.
//
//   channels_last   a group is LANES x VECTOR neighbouring channels of an image (up to 64 bytes a
//                   pixel, so that few slices meet in one channel); threads are LANES x rows
//   contiguous      a group is one plane
//
// The slices of a group are blocks gridDim.x apart by one: block = group * slices + slice. A *step* of
// a thread is two vectors, ROWS positions (pixels, or vectors of a plane) apart.
// Constants: CHANNELS_LAST, VECTOR (elements an access), LANES (a power of two; 1 if contiguous). The
// including source defines THREADS, a multiple of 32 x LANES.
#pragma once
#include "moments.cuh"

#define ROWS (THREADS / LANES)
#define WARPS (THREADS / 32)
#define AHEAD 3  // steps of a thread that are on their way into shared memory

#if CHANNELS_LAST
#define SUMS VECTOR               // accumulators a thread: one for each channel of its vector
#define GROUP (LANES * VECTOR)    // channels of a group
#else
#define SUMS 1
#define GROUP 1
#endif

struct Slab {
  const element* base;  // the group's first pixel, at this thread's channels
  i64 group, first;     // first: elements from base to this thread's step 0
  i64 stride, second;   // elements from one step of this thread to its next, and to its second vector
  int slice, lane, steps;
  bool whole;           // whether the last step has a second vector

  // `channels` a pixel and `pixels` an image. Slices take turns, a step at a time, so that all blocks
  // read neighbouring addresses.
  DEVICE Slab(const element* x, i64 channels, i64 pixels, int slices) {
    group = blockIdx.x / slices, slice = (int)(blockIdx.x % slices), lane = threadIdx.x % LANES;
    const i64 row = (i64)slice * 2 * ROWS + threadIdx.x / LANES, turn = (i64)slices * 2 * ROWS;
#if CHANNELS_LAST
    const i64 groups = channels / GROUP, positions = pixels, unit = channels;
    base = x + group / groups * pixels * channels + group % groups * GROUP + lane * VECTOR;
#else
    const i64 positions = pixels / VECTOR, unit = VECTOR;
    base = x + group * pixels;
#endif
    first = row * unit, second = ROWS * unit, stride = turn * unit;
    steps = row < positions ? (int)((positions - row - 1) / turn) + 1 : 0;
    whole = row + (steps - 1) * turn + ROWS < positions;
  }
  DEVICE bool has_second(int step) const { return step + 1 < steps || whole; }
  DEVICE int vectors() const { return steps ? 2 * steps - !whole : 0; }
};

// The number that this thread's channel `s` keeps its means relative to: the group's first pixel.
DEVICE void load_bases(const Slab& slab, float (&bases)[SUMS]) {
#if CHANNELS_LAST
  const Vector<VECTOR> head = load<VECTOR>(slab.base);
#pragma unroll
  for (int s = 0; s < SUMS; s++) bases[s] = to_float<DTYPE>(head.values[s]);
#else
  bases[0] = to_float<DTYPE>(slab.base[0]);
#endif
}

DEVICE void add(Accumulator (&sums)[SUMS], const Vector<VECTOR>& vector) {
#pragma unroll
  for (int v = 0; v < VECTOR; v++) sums[SUMS == 1 ? 0 : v].add(to_float<DTYPE>(vector.values[v]));
}

// A thread's vectors pass through a ring of `slots` slots of its own in shared memory: no thread
// reads another's, so no barrier is needed, and the last `slots` steps are still there at the end.
DEVICE void fetch(Vector<VECTOR>* slot, const element* from) {
  if constexpr (sizeof(Vector<VECTOR>) >= 4) {
    const u32 to = (u32)__cvta_generic_to_shared(slot);
    if constexpr (sizeof(Vector<VECTOR>) == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(sizeof(Vector<VECTOR>)) : "memory");
  } else {
    *slot = load<VECTOR>(from);  // one 16-bit element: too small for an asynchronous copy
  }
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory"); }

// Read the slab through `ring`, (slots, 2, THREADS) vectors with slots >= AHEAD; step i stays in slot
// i % slots until step i + slots. The group's moments over the slab are left in result[channel],
// relative to the bases, for all threads.
DEVICE void reduce_slab(const Slab& slab, const float (&bases)[SUMS], Vector<VECTOR>* ring, int slots,
                        Moments (&result)[GROUP]) {
  __shared__ Moments warps[GROUP][WARPS];
  Accumulator sums[SUMS];
  const element* next = slab.base + slab.first;
  Vector<VECTOR>* const mine = ring + threadIdx.x;
  Vector<VECTOR>* const end = mine + slots * 2 * THREADS;
  Vector<VECTOR>*to = mine, *from = mine;
  for (int i = 0; i < AHEAD; i++, next += slab.stride) {
    if (i < slab.steps) {
      fetch(to, next);
      if (slab.has_second(i)) fetch(to + THREADS, next + slab.second);
    }
    to += 2 * THREADS;
    commit();
  }
  if (to == end) to = mine;
  wait_for_oldest();
#pragma unroll
  for (int s = 0; s < SUMS; s++) sums[s].start(slab.steps ? to_float<DTYPE>(mine->values[s]) : bases[s]);
  for (int i = 0; i < slab.steps; i++, next += slab.stride) {
    wait_for_oldest();
    const Vector<VECTOR> one = from[0], two = from[THREADS];
    const bool both = slab.has_second(i);
    if (i + AHEAD < slab.steps) {
      fetch(to, next);
      if (slab.has_second(i + AHEAD)) fetch(to + THREADS, next + slab.second);
      to = to + 2 * THREADS == end ? mine : to + 2 * THREADS;
    }
    commit();
    from = from + 2 * THREADS == end ? mine : from + 2 * THREADS;
    add(sums, one);
    if (both) add(sums, two);
  }
  const int seen = slab.vectors();
  const int warp = threadIdx.x / 32;
  const float count = (float)seen * (CHANNELS_LAST ? 1 : VECTOR), inverse = seen ? 1.f / count : 0.f;
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
    const Moments merged = warp_merge(sums[s].moments(count, inverse, bases[s]), LANES);
    if (threadIdx.x % 32 < LANES) warps[slab.lane * SUMS + s][warp] = merged;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int channel = warp; channel < GROUP; channel += WARPS) {
    const Moments merged = warp_merge(lane < WARPS ? warps[channel][lane] : Moments{0.f, 0.f, 0.f});
    if (lane == 0) result[channel] = merged;
  }
  __syncthreads();
}

// Slabs publish their moments as (groups, GROUP, slices), so that a warp reads its channel's at once.
DEVICE void publish(Moments* published, const Slab& slab, int slices, const Moments (&result)[GROUP]) {
  if (threadIdx.x < GROUP)
    published[(slab.group * GROUP + threadIdx.x) * slices + slab.slice] = result[threadIdx.x];
}

// Merge what all slices of the group published, slice by slice in a fixed order.
DEVICE void merge_slices(const Moments* published, const Slab& slab, int slices, Moments (&result)[GROUP]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int channel = warp; channel < GROUP; channel += WARPS) {
    const Moments* from = published + (slab.group * GROUP + channel) * slices;
    Moments mine = {0.f, 0.f, 0.f};
#pragma unroll 4
    for (int s = lane; s < slices; s += 32) {
      // Written by other blocks of this launch: not to be taken from this SM's L1.
      const float* moments = reinterpret_cast<const float*>(from + s);
      mine = merge(mine, Moments{__ldcg(moments), __ldcg(moments + 1), __ldcg(moments + 2)});
    }
    mine = warp_merge(mine);
    if (lane == 0) result[channel] = mine;
  }
  __syncthreads();
}
