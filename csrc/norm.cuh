// The affine map per (image, channel) that an instance norm, or a norm with running statistics, comes to.
#pragma once
#include "elements.cuh"

// x * scale + shift is the normalised value, in one rounding.
struct Affine {
  float scale, shift;
  DEVICE float operator()(float x) const { return fmaf(x, scale, shift); }
};

DEVICE Affine affine_of(float mean, float variance, float eps, float weight, float bias) {
  const float scale = inverse_sqrt(variance + eps) * weight;
  return {scale, fmaf(-mean, scale, bias)};
}

struct Norm {
  const float *mean, *variance;  // (N, C), or (C) where image_stride is 0
  const parameter *weight, *bias;
  float eps;
  i64 image_stride, weight_stride, bias_stride;  // from an image to the next; 0 where all have the same

  DEVICE Affine at(i64 image, i64 channel) const {
    if (!mean) return {1.f, 0.f};
    // Four loads side by side.
    const float m = mean[image * image_stride + channel], v = variance[image * image_stride + channel];
    const float w = weight ? to_float<PARAMETER>(weight[image * weight_stride + channel]) : 1.f;
    const float b = bias ? to_float<PARAMETER>(bias[image * bias_stride + channel]) : 0.f;
    return affine_of(m, v, eps, w, b);
  }
};
