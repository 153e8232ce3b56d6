// Mean and variance of every (image, channel) in the epilogue of a convolution, the same bits on every run.
//
// Each thread sums its pixels of a channel in a fixed order, in fp32 about a pivot (one of the first pixels: a
// mean many deviations from zero then costs no digits, and nothing but the pivot is left of a constant). Blocks add
// their sums as 64-bit fixed-point numbers, which is associative, so their order does not matter; the block that takes
// the last ticket turns the totals into means and variances and leaves the workspace zeroed for the next launch on the
// stream.
#pragma once
#include "elements.cuh"

// A share of a mean or of a mean square is a whole number (below 2^62 in magnitude) and a fraction in these units.
#define FRACTION_UNITS 1099511627776.0  // 2^40

// Blocks add to one of several copies of the totals: additions to one address are done one after another, and
// those of a warp to neighbouring addresses together.
#ifndef COPIES
#define COPIES 8
#endif

// Words from one sector of 32 bytes to the next: 4 where they are neighbours.
#ifndef SECTOR_STRIDE
#define SECTOR_STRIDE 4
#endif

// Zero before the first launch. After the tickets: the whole numbers and the fractions of the mean, then of the mean
// square, of every (image, channel), COPIES times; then how many shares of it were not finite, and a count of what was
// added.
struct SumsWorkspace {
  u32 tickets, arrivals, unused[2];  // arrivals: of blocks that wait for each other (csrc/residual_trunk.cu)
  u64 totals[1];

  DEVICE u64* word(i64 i) { return totals + (SECTOR_STRIDE == 4 ? i : i / 4 * SECTOR_STRIDE + i % 4); }
  DEVICE u64* at(i64 channels, int copy, int part, i64 channel) { return word((copy * 4 + part) * channels + channel); }
  DEVICE u64* not_finite(i64 channels, i64 channel) { return word(COPIES * 4 * channels + channel); }
  // A count that goes with the channel, for `completes`.
  DEVICE u32* count(i64 channels, i64 channel) { return (u32*)word((COPIES * 4 + 1) * channels + channel); }
};

// The pixels of one channel that one thread has seen.
struct PivotSum {
  float pivot, sum, squares;

  DEVICE void start(float first) { pivot = first, sum = 0.f, squares = 0.f; }
  DEVICE void add(float x) {
    const float d = x - pivot;
    sum += d;
    squares = fmaf(d, d, squares);
  }
  DEVICE void add(float x, bool counts) {
    const float d = counts ? x - pivot : 0.f;
    sum += d;
    squares = fmaf(d, d, squares);
  }
  // Sum and sum of squares of `count` pixels about zero.
  DEVICE double about_zero(int count) const { return (double)sum + (double)pivot * count; }
  DEVICE double squares_about_zero(int count) const {
    return (double)squares + (double)pivot * (2.0 * (double)sum + (double)pivot * count);
  }
};

// Add one thread's share of (image, channel) number `channel` of `channels`: its sum, or its sum of squares, over the
// pixels of the plane.
DEVICE void add_share(SumsWorkspace* workspace, int copy, i64 channels, i64 channel, bool squares, double share) {
  if (!(fabs(share) < 4.6e18)) {  // a conversion of infinity or NaN to an integer would hide it
    atomicAdd(workspace->not_finite(channels, channel), 1ull);
    return;
  }
  const double whole = floor(share);
  atomicAdd(workspace->at(channels, copy, 2 * squares, channel), (u64)__double2ll_rn(whole));
  const double fraction = (share - whole) * FRACTION_UNITS;
  atomicAdd(workspace->at(channels, copy, 2 * squares + 1, channel), (u64)__double2ll_rn(fraction));
}

// What four lanes (a quad) have seen of the same two channels, each lane of other pixels.
struct QuadSums {
  PivotSum sums[2];
  int count;  // pixels that this lane has seen of either

  // Add them to (image, channel) numbers `first` and `first + distance` of `channels`, those below `end`.
  DEVICE void flush(SumsWorkspace* workspace, int copy, i64 channels, i64 first, int distance, i64 end,
                    double per_pixel) {
    double shares[4] = {sums[0].about_zero(count), sums[1].about_zero(count), sums[0].squares_about_zero(count),
                        sums[1].squares_about_zero(count)};
    count = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) shares[i] += __shfl_xor_sync(~0u, shares[i], lanes);
    const bool second = threadIdx.x & 1, squares = threadIdx.x & 2;  // what this lane of the four adds
    const double share = squares ? (second ? shares[3] : shares[2]) : (second ? shares[1] : shares[0]);
    const i64 channel = first + (second ? distance : 0);
    if (channel < end) add_share(workspace, copy, channels, channel, squares, share * per_pixel);
  }
};

// Before other blocks' writes are read, and after one's own that they will read.
DEVICE void gpu_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Mean and variance of (image, channel) number `channel` of `channels`, when every block has added its shares.
DEVICE void load_total(SumsWorkspace* workspace, i64 channels, i64 channel, float& mean, float& variance) {
  // Written by other blocks of this launch: not to be taken from this SM's L1.
  const bool finite = __ldcg(workspace->not_finite(channels, channel)) == 0;
  u64 total[4] = {0, 0, 0, 0};
#pragma unroll
  for (int copy = 0; copy < COPIES; copy++)
#pragma unroll
    for (int part = 0; part < 4; part++) total[part] += __ldcg(workspace->at(channels, copy, part, channel));
  const double m = (double)(i64)total[0] + (double)total[1] / FRACTION_UNITS;
  const double v = (double)(i64)total[2] + (double)total[3] / FRACTION_UNITS - m * m;
  mean = finite ? (float)m : __int_as_float(0x7fffffff);
  variance = finite ? (float)fmax(v, 0.0) : __int_as_float(0x7fffffff);
}

// As it was before anything was added.
DEVICE void clear_total(SumsWorkspace* workspace, i64 channels, i64 channel) {
#pragma unroll
  for (int part = 0; part < 4 * COPIES; part++) *workspace->at(channels, 0, part, channel) = 0;
  *workspace->not_finite(channels, channel) = 0;
}

// Called by `threads` threads after their last add_share: whether theirs, which count for `share`, complete `whole`;
// then they see what all have added, and the count is 0 again. `thread` counts them from 0, `barrier` is a hardware
// barrier of theirs.
DEVICE bool completes(u32* count, u32 share, u32 whole, int thread, int threads, int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  u32 last = 0;
  if (thread == 0) {
    gpu_fence();  // for all threads that passed the barrier
    last = atomicAdd(count, share) + share == whole;
    if (last) *count = 0;
  }
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %0, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "+r"(last)
      : "r"(barrier), "r"(threads)
      : "memory");
  if (last) gpu_fence();
  return last;
}

// Likewise, of every block; the last one writes mean and variance of `channels` entries.
DEVICE void finish_sums(SumsWorkspace* workspace, int channels, float* mean, float* variance, int thread, int threads,
                        int barrier) {
  if (!completes(&workspace->tickets, 1, gridDim.x, thread, threads, barrier)) return;
  for (int i = thread; i < channels; i += threads) {
    load_total(workspace, channels, i, mean[i], variance[i]);
    clear_total(workspace, channels, i);
  }
}
