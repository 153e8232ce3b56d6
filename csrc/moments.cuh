// Count, mean and sum of squared deviations (M2) of a set of numbers, and how sets merge (Chan, Golub,
// LeVeque 1979). Merging is done in an order that depends on shapes alone, so the same picture gives the
// same bits on every run.
//
// Means are kept relative to a number near all of a channel's pixels (its first pixel): merging
// then loses no digits when the mean is many standard deviations away from zero.
#pragma once
#include "elements.cuh"

struct Moments {
  float count, mean, m2;
};

DEVICE Moments merge(const Moments& a, const Moments& b) {
  // Free of branches: an empty set has mean 0, and a share of 0 or 1 leaves the other's mean exact.
  const float count = a.count + b.count;
  const float share = __fdividef(b.count, fmaxf(count, 1.f)), delta = b.mean - a.mean;
  return {count, fmaf(delta, share, a.mean), a.m2 + b.m2 + delta * delta * a.count * share};
}

// Sums of x - origin and its square, where origin is the first number that this thread saw.
struct Accumulator {
  float origin, sum, squares;

  DEVICE void start(float first) { origin = first, sum = 0.f, squares = 0.f; }
  DEVICE void add(float x) {
    const float d = x - origin;
    sum += d;
    squares = fmaf(d, d, squares);
  }
  // inverse is 1 / count, or 0 of nothing: then origin must be base.
  DEVICE Moments moments(float count, float inverse, float base) const {
    const float shift = sum * inverse;
    return {count, (origin - base) + shift, clamp_below(fmaf(-sum, shift, squares), 0.f)};
  }
};

// Merge over the lanes of a warp; right in lane 0.
DEVICE Moments warp_merge(Moments a) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) {
    Moments b;
    b.count = __shfl_down_sync(0xffffffffu, a.count, lane);
    b.mean = __shfl_down_sync(0xffffffffu, a.mean, lane);
    b.m2 = __shfl_down_sync(0xffffffffu, a.m2, lane);
    a = merge(a, b);
  }
  return a;
}

// A set whose count its reader knows; one 8-byte access.
struct alignas(8) Part {
  float mean, m2;
};

// Many sets merged at once, without a division for each: sums about a pivot, the mean of the first set.
// The first must be no smaller than any other. Then it makes up at least 1/k of all k sets, its mean lies
// within sqrt(k) of their standard deviations, and the sums cancel by a factor of k + 1 at worst.
struct Pool {
  float pivot, sum, squares;

  DEVICE void start(float first_mean) { pivot = first_mean, sum = 0.f, squares = 0.f; }
  DEVICE void add(float count, const Part& part) {
    const float delta = part.mean - pivot, weighted = count * delta;
    sum += weighted;
    squares += fmaf(weighted, delta, part.m2);
  }
  DEVICE Part total(float count) const {
    const float shift = sum / fmaxf(count, 1.f);
    return {pivot + shift, clamp_below(fmaf(-sum, shift, squares), 0.f)};
  }
};
