// Instructions of compute capability 8.0 and later that csrc/mma_conv.cu is made of (PTX ISA): warp-wide products of
// small matrices (mma.sync), their operands from shared memory (ldmatrix), copies that need no register (cp.async).
#pragma once
#include "elements.cuh"

// threadIdx.x, read anew: what is made of it is not kept in registers from long before.
DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit elements, spread over a warp: lane 8 m + r has the address of row r (16 bytes) of matrix
// m, and gets of each matrix elements 2 (lane % 4) and the next of row lane / 4.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements spread over a warp.
DEVICE u32 transpose_8x8(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// d[16 x 8] += a[16 x 16] * b[16 x 8]. With g = lane / 4 and t = lane % 4: d has columns 2t and 2t + 1 of row g, then
// of row g + 8; a has columns 2t and 2t + 1 of row g, of row g + 8, then columns 2t + 8 and 2t + 9 of either; b has
// rows 2t and 2t + 1, then 2t + 8 and 2t + 9, of column g. Of float32, of which it takes TF32's 19 bits, a product is
// half as deep, and as many bytes: column or row t, then t + 4.
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if DTYPE == 0
#define PRODUCT "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
#elif DTYPE == 1
#define PRODUCT "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
#define PRODUCT "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
  asm volatile(PRODUCT "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x rounded to the nearest number of TF32: a product alone would cut its last 13 bits off.
DEVICE u32 round_to_tf32(float x) {
  u32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// 16 bytes from global to shared memory, passing neither registers nor L1; both addresses are multiples of 16.
DEVICE void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the kPending groups that this thread committed last have arrived.
template <int kPending> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }
