// A block of a CUDA kernel on the CPU: each thread is a fiber, and the fibers of a warp meet wherever lanes exchange
// numbers. Which warp goes on is drawn anew at every meeting, and a copy to shared memory happens at once or as late as
// it may, so that a barrier or a wait that is missing shows in the results.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE inline
#define __global__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__
#define __launch_bounds__(...)

using std::max;
using std::min;
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
struct Index { u32 x = 0, y = 0, z = 0; };
inline Index threadIdx, blockIdx, gridDim;

namespace emulator {
constexpr int kStack = 1 << 17;
constexpr u32 kMostShared = 256 << 10;

// Fibers that meet; one that waits for `generation` to pass is not run.
struct Meeting {
  u32 size, arrived = 0;
  u64 generation = 0;
};
struct Fiber {
  ucontext_t context;
  Index index;
  Meeting* waits = nullptr;
  u64 generation = 0;
  bool done = false;
  std::vector<std::vector<std::function<void()>>> groups;  // copies committed, the oldest first
  std::vector<std::function<void()>> open;                 // copies not yet committed
};

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline std::vector<Meeting> warps, blocks;
inline ucontext_t scheduler, launcher;
inline const char* failure;  // of this launch; null while there is none
inline std::vector<std::function<void()>> on_the_way;  // copies that arrive when somebody waits
inline u32 current, shared_size, state = 1;
inline std::function<void()> kernel;

inline u32 drawn(u32 below) {
  state = state * 1664525u + 1013904223u;
  return (u32)((u64)(state >> 8) * below >> 24);
}
// Ends the launch, whatever its threads are at.
inline void fail(const char* what) {
  failure = what;
  setcontext(&launcher);
}
inline void fault(int) { fail("an access to memory that is not the kernel's"); }
inline void meet(Meeting& meeting) {
  Fiber& fiber = fibers[current];
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0, meeting.generation++;
    return;
  }
  fiber.waits = &meeting, fiber.generation = meeting.generation;
  swapcontext(&fiber.context, &scheduler);
}
inline Meeting& warp() { return warps[current / 32]; }
inline u32 lane() { return current % 32; }

// Every lane gives up to four words, and reads all lanes'.
inline void exchange(const u32* mine, int count, u32 (*all)[4]) {
  static std::vector<u32> given;
  if (given.size() != fibers.size() * 4) given.assign(fibers.size() * 4, 0);
  std::copy(mine, mine + count, &given[current * 4]);
  meet(warp());
  std::copy(&given[current / 32 * 128], &given[current / 32 * 128] + 128, all[0]);
  meet(warp());
}

inline void entry() {
  kernel();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
inline bool runs(Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.waits && fiber.waits->generation == fiber.generation) return false;
  fiber.waits = nullptr;
  return true;
}
inline void run_block(u32 threads) {
  on_the_way.clear();
  fibers.clear();
  fibers.resize(threads);
  stacks.resize((size_t)threads * kStack);
  warps.assign(threads / 32, Meeting{32});
  blocks.assign(16, Meeting{threads});
  for (u32 i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.index.x = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &stacks[(size_t)i * kStack];
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<u32> left(threads / 32);
  for (u32 i = 0; i < left.size(); i++) left[i] = i;
  u32 idle = 0;
  while (!left.empty()) {
    const u32 at = drawn(left.size()), warp = left[at];
    bool ran = false, alive = false;
    for (int slice = drawn(64) + 1; slice > 0; slice--) {
      bool any = false;
      for (u32 i = warp * 32; i < warp * 32 + 32; i++) {
        if (!runs(fibers[i])) continue;
        current = i, threadIdx = fibers[i].index, any = true;
        swapcontext(&scheduler, &fibers[i].context);
      }
      if (!any) break;
      ran = true;
    }
    for (u32 i = warp * 32; i < warp * 32 + 32; i++) alive = alive || !fibers[i].done;
    if (!alive) left.erase(left.begin() + at);
    idle = ran || !alive ? 0 : idle + 1;
    if (idle > 100000) fail("all threads wait");
  }
}

template <class T> T argument(u64 bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// The next argument of a launch, which has a multiple of 8 bytes.
template <class T> T taken(const u64*& values) {
  T value;
  std::memcpy(&value, values, sizeof(T));
  values += (sizeof(T) + 7) / 8;
  return value;
}
template <class... A> void call(void (*function)(A...), const u64* values) {
  std::apply(function, std::tuple<A...>{taken<A>(values)...});  // from the first to the last
}
}  // namespace emulator

__attribute__((aligned(4096))) inline unsigned char shared_pages[emulator::kMostShared + 4096];
inline unsigned char* memory;  // of the block: it ends where nothing may be touched

namespace emulator {
inline void run_grid(u32 grid, u32 threads, u32 pages) {
  for (u32 block = 0; block < grid; block++) {
    blockIdx.x = block;
    const unsigned char garbage = block % 2 ? 0xff : 0x7f;  // NaN and -1, or numbers that lead beyond everything
    std::memset(shared_pages, garbage, pages);
    run_block(threads);
    for (const unsigned char* i = shared_pages; i < memory; i++)
      if (*i != garbage) fail("a write before shared memory");
  }
}
// What the kernel did that it may not do; null where that is nothing.
template <class... A>
const char* launch(void (*function)(A...), u32 grid, u32 threads, u32 shared_bytes, const u64* values, u32 seed) {
  if (shared_bytes % 16 || shared_bytes > kMostShared) return "no such shared memory";
  state = seed, gridDim.x = grid, shared_size = shared_bytes, failure = nullptr;
  kernel = [=] { call(function, values); };
  const u32 pages = (shared_bytes + 4095) / 4096 * 4096;
  memory = shared_pages + pages - shared_bytes;
  mprotect(shared_pages + pages, sizeof(shared_pages) - pages, PROT_NONE);
  struct sigaction faults = {}, before[2];
  faults.sa_handler = fault;
  sigaction(SIGSEGV, &faults, &before[0]), sigaction(SIGBUS, &faults, &before[1]);
  getcontext(&launcher);  // once more on `fail`
  if (!failure) run_grid(grid, threads, pages);
  sigaction(SIGSEGV, &before[0], nullptr), sigaction(SIGBUS, &before[1], nullptr);
  mprotect(shared_pages + pages, sizeof(shared_pages) - pages, PROT_READ | PROT_WRITE);
  return failure;
}
}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::blocks[0]); }
inline void __syncwarp() { emulator::meet(emulator::warp()); }
inline u32 exchanged(u32 mine, u32 from) {
  u32 all[32][4];
  emulator::exchange(&mine, 1, all);
  return all[from][0];
}
inline float __uint_as_float(u32 bits) { return emulator::argument<float>(bits); }
inline float __int_as_float(int bits) { return emulator::argument<float>((u32)bits); }
inline u32 __float_as_uint(float x) { u32 bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __shfl_sync(u32, float x, int from) { return __uint_as_float(exchanged(__float_as_uint(x), from)); }
inline float __shfl_xor_sync(u32, float x, int lanes) {
  return __uint_as_float(exchanged(__float_as_uint(x), emulator::lane() ^ lanes));
}
inline double __shfl_xor_sync(u32, double x, int lanes) {
  u32 mine[2], all[32][4];
  std::memcpy(mine, &x, 8);
  emulator::exchange(mine, 2, all);
  std::memcpy(&x, all[emulator::lane() ^ lanes], 8);
  return x;
}
inline u64 atomicAdd(u64* at, u64 x) { const u64 before = *at; *at += x; return before; }
inline u32 atomicAdd(u32* at, u32 x) { const u32 before = *at; *at += x; return before; }
template <class T> T __ldcg(const T* at) { return *at; }
inline i64 __double2ll_rn(double x) { return (i64)std::nearbyint(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
