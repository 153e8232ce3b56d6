// Products of a warpgroup on the tensor cores of compute capability 9.0 (wgmma, PTX ISA 8.0 and later), and the
// descriptors of their operands in shared memory. sm_90a only.
//
// Constants: DTYPE, of the operands; MMA_N, the columns of a product, defined by the including file: 96, 128, 136, 184,
// 192, 200, 240 or 256; QUANTIZED 1 or 2: products of 8-bit integers in exact 32-bit sums, the columns' operand signed
// (1) or unsigned (2).
#pragma once
#include "elements.cuh"

// Swizzle modes of a shared-memory operand, in the descriptor's encoding.
#define SWIZZLE_NONE 0
#define SWIZZLE_128 1
#define SWIZZLE_64 2
#define SWIZZLE_32 3

// A K-major operand at `address` (a multiple of 16): `leading` bytes between the two 16-byte columns of a
// k16 step (without a swizzle), `stride` bytes between groups of 8 rows.
DEVICE u64 descriptor(u32 address, u32 leading, u32 stride, u64 swizzle) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(leading >> 4) << 16) | ((u64)(stride >> 4) << 32) | (swizzle << 62);
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define S8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define REGISTERS_48                                                                                          \
  S8(0, 1, 2, 3, 4, 5, 6, 7) "," S8(8, 9, 10, 11, 12, 13, 14, 15) "," S8(16, 17, 18, 19, 20, 21, 22, 23) ","  \
  S8(24, 25, 26, 27, 28, 29, 30, 31) "," S8(32, 33, 34, 35, 36, 37, 38, 39) ","                               \
  S8(40, 41, 42, 43, 44, 45, 46, 47)
#define REGISTERS_64 REGISTERS_48 "," S8(48, 49, 50, 51, 52, 53, 54, 55) "," S8(56, 57, 58, 59, 60, 61, 62, 63)
#define REGISTERS_68 REGISTERS_64 ",%64,%65,%66,%67"
#define REGISTERS_88                                                                      \
  REGISTERS_64 "," S8(64, 65, 66, 67, 68, 69, 70, 71) "," S8(72, 73, 74, 75, 76, 77, 78, 79) "," \
  S8(80, 81, 82, 83, 84, 85, 86, 87)
#define REGISTERS_92 REGISTERS_88 ",%88,%89,%90,%91"
#define REGISTERS_96 REGISTERS_92 ",%92,%93,%94,%95"
#define REGISTERS_100 REGISTERS_96 ",%96,%97,%98,%99"
#define REGISTERS_120                                               \
  REGISTERS_100 "," S8(100, 101, 102, 103, 104, 105, 106, 107) ","  \
  S8(108, 109, 110, 111, 112, 113, 114, 115) ",%116,%117,%118,%119"
#define REGISTERS_128 REGISTERS_120 "," S8(120, 121, 122, 123, 124, 125, 126, 127)
#ifndef QUANTIZED
#define QUANTIZED 0
#endif
#if QUANTIZED
typedef int Sum;
#define SUM "+r"
#else
typedef float Sum;
#define SUM "+f"
#endif
#define F4(d, i) SUM(d[i]), SUM(d[i + 1]), SUM(d[i + 2]), SUM(d[i + 3])
#define F8(d, i) F4(d, i), F4(d, i + 4)
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)

#if MMA_N == 96
#define MMA_REGISTERS REGISTERS_48
#define MMA_ACCUMULATORS(d) F32(d, 0), F8(d, 32), F8(d, 40)
#define O0 "%48"
#define O1 "%49"
#define O2 "%50"
#define O3 "%51"
#define O4 "%52"
#define O5 "%53"
#elif MMA_N == 128
#define MMA_REGISTERS REGISTERS_64
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32)
#define O0 "%64"
#define O1 "%65"
#define O2 "%66"
#define O3 "%67"
#define O4 "%68"
#define O5 "%69"
#elif MMA_N == 136
#define MMA_REGISTERS REGISTERS_68
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32), F4(d, 64)
#define O0 "%68"
#define O1 "%69"
#define O2 "%70"
#define O3 "%71"
#define O4 "%72"
#define O5 "%73"
#elif MMA_N == 184
#define MMA_REGISTERS REGISTERS_92
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32), F8(d, 64), F8(d, 72), F8(d, 80), F4(d, 88)
#define O0 "%92"
#define O1 "%93"
#define O2 "%94"
#define O3 "%95"
#define O4 "%96"
#define O5 "%97"
#elif MMA_N == 192
#define MMA_REGISTERS REGISTERS_96
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32), F32(d, 64)
#define O0 "%96"
#define O1 "%97"
#define O2 "%98"
#define O3 "%99"
#define O4 "%100"
#define O5 "%101"
#elif MMA_N == 200
#define MMA_REGISTERS REGISTERS_100
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32), F32(d, 64), F4(d, 96)
#define O0 "%100"
#define O1 "%101"
#define O2 "%102"
#define O3 "%103"
#define O4 "%104"
#define O5 "%105"
#elif MMA_N == 240
#define MMA_REGISTERS REGISTERS_120
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32), F32(d, 64), F8(d, 96), F8(d, 104), F8(d, 112)
#define O0 "%120"
#define O1 "%121"
#define O2 "%122"
#define O3 "%123"
#define O4 "%124"
#define O5 "%125"
#elif MMA_N == 256
#define MMA_REGISTERS REGISTERS_128
#define MMA_ACCUMULATORS(d) F32(d, 0), F32(d, 32), F32(d, 64), F32(d, 96)
#define O0 "%128"
#define O1 "%129"
#define O2 "%130"
#define O3 "%131"
#define O4 "%132"
#define O5 "%133"
#endif

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
// A product is 32 bytes deep: 16 elements of 16 bits, 32 of 8, or 8 of float32, of which it takes TF32's 19 bits.
#if QUANTIZED
#if QUANTIZED == 1
#define MMA_TYPES "k32.s32.s8.s8"
#else
#define MMA_TYPES "k32.s32.s8.u8"
#endif
#define MMA_MAJORS ""
#define MMA_MAJOR ""
#elif DTYPE == 0
#define MMA_TYPES "k8.f32.tf32.tf32"
#define MMA_MAJORS ""  // both operands are K-major: 16-bit types could be otherwise
#define MMA_MAJOR ""
#elif DTYPE == 1
#define MMA_TYPES "k16.f32.f16.f16"
#else
#define MMA_TYPES "k16.f32.bf16.bf16"
#endif
#if !QUANTIZED
#define MMA_SIGNS ", 1, 1"  // neither operand is negated
#else
#define MMA_SIGNS ""
#endif
#if DTYPE != 0 && !QUANTIZED
#define MMA_MAJORS ", 0, 0"
#define MMA_MAJOR ", 0"
#endif
#define WGMMA "wgmma.mma_async.sync.aligned.m64n" TEXT(MMA_N) MMA_TYPES " {" MMA_REGISTERS "}, "

// d[64 x MMA_N] = a[64 x k] * b[MMA_N x k]^T (+ d if `accumulate`), both operands in shared memory, k 32 bytes. Row r
// of a warpgroup's warp w is 16 w + r; a lane holds rows lane/4 and lane/4 + 8 and, of every 8 columns g, the
// columns 2 (lane%4) and the next: d[4g], d[4g+1] of the first row, d[4g+2], d[4g+3] of the second.
DEVICE void multiply(Sum (&d)[MMA_N / 2], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O2 ", 0;\n" WGMMA O0 ", " O1 ", p" MMA_SIGNS MMA_MAJORS ";\n}"
               : MMA_ACCUMULATORS(d)
               : "l"(a), "l"(b), "r"(accumulate));
}
// The same with the 64 x k operand in registers (the A fragment of the PTX ISA, four words a thread).
DEVICE void multiply(Sum (&d)[MMA_N / 2], const uint4& a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O5 ", 0;\n" WGMMA "{" O0 "," O1 "," O2 "," O3 "}, " O4
               ", p" MMA_SIGNS MMA_MAJOR ";\n}"
               : MMA_ACCUMULATORS(d)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(accumulate));
}
