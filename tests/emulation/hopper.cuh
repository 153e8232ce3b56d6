// csrc/hopper.cuh and csrc/wgmma.cuh without their instructions: of them what last_conv.cu has.
#pragma once
#include <map>

#include "dependent_launch.cuh"
#include "mma.cuh"

// ---- wgmma: a product is there as soon as it is asked for ----------------------------------------------------
#define SWIZZLE_NONE 0
#define SWIZZLE_128 1
#define SWIZZLE_64 2
#define SWIZZLE_32 3
DEVICE u32 of_warp(u32 value) { return value; }
DEVICE u64 descriptor(u32 address, u32 leading, u32 stride, u64 swizzle) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(leading >> 4) << 16) | ((u64)(stride >> 4) << 32) | (swizzle << 62);
}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int kPending> DEVICE void wgmma_wait() { __syncwarp(); }

constexpr int kDepth = DTYPE == 0 ? 8 : 16;  // elements of a product's 32 bytes

// Element `k` of row `row` of the K-major operand that a descriptor describes.
DEVICE double operand(u64 d, u32 row, u32 k) {
  const u32 byte = k * (32 / kDepth), begin = (d & 0x3FFF) << 4, leading = (d >> 16 & 0x3FFF) << 4;
  const u32 stride = (d >> 32 & 0x3FFF) << 4, swizzle = d >> 62;
  u32 at = begin + row / 8 * stride;
  if (swizzle == SWIZZLE_NONE) {
    at += byte / 16 * leading + row % 8 * 16 + byte % 16;
  } else {
    const u32 span = 256 >> swizzle;
    at += row % 8 * span + byte;
    at ^= at / 128 % (span / 16) * 16;
  }
  const unsigned char* from = shared_bytes(at, 32 / kDepth);
  if (DTYPE != 0) return to_float<DTYPE ? DTYPE : 1>(*(const u16*)from);
  return __uint_as_float(*(const u32*)from & 0xffffe000);
}
template <class Left> DEVICE void multiply_rows(float (&d)[MMA_N / 2], Left left, u64 b, int accumulate) {
  const u32 lane = emulator::lane();
  for (u32 i = 0; i < MMA_N / 2; i++) {
    const u32 row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = accumulate ? d[i] : 0;
    for (u32 k = 0; k < kDepth; k++) sum += left(row, k) * operand(b, column, k);
    d[i] = (float)sum;
  }
}
DEVICE void multiply(float (&d)[MMA_N / 2], u64 a, u64 b, int accumulate) {
  const u32 first = emulator::current % 128 / 32 * 16;
  multiply_rows(d, [=](u32 row, u32 k) { return operand(a, first + row, k); }, b, accumulate);
}
DEVICE void multiply(float (&d)[MMA_N / 2], const uint4& a, u64 b, int accumulate) {
  u32 all[32][4];
  const u32 mine[4] = {a.x, a.y, a.z, a.w};
  emulator::exchange(mine, 4, all);
  const auto left = [&](u32 row, u32 k) -> double {
    const u32 word = k * 8 / kDepth, bits = all[row % 8 * 4 + word % 4][row / 8 + word / 4 * 2];
    if (DTYPE == 0) return __uint_as_float(bits & 0xffffe000);
    return k % 2 ? high(bits) : low(bits);
  };
  multiply_rows(d, left, b, accumulate);
}
template <int kRegisters> DEVICE void give_registers_back() {}
template <int kRegisters> DEVICE void take_registers() {}

// ---- mbarrier, and copies that arrive at once or when somebody waits -------------------------------------------
struct Barrier {
  int count, pending;
  i64 bytes;
  u32 phase;
  void settle() {
    if (pending < 0) emulator::fail("more arrivals than a barrier counts");
    if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
  }
};
inline std::map<u32, Barrier> barriers;
using emulator::on_the_way;

DEVICE Barrier& barrier_at(u32 address) {
  if (address % 8 || !barriers.count(address)) emulator::fail("a barrier that is none");
  return barriers[address];
}
DEVICE void barrier_init(u32 barrier, int arrivals) {
  shared_bytes(barrier, 8);
  barriers[barrier] = {arrivals, arrivals, 0, 0};
}
DEVICE void barrier_init_fence() {}
DEVICE void barrier_arrive(u32 barrier) { barrier_at(barrier).pending--, barrier_at(barrier).settle(); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) { barrier_at(barrier).bytes += bytes, barrier_arrive(barrier); }
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  for (int spins = 0; barrier_at(barrier).phase == (parity & 1); spins++) {
    if (spins > 1000000) emulator::fail("a barrier that nobody completes");
    if (spins > 100 && !on_the_way.empty()) {
      auto copies = std::move(on_the_way);
      on_the_way.clear();
      for (auto& copy : copies) copy();
    }
    swapcontext(&emulator::fibers[emulator::current].context, &emulator::scheduler);
  }
}
DEVICE void named_barrier(int id, int threads) {
  emulator::blocks[id].size = threads;
  emulator::meet(emulator::blocks[id]);
}
DEVICE void async_fence() {}
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (bytes == 0 || bytes % 16 || to % 16 || (uintptr_t)from % 16) emulator::fail("a copy that is not aligned");
  if (to + bytes > emulator::shared_size) emulator::fail("a copy beyond shared memory");
  const auto copy = [=] {
    std::memcpy(memory + to, from, bytes);
    barrier_at(barrier).bytes -= bytes, barrier_at(barrier).settle();
  };
  if (emulator::drawn(2)) copy();
  else on_the_way.push_back(copy);
}
template <class T> DEVICE T shared_at(u32 address) { return *(const T*)shared_bytes(address, sizeof(T)); }
DEVICE uint4 load_shared(u32 address) { return shared_at<uint4>(address); }
DEVICE float load_float(u32 address) { return shared_at<float>(address); }
DEVICE void store_shared(u32 address, uint4 v) { *(uint4*)shared_bytes(address, 16) = v; }
DEVICE void store_shared(u32 address, float first, float second) {
  float* to = (float*)shared_bytes(address, 8);
  to[0] = first, to[1] = second;
}
template <class T> T __ldg(const T* at) { return *at; }

// ---- results and operands ----------------------------------------------------------------------------------
DEVICE u32 rounded(float first, float second) { return pack<DTYPE ? DTYPE : 1>(first, second); }
DEVICE u32 rounded_relu(float first, float second) { return rounded(clamp_below(first, 0.f), clamp_below(second, 0.f)); }
