// Element types and vector access, shared by every kernel. Self-contained on purpose: NVRTC on a
// plain `pip install torch` finds no CUDA header, so these sources include none.
//
// Compile-time constants: DTYPE (0 float32, 1 float16, 2 bfloat16) is the dtype of pictures,
// PARAMETER the dtype of norm weights and biases.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

#define INT8 3   // of numbers rounded to multiples of a unit: written by csrc/normalize.cu alone
#define UINT8 4
template <int kDtype> struct Storage { typedef u16 type; };
template <> struct Storage<0> { typedef float type; };
template <> struct Storage<INT8> { typedef signed char type; };
template <> struct Storage<UINT8> { typedef unsigned char type; };

DEVICE float half_to_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <int kDtype> DEVICE float to_float(typename Storage<kDtype>::type value);
template <> DEVICE float to_float<0>(float value) { return value; }
template <> DEVICE float to_float<1>(u16 value) { return half_to_float(value); }
template <> DEVICE float to_float<2>(u16 value) { return __uint_as_float((u32)value << 16); }

template <int kDtype> DEVICE typename Storage<kDtype>::type from_float(float value);
template <> DEVICE float from_float<0>(float value) { return value; }
template <> DEVICE u16 from_float<1>(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
template <> DEVICE u16 from_float<2>(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// 1 / sqrt(v) to the last bit or two: the hardware's estimate and one Newton step, free of branches.
DEVICE float inverse_sqrt(float v) {
  const float r = rsqrtf(v);
  return r * fmaf(-0.5f * v * r, r, 1.5f);
}

// Two neighbouring 16-bit elements at once, the first in the low half.
template <int kDtype> DEVICE u32 pack(float first, float second) {
  u32 bits;
  if (kDtype == 1) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// Four neighbouring numbers, each rounded to the nearest 8-bit integer, ties to even; NaN becomes 0.
template <int kDtype> DEVICE u32 pack_bytes(float a, float b, float c, float d) {
  u32 high, all;
#define PACK_BYTES(TYPE)                                                                        \
  asm("cvt.pack.sat." TYPE ".s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(__float2int_rn(d)), "r"(__float2int_rn(c))); \
  asm("cvt.pack.sat." TYPE ".s32.b32 %0, %1, %2, %3;"                                           \
      : "=r"(all)                                                                               \
      : "r"(__float2int_rn(b)), "r"(__float2int_rn(a)), "r"(high))
  if constexpr (kDtype == INT8) {
    PACK_BYTES("s8");
  } else {
    PACK_BYTES("u8");
  }
#undef PACK_BYTES
  return all;
}

typedef Storage<DTYPE>::type element;
typedef Storage<PARAMETER>::type parameter;

// The elements of such a pair, where DTYPE is 1 or 2.
DEVICE float low(u32 pair) { return to_float<DTYPE ? DTYPE : 1>((u16)pair); }
DEVICE float high(u32 pair) { return to_float<DTYPE ? DTYPE : 1>((u16)(pair >> 16)); }

// max(y, lower) that keeps NaN, as torch.relu does; lower is 0 for a ReLU and -infinity for none.
DEVICE float clamp_below(float y, float lower) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(y), "f"(lower));
  return out;
}

// VECTOR elements moved in one access of up to 16 bytes; addresses are multiples of its size.
template <int kCount, int kDtype = DTYPE>
struct alignas(kCount * sizeof(typename Storage<kDtype>::type)) Vector {
  typename Storage<kDtype>::type values[kCount];
};

template <int kDtype = DTYPE, int kCount> DEVICE Vector<kCount, kDtype> from_floats(const float (&values)[kCount]) {
  Vector<kCount, kDtype> out;
  if constexpr (kDtype >= INT8) {
    u32* words = reinterpret_cast<u32*>(out.values);
#pragma unroll
    for (int i = 0; i < kCount / 4; i++)
      words[i] = pack_bytes<kDtype>(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  } else if constexpr (kDtype != 0 && kCount > 1) {
    u32* pairs = reinterpret_cast<u32*>(out.values);
#pragma unroll
    for (int i = 0; i < kCount / 2; i++) pairs[i] = pack<kDtype>(values[2 * i], values[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) out.values[i] = from_float<kDtype>(values[i]);
  }
  return out;
}

template <int kCount, int kDtype = DTYPE>
DEVICE Vector<kCount, kDtype> load(const typename Storage<kDtype>::type* from) {
  return *reinterpret_cast<const Vector<kCount, kDtype>*>(from);
}
// Two or four words are written by name: of a plain assignment the compiler often makes stores of 4 bytes each.
// Other accesses may pass this one: what it writes must not be read in the same kernel.
template <int kCount, int kDtype> DEVICE u32 word(const Vector<kCount, kDtype>& vector, int i) {
  if constexpr (kDtype == 0) return __float_as_uint(vector.values[i]);
  else return reinterpret_cast<const u32*>(vector.values)[i];
}
template <int kCount, int kDtype>
DEVICE void store(typename Storage<kDtype>::type* to, const Vector<kCount, kDtype>& vector) {
  if constexpr (sizeof(vector) == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word(vector, 0)),
                 "r"(word(vector, 1)), "r"(word(vector, 2)), "r"(word(vector, 3)));
  else if constexpr (sizeof(vector) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word(vector, 0)), "r"(word(vector, 1)));
  else
    *reinterpret_cast<Vector<kCount, kDtype>*>(to) = vector;
}
