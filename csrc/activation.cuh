// The functions of one number that the kernels apply. Which one is a compile-time constant, its parameters are not.
#pragma once
#include "elements.cuh"

#define IDENTITY 0
#define RECTIFIED 1   // max(y, 0)
#define FLOOR 2       // max(y, first): a ReLU or, from -infinity on, none; one kernel for both
#define LEAKY 3       // y, and below 0 first * y
#define CLAMPED 4     // min(max(y, first), second)
#define TANH 5
#define SIGMOID 6
#define SILU 7        // y * sigmoid(y)
#define GELU 8
#define GELU_TANH 9   // GELU's approximation by tanh
#define ELU 10        // y, and below 0 first * (exp(y) - 1)
#define PRELU 11      // y, and below 0 first * y, where first is the channel's own; of normalize.cu alone

// What is applied is scale * function(y) + offset; the first three are never scaled.
struct Activation {
  float first, second, scale, offset;
};

// min(y, upper) that keeps NaN.
DEVICE float clamp_above(float y, float upper) {
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(y), "f"(upper));
  return out;
}

// 1 / y to the last bit or two, without the branches of a division; of infinity it is 0.
DEVICE float reciprocal(float y) {
  float out;
  asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(y));
  return out;
}

// The function alone. As in PyTorch: NaN stays NaN, also where that takes 0 * infinity.
template <int kFunction> DEVICE float activate(float y, const Activation& a) {
  if constexpr (kFunction == RECTIFIED) return clamp_below(y, 0.f);
  if constexpr (kFunction == FLOOR) return clamp_below(y, a.first);
  if constexpr (kFunction == LEAKY || kFunction == PRELU) return y > 0.f ? y : y * a.first;
  if constexpr (kFunction == CLAMPED) return clamp_above(clamp_below(y, a.first), a.second);
  if constexpr (kFunction == TANH) return tanhf(y);
  if constexpr (kFunction == SIGMOID) return reciprocal(1.f + expf(-y));
  if constexpr (kFunction == SILU) return y * reciprocal(1.f + expf(-y));
  if constexpr (kFunction == GELU) return 0.5f * y * (1.f + erff(y * 0.70710678f));
  if constexpr (kFunction == GELU_TANH)
    return 0.5f * y * (1.f + tanhf(0.79788456f * fmaf(0.044715f * y * y, y, y)));
  if constexpr (kFunction == ELU) return y > 0.f ? y : a.first * expm1f(y);
  return y;
}

// The function and, where it may have one, the affine map behind it.
template <int kFunction> DEVICE float activate_and_scale(float y, const Activation& a) {
  const float value = activate<kFunction>(y, a);
  return kFunction <= FLOOR ? value : fmaf(value, a.scale, a.offset);
}
