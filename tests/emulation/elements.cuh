// csrc/elements.cuh without its instructions.
#pragma once
#include "emulator.h"

template <int kDtype> struct Storage { typedef u16 type; };
template <> struct Storage<0> { typedef float type; };
template <int kDtype> DEVICE float to_float(typename Storage<kDtype>::type value);
template <> DEVICE float to_float<0>(float value) { return value; }
template <> DEVICE float to_float<1>(u16 value) { return (float)emulator::argument<_Float16>(value); }
template <> DEVICE float to_float<2>(u16 value) { return __uint_as_float((u32)value << 16); }
template <int kDtype> DEVICE typename Storage<kDtype>::type from_float(float value);
template <> DEVICE float from_float<0>(float value) { return value; }
template <> DEVICE u16 from_float<1>(float value) {
  const _Float16 half = (_Float16)value;
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <> DEVICE u16 from_float<2>(float value) {
  const u32 bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE float inverse_sqrt(float v) { return (float)(1 / std::sqrt((double)v)); }
template <int kDtype> DEVICE u32 pack(float first, float second) {
  return from_float<kDtype>(first) | (u32)from_float<kDtype>(second) << 16;
}
typedef Storage<DTYPE>::type element;
typedef Storage<PARAMETER>::type parameter;
DEVICE float low(u32 pair) { return to_float<DTYPE ? DTYPE : 1>((u16)pair); }
DEVICE float high(u32 pair) { return to_float<DTYPE ? DTYPE : 1>((u16)(pair >> 16)); }
DEVICE float clamp_below(float y, float lower) { return y != y || y > lower ? y : lower; }
template <int kCount> struct alignas(kCount * sizeof(element)) Vector {
  element values[kCount];
};
template <int kCount> DEVICE void store(element* to, const Vector<kCount>& vector) {
  if ((uintptr_t)to % sizeof(vector)) emulator::fail("a store that is not aligned");
  *reinterpret_cast<Vector<kCount>*>(to) = vector;
}
template <int kCount> DEVICE Vector<kCount> from_floats(const float (&values)[kCount]) {
  Vector<kCount> out;
  for (int i = 0; i < kCount; i++) out.values[i] = from_float<DTYPE>(values[i]);
  return out;
}
template <int kCount> DEVICE Vector<kCount> load(const element* from) {
  if ((uintptr_t)from % sizeof(Vector<kCount>)) emulator::fail("a load that is not aligned");
  return *reinterpret_cast<const Vector<kCount>*>(from);
}
