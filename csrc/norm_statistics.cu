// The statistics that a norm uses, out of those of every (image, channel): merged over groups of channels,
// unbiased, and with an eps that stands beside the root.
//
//   M = E[m],  V = E[v + (m - M)^2],  U = V * bessel,  variance = U or (sqrt(U) + outer_eps)^2
//
// One warp a group, which writes all of its channels; a group has `channels` of them. Means are summed relative
// to the group's first, in an order that depends on shapes alone. Constants: DTYPE and PARAMETER (unused).
#include "dependent_launch.cuh"
#include "elements.cuh"

// The sum over a warp, the same bits in every lane.
DEVICE float warp_sum(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// Grid (ceil(groups / 8)), 256 threads. `outer_eps` counts where `beside_root` is not 0.
extern "C" __global__ void __launch_bounds__(256) norm_statistics(
    const float* mean, const float* variance, float* out_mean, float* out_variance, i64 groups, int channels,
    float bessel, float outer_eps, int beside_root) {
  launch_dependents();
  wait_for_previous();
  const i64 group = (i64)blockIdx.x * 8 + threadIdx.x / 32;
  if (group >= groups) return;
  const int lane = threadIdx.x % 32;
  const i64 first = group * channels;
  const float pivot = mean[first], share = 1.f / (float)channels;
  float sum = 0.f;
  for (int c = lane; c < channels; c += 32) sum += mean[first + c] - pivot;
  const float shift = warp_sum(sum) * share;
  sum = 0.f;
  for (int c = lane; c < channels; c += 32) {
    const float delta = (mean[first + c] - pivot) - shift;
    sum += fmaf(delta, delta, variance[first + c]);
  }
  float merged = warp_sum(sum) * share * bessel;
  if (beside_root) {
    float root = sqrtf(merged) + outer_eps;
    // All pixels are the mean: what divides them does not matter, but x * scale + shift must not lose its digits.
    if (merged == 0.f && outer_eps > 0.f) root = fmaxf(root, fabsf(pivot + shift) * 0x1p-10f);
    merged = root * root;
  }
  for (int c = lane; c < channels; c += 32) out_mean[first + c] = pivot + shift, out_variance[first + c] = merged;
}
