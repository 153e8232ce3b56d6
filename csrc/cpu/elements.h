// Elements as vectors of floats: float itself, or bfloat16 converted on the way in and rounded on the way out.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

using Floats = at::vec::Vectorized<float>;
using c10::BFloat16;
constexpr int64_t LANES = Floats::size();

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

inline Floats load(const float* from) { return Floats::loadu(from); }
inline Floats load(const float* from, int64_t count) {
  return count == LANES ? load(from) : Floats::loadu(from, count);
}
inline void store(float* to, Floats x) { x.store(to); }
inline void store(float* to, Floats x, int64_t count) { x.store(to, count); }

inline Floats load(const BFloat16* from, int64_t count = LANES) {
  return at::vec::convert<float>(at::vec::Vectorized<BFloat16>::loadu(from, count));
}
inline void store(BFloat16* to, Floats x, int64_t count = LANES) { at::vec::convert<BFloat16>(x).store(to, count); }
