// csrc/mma.cuh in terms of the lanes of a warp (PTX ISA).
#pragma once
#include "elements.cuh"

DEVICE int thread_index() { return threadIdx.x; }
DEVICE u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - memory); }
DEVICE unsigned char* shared_bytes(u32 address, u32 size) {
  if (address % size || address + size > emulator::shared_size) emulator::fail("an access beside shared memory");
  return memory + address;
}

DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  u32 all[32][4];
  emulator::exchange(&address, 1, all);
  const u32 lane = emulator::lane();
  for (int i = 0; i < 4; i++) std::memcpy(&r[i], shared_bytes(all[8 * i + lane / 4][0], 16) + lane % 4 * 4, 4);
}

DEVICE u32 transpose_8x8(u32 a) {
  u32 all[32][4];
  emulator::exchange(&a, 1, all);
  const u32 row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  const auto at = [&](u32 y, u32 x) { return all[y * 4 + x / 2][0] >> x % 2 * 16 & 0xffff; };
  return at(column, row) | at(column + 1, row) << 16;
}

// The product of two words of operands: a number of TF32, whose last 13 bits are cut off, or two of 16 bits.
DEVICE double product(u32 a, u32 b) {
  if (DTYPE == 0) return (double)__uint_as_float(a & 0xffffe000) * __uint_as_float(b & 0xffffe000);
  return (double)low(a) * low(b) + (double)high(a) * high(b);
}
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u32 left[32][4], right[32][4];
  const u32 b[2] = {b0, b1}, lane = emulator::lane();
  emulator::exchange(a, 4, left);
  emulator::exchange(b, 2, right);
  for (u32 i = 0; i < 4; i++) {
    const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (u32 word = 0; word < 8; word++)  // of the depth
      sum += product(left[row % 8 * 4 + word % 4][row / 8 + word / 4 * 2], right[column * 4 + word % 4][word / 4]);
    d[i] = (float)sum;
  }
}

DEVICE u32 round_to_tf32(float x) {
  const u32 bits = __float_as_uint(x);
  return (std::isfinite(x) ? bits + 0x1000 : bits) & 0xffffe000;
}

DEVICE void copy_async(u32 to, const void* from) {
  unsigned char* bytes = shared_bytes(to, 16);
  if ((uintptr_t)from % 16) emulator::fail("a copy that is not aligned");
  if (emulator::drawn(2)) std::memcpy(bytes, from, 16);
  else emulator::fibers[emulator::current].open.push_back([=] { std::memcpy(bytes, from, 16); });
}
DEVICE void copy_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending> DEVICE void copy_wait() {
  auto& groups = emulator::fibers[emulator::current].groups;
  for (; groups.size() > kPending; groups.erase(groups.begin()))
    for (auto& copy : groups.front()) copy();
}
