// Instructions of compute capability 9.0 that the fused convolutions are made of (PTX ISA 8.0 and later):
// warpgroup products (wgmma), shared-memory barriers (mbarrier), bulk and tensor copies (TMA). sm_90a only.
//
// MMA_N, the columns of a product, is defined by the including file: 96, 128, 136, 184, 192, 200, 240 or 256.
// QUANTIZED 1 or 2: products of 8-bit integers in exact 32-bit sums, the columns' operand signed (1) or unsigned (2).
#pragma once
#include "dependent_launch.cuh"
#include "elements.cuh"
#include "mma.cuh"

// What cuTensorMapEncodeTiled filled in; passed to a kernel as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// ---- wgmma -------------------------------------------------------------------------------------------
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

// Store 8x8 matrices of 16-bit elements spread over a warp, transposed: lane 8 m + r has the address of row r (16
// bytes) of matrix m.
DEVICE void store_transposed(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}
DEVICE void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Load such matrices, transposed: what store_transposed stores from the same addresses.
DEVICE uint4 load_transposed(u32 address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// A block's warpgroups are launched with equal shares of the registers. One that needs fewer gives some back, for
// others to take; what is left of the launch's share must cover it, or the block waits forever.
template <int kRegisters> DEVICE void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A number that all threads of a warp have, in a form in which the compiler knows that: descriptors made of it need no
// way from a thread's registers to the warp's.
DEVICE u32 of_warp(u32 value) { return __shfl_sync(~0u, value, 0); }
// The opposite: `lane` is this thread's, which the compiler does not know to be what is added here.
DEVICE int of_thread(int value, int lane) {
  int same;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(same));
  return value + same - lane;
}

// ---- mbarrier ----------------------------------------------------------------------------------------
DEVICE void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine; __syncthreads() makes them so to the block.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive, and expect `bytes` from the copy engine before the phase ends.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Wait for `threads` threads of the block that use the hardware barrier `id` (1 to 15).
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Count as one of the `threads` without waiting for them.
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Whether `holds` is not 0 in all of the `threads` that wait for each other here.
DEVICE u32 all_of(int id, int threads, u32 holds) {
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %0, 0;\nbar.red.and.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "+r"(holds)
      : "r"(id), "r"(threads)
      : "memory");
  return holds;
}
// Before the tensor cores or the copy engine read what this thread stored to shared memory.
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies ------------------------------------------------------------------------------------------
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// A box of a tensor, at coordinates in the order of the map's dimensions.
DEVICE void tensor_copy(u32 to, const TensorMap& map, int c0, int c1, int c2, int c3, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4,%5}], [%6];" ::"r"(
          to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}
DEVICE void tensor_store(const TensorMap& map, int c0, int c1, int c2, int c3, u32 from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1,%2,%3,%4}], [%5];" ::"l"(&map), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3), "r"(from)
               : "memory");
}
DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending> DEVICE void store_wait_read() {  // until shared memory may be written again
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending> DEVICE void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
DEVICE uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
DEVICE u32 load_shared_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
DEVICE void store_shared_word(u32 address, u32 v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
DEVICE void store_shared(u32 address, u32 first, u32 second) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(first), "r"(second) : "memory");
}
DEVICE void store_shared(u32 address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}
DEVICE void store_shared(u32 address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- results and operands ----------------------------------------------------------------------------
// Two neighbouring results as they are stored: rounded to two 16-bit elements in a word, or two of float32.
#if DTYPE == 0
typedef float2 Pair;
DEVICE Pair rounded(float first, float second) { return make_float2(first, second); }
DEVICE Pair rounded_relu(float first, float second) { return {clamp_below(first, 0.f), clamp_below(second, 0.f)}; }
DEVICE float low(Pair pair) { return pair.x; }
DEVICE float high(Pair pair) { return pair.y; }
#else
typedef u32 Pair;
DEVICE Pair rounded(float first, float second) { return pack<DTYPE>(first, second); }
// Negative numbers become 0; NaN stays NaN.
DEVICE Pair rounded_relu(float first, float second) {
  u32 bits;
  if (DTYPE == 1) asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  else asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
#endif
