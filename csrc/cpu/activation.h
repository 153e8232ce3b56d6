// The activations of sf_compile/activations.py, as PyTorch computes them, NaN and infinity included.
#pragma once

#include <cmath>

#include "elements.h"

enum Function : int64_t { NONE, RELU, LEAKY_RELU, BOUNDS, TANH, SIGMOID, SILU, GELU, GELU_TANH, ELU };

// scale * function(x) + offset; `parameters` are a slope, two bounds, or ELU's alpha.
struct Activation {
  int64_t function;
  double parameters[2];
  double scale, offset;
};

// What a loop is compiled for: no activation, a ReLU, a leaky one, or any of them by a switch.
enum Kind { PLAIN, RECTIFIED, LEAKY, ANY };

inline Kind kind_of(const Activation& a) {
  static_assert(NONE == int(PLAIN) && RELU == int(RECTIFIED) && LEAKY_RELU == int(LEAKY));
  return a.scale != 1 || a.offset != 0 || a.function > LEAKY_RELU ? ANY : static_cast<Kind>(a.function);
}

inline Floats leaky(Floats x, const Activation& a) {
  return Floats::blendv(x * Floats(static_cast<float>(a.parameters[0])), x, x > Floats(0.f));
}

inline Floats sigmoid(Floats x) { return Floats(1.f) / (Floats(1.f) + x.neg().exp()); }

inline Floats apply_any(Floats x, const Activation& a) {
  const Floats p(static_cast<float>(a.parameters[0])), zero(0.f), one(1.f), half(.5f);
  switch (a.function) {
    case RELU: x = at::vec::clamp_min(x, zero); break;
    case LEAKY_RELU: x = leaky(x, a); break;
    case BOUNDS: x = at::vec::clamp(x, p, Floats(static_cast<float>(a.parameters[1]))); break;
    case TANH: x = x.tanh(); break;
    case SIGMOID: x = sigmoid(x); break;
    case SILU: x = x / (one + x.neg().exp()); break;
    case GELU: x = x * half * (one + (x * Floats(static_cast<float>(M_SQRT1_2))).erf()); break;
    case GELU_TANH: {
      const Floats inner = Floats(static_cast<float>(M_SQRT2 * M_2_SQRTPI * .5)) * (x + Floats(.044715f) * x * x * x);
      x = half * x * (one + inner.tanh());
      break;
    }
    case ELU: x = Floats::blendv(p * x.expm1(), x, x > zero); break;
    default: break;
  }
  return x * Floats(static_cast<float>(a.scale)) + Floats(static_cast<float>(a.offset));
}

template <Kind kind>
inline Floats apply(Floats x, const Activation& a) {
  if constexpr (kind == PLAIN) return x;
  if constexpr (kind == RECTIFIED) return at::vec::clamp_min(x, Floats(0.f));
  if constexpr (kind == LEAKY) return leaky(x, a);
  return apply_any(x, a);
}
