// Instructions of compute capability 9.0 that the fused convolutions are made of, beside the products (PTX ISA 8.0 and
// later): shared-memory barriers (mbarrier), bulk and tensor copies (TMA), stores of matrices. sm_90a only.
//
// Constants: DTYPE, and those of wgmma.cuh.
#pragma once
#include "dependent_launch.cuh"
#include "elements.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

// What cuTensorMapEncodeTiled filled in; passed to a kernel as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// ---- matrices and registers ---------------------------------------------------------------------------
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
