// A whole instance norm of small contiguous planes, one block a plane: each pixel is read once,
// stays in the registers of its thread while the plane's statistics are formed, and is written once.
//
//   out = act((x - mean) / sqrt(variance + eps) * weight + bias) + residual
//
// Grid (planes), blockDim.x a multiple of 32 up to 512, VECTOR * HELD * blockDim.x >= pixels.
// Absent parts are null pointers. Constants: DTYPE, PARAMETER, VECTOR, HELD (vectors a thread keeps), ACTIVATION (of
// activation.cuh). Pixels are a multiple of VECTOR and planes start on a vector.
#include "activation.cuh"
#include "moments.cuh"

// The moments of a whole block, valid in every thread.
DEVICE Moments block_merge(Moments a) {
  __shared__ Moments warps[16];
  __shared__ Moments total;
  a = warp_merge(a);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = a;
  __syncthreads();
  if (threadIdx.x < 32) {
    a = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : Moments{0.f, 0.f, 0.f};
    a = warp_merge(a);
    if (threadIdx.x == 0) total = a;
  }
  __syncthreads();
  return total;
}

extern "C" __global__ void __launch_bounds__(512, 1) instance_norm_plane(
    const element* __restrict__ x, const element* __restrict__ residual, element* __restrict__ out,
    const parameter* weight, const parameter* bias, i64 weight_stride, i64 bias_stride,
    float eps, Activation activation, int channels,    int pixels) {
  const i64 plane = (i64)blockIdx.x * pixels;
  const int image = blockIdx.x / (u32)channels, channel = blockIdx.x % channels;
  const int stride = blockDim.x * VECTOR, first = threadIdx.x * VECTOR;
  const element* from = x + plane;
  const float base = to_float<DTYPE>(from[0]);
  Vector<VECTOR> held[HELD];
#pragma unroll
  for (int h = 0; h < HELD; h++)
    if (first + h * stride < pixels) held[h] = load<VECTOR>(from + first + h * stride);
  Accumulator sums;
  sums.start(first < pixels ? to_float<DTYPE>(held[0].values[0]) : base);
  int seen = 0;
#pragma unroll
  for (int h = 0; h < HELD; h++)
    if (first + h * stride < pixels) {
#pragma unroll
      for (int v = 0; v < VECTOR; v++) sums.add(to_float<DTYPE>(held[h].values[v]));
      seen += VECTOR;
    }
  const Moments total = block_merge(sums.moments((float)seen, seen ? 1.f / (float)seen : 0.f, base));
  float scale = inverse_sqrt(total.m2 / (float)pixels + eps), shift = 0.f;
  if (weight) scale *= to_float<PARAMETER>(weight[image * weight_stride + channel]);
  if (bias) shift = to_float<PARAMETER>(bias[image * bias_stride + channel]);
  // The mean, and what rounding it lost, which is not small beside sigma when the mean is large.
  const float center = base + total.mean;
  shift = fmaf((center - base) - total.mean, scale, shift);
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int at = first + h * stride;
    if (at < pixels) {
      Vector<VECTOR> more;
      float values[VECTOR];
      if (residual) more = load<VECTOR>(residual + plane + at);
#pragma unroll
      for (int v = 0; v < VECTOR; v++) {
        float value = fmaf(to_float<DTYPE>(held[h].values[v]) - center, scale, shift);
        value = activate_and_scale<ACTIVATION>(value, activation);
        if (residual) value += to_float<DTYPE>(more.values[v]);
        values[v] = value;
      }
      store<VECTOR>(out + plane + at, from_floats(values));
    }
  }
}
