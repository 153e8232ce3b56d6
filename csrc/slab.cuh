// How the statistics kernels cut a picture: a *slab* is the share of one block in one group of
// channels.
//
//   channels_last   a group is LANES x VECTOR neighbouring channels of an image (64 to 256 bytes a
//                   pixel); threads are LANES x rows
//   contiguous      a group is one plane
//
// Block (group, slice) of a grid of (groups, slices). A *step* of a thread is two vectors, ROWS positions
// (pixels, or vectors of a plane) apart; a *turn* is one step of every thread of every slice of a group.
// Constants: CHANNELS_LAST, VECTOR (elements an access), LANES (a power of two; 1 if contiguous). The
// including source defines THREADS, a multiple of 32 x LANES and no less than LANES x VECTOR.
#pragma once
#include "moments.cuh"

#define ROWS (THREADS / LANES)
#define WARPS (THREADS / 32)
#define AHEAD 3  // steps of a thread that are on their way into shared memory

#if CHANNELS_LAST
#define SUMS VECTOR               // accumulators a thread: one for each channel of its vector
#define GROUP (LANES * VECTOR)    // channels of a group
#else
#define SUMS 1
#define GROUP 1
#endif

struct Slab {
  const element* base;  // the group's first pixel, at this thread's channels
  i64 first;            // elements from base to this thread's step 0
  i64 stride, second;   // elements from one step of this thread to its next, and to its second vector
  u32 image;
  int channel;          // the group's first, in its image
  int lane, steps, turns, rest;
  bool whole;           // whether the last step has a second vector

  // `channels` a pixel and `pixels` an image; its positions are `turns` whole turns and `rest` more. Slices
  // take turns, a step at a time, so that all blocks read neighbouring addresses.
  DEVICE Slab(const element* x, int channels, i64 pixels, int turns, int rest) : turns(turns), rest(rest) {
    lane = threadIdx.x % LANES;
    const int row = blockIdx.y * 2 * ROWS + threadIdx.x / LANES;
#if CHANNELS_LAST
    const u32 groups = channels / GROUP;
    image = blockIdx.x / groups;
    const i64 unit = channels;
    channel = (blockIdx.x - image * groups) * GROUP;
    base = x + image * pixels * channels + channel + lane * VECTOR;
#else
    const i64 unit = VECTOR;
    image = blockIdx.x / (u32)channels, channel = blockIdx.x % (u32)channels;
    base = x + blockIdx.x * pixels;
#endif
    first = row * unit, second = ROWS * unit, stride = (i64)gridDim.y * 2 * ROWS * unit;
    steps = turns + (row < rest);
    whole = row >= rest || row + ROWS < rest;
  }
  DEVICE bool has_second(int step) const { return step + 1 < steps || whole; }
  DEVICE int vectors() const { return steps ? 2 * steps - !whole : 0; }
  // How many pixels of a channel a slice has.
  DEVICE float pixels_of(int slice) const {
    const int more = min(max(rest - slice * 2 * ROWS, 0), 2 * ROWS);
    return fmaf((float)turns, 2 * ROWS, (float)more) * (CHANNELS_LAST ? 1 : VECTOR);
  }
};

// The number that this thread's channel `s` keeps its means relative to: the group's first pixel.
DEVICE void load_bases(const Slab& slab, float (&bases)[SUMS]) {
#if CHANNELS_LAST
  const Vector<VECTOR> head = load<VECTOR>(slab.base);
#pragma unroll
  for (int s = 0; s < SUMS; s++) bases[s] = to_float<DTYPE>(head.values[s]);
#else
  bases[0] = to_float<DTYPE>(slab.base[0]);
#endif
}
// The same pixel of channel threadIdx.x of the group, below GROUP.
DEVICE element base_of_channel(const Slab& slab) { return slab.base[(int)threadIdx.x - slab.lane * VECTOR]; }

DEVICE void add(Accumulator (&sums)[SUMS], const Vector<VECTOR>& vector) {
#pragma unroll
  for (int v = 0; v < VECTOR; v++) sums[SUMS == 1 ? 0 : v].add(to_float<DTYPE>(vector.values[v]));
}

// A thread's vectors pass through a ring of slots of its own in shared memory: no thread reads another's,
// so no barrier is needed, and the last steps are still there at the end.
DEVICE void fetch(Vector<VECTOR>* slot, const element* from) {
  if constexpr (sizeof(Vector<VECTOR>) >= 4) {
    const u32 to = (u32)__cvta_generic_to_shared(slot);
    if constexpr (sizeof(Vector<VECTOR>) == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(sizeof(*slot))
                   : "memory");
  } else {
    *slot = load<VECTOR>(from);  // one 16-bit element: too small for an asynchronous copy
  }
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory"); }

// Merge the rows of a warp, kChannels channels a lane, from lanes kDistance apart down to LANES apart. At
// each step a lane hands half of its channels to its partner and takes the partner's share of the other half,
// which halves the work left; with one channel left both keep it. Lane l ends with CHANNELS_KEPT channels
// from number l / SPAN * CHANNELS_KEPT on. Returns the count.
#define SPAN (32 / SUMS > LANES ? 32 / SUMS : LANES)
#define CHANNELS_KEPT (GROUP > 32 ? GROUP / 32 : 1)
template <int kDistance, int kChannels>
DEVICE float merge_rows(float count, float (&mean)[SUMS], float (&m2)[SUMS]) {
  if constexpr (kDistance < LANES) {
    return count;
  } else {
    constexpr int kHalf = kChannels / 2, kKept = kChannels > 1 ? kHalf : 1;
    const float theirs = __shfl_xor_sync(0xffffffffu, count, kDistance), total = count + theirs;
    const float share = __fdividef(theirs, fmaxf(total, 1.f)), weight = count * share;
    const bool upper = threadIdx.x & kDistance;
#pragma unroll
    for (int i = 0; i < kKept; i++) {
      const float kept = upper ? mean[i + kHalf] : mean[i], given = upper ? mean[i] : mean[i + kHalf];
      const float kept_m2 = upper ? m2[i + kHalf] : m2[i], given_m2 = upper ? m2[i] : m2[i + kHalf];
      const float delta = __shfl_xor_sync(0xffffffffu, given, kDistance) - kept;
      mean[i] = fmaf(delta, share, kept);
      m2[i] = fmaf(delta * delta, weight, kept_m2 + __shfl_xor_sync(0xffffffffu, given_m2, kDistance));
    }
    return merge_rows<kDistance / 2, kKept>(total, mean, m2);
  }
}

// What the warps of a block leave for the threads below GROUP.
struct Meeting {
  Part parts[WARPS][GROUP];
  float counts[WARPS];
};

// Read the slab through `ring`, (slots, 2, THREADS) vectors with slots >= AHEAD; step i stays in slot
// i % slots until step i + slots. Returns the slab's moments of channel threadIdx.x, the mean relative to
// the bases, in threads below GROUP.
DEVICE Part reduce_slab(const Slab& slab, const float (&bases)[SUMS], Vector<VECTOR>* ring, int slots,
                        Meeting& meeting) {
  Accumulator sums[SUMS];
  const element* next = slab.base + slab.first;
  Vector<VECTOR>* const mine = ring + threadIdx.x;
  Vector<VECTOR>* const end = mine + slots * 2 * THREADS;
  Vector<VECTOR>*to = mine, *from = mine;
  for (int i = 0; i < AHEAD; i++, next += slab.stride) {
    if (i < slab.steps) {
      fetch(to, next);
      if (slab.has_second(i)) fetch(to + THREADS, next + slab.second);
    }
    to += 2 * THREADS;
    commit();
  }
  if (to == end) to = mine;
  wait_for_oldest();
#pragma unroll
  for (int s = 0; s < SUMS; s++) sums[s].start(slab.steps ? to_float<DTYPE>(mine->values[s]) : bases[s]);
  for (int i = 0; i < slab.steps; i++, next += slab.stride) {
    wait_for_oldest();
    const Vector<VECTOR> one = from[0], two = from[THREADS];
    const bool both = slab.has_second(i);
    if (i + AHEAD < slab.steps) {
      fetch(to, next);
      if (slab.has_second(i + AHEAD)) fetch(to + THREADS, next + slab.second);
      to = to + 2 * THREADS == end ? mine : to + 2 * THREADS;
    }
    commit();
    from = from + 2 * THREADS == end ? mine : from + 2 * THREADS;
    add(sums, one);
    if (both) add(sums, two);
  }
  const int seen = slab.vectors(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float count = (float)seen * (CHANNELS_LAST ? 1 : VECTOR), inverse = seen ? 1.f / count : 0.f;
  float mean[SUMS], m2[SUMS];
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
    const Moments moments = sums[s].moments(count, inverse, bases[s]);
    mean[s] = moments.mean, m2[s] = moments.m2;
  }
  const float of_warp = merge_rows<16, SUMS>(count, mean, m2);
  if (lane == 0) meeting.counts[warp] = of_warp;
  if (lane % SPAN < LANES) {
#pragma unroll
    for (int i = 0; i < CHANNELS_KEPT; i++)
      meeting.parts[warp][slab.lane * SUMS + lane / SPAN * CHANNELS_KEPT + i] = {mean[i], m2[i]};
  }
  __syncthreads();
  if (threadIdx.x >= GROUP) return {0.f, 0.f};
  Pool pool;
  pool.start(meeting.parts[0][threadIdx.x].mean);
#pragma unroll
  for (int w = 0; w < WARPS; w++) pool.add(meeting.counts[w], meeting.parts[w][threadIdx.x]);
  return pool.total(slab.pixels_of(blockIdx.y));
}

// Slabs publish their moments as (groups, slices, GROUP) words of 8 bytes: the mean in the low half, M2 in
// the high one. M2 is not negative, so its sign is free: it says in which of two phases the word was written.
// A reader that knows the phase sees by the word itself that it has come, without a fence or a counter.
DEVICE u64* word_of(u64* published, int slice) {
  return published + ((i64)blockIdx.x * gridDim.y + slice) * GROUP + threadIdx.x % GROUP;
}
DEVICE u64 peek(const u64* word) {
  u64 value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
DEVICE u32 phase_of(u64 word) { return (u32)(word >> 63); }
// By the threads below GROUP.
DEVICE void publish(u64* published, u32 phase, const Part& part) {
  const u32 high = (__float_as_uint(part.m2) & 0x7fffffffu) | phase << 31;
  const u64 word = (u64)high << 32 | __float_as_uint(part.mean);
  u64* to = word_of(published, blockIdx.y);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
// `value` was read from `word`; read again until it is of this phase.
DEVICE Part awaited(u64 value, const u64* word, u32 phase) {
  while (phase_of(value) != phase) value = peek(word);
  return {__uint_as_float((u32)value), __uint_as_float((u32)(value >> 32) & 0x7fffffffu)};
}

// Merge what all slices of the group published, in a fixed order. Returns the moments of channel threadIdx.x
// in threads below GROUP. `meeting` must not be in use.
#define READERS (THREADS / GROUP < WARPS ? THREADS / GROUP : WARPS)  // threads that share a channel's slices
#define AT_ONCE 4  // words that a thread has on their way
DEVICE Part merge_slices(u64* published, u32 phase, const Slab& slab, i64 pixels, Meeting& meeting) {
  const int reader = threadIdx.x / GROUP, slices = gridDim.y;
  Pool pool = {0.f, 0.f, 0.f};
  if (reader < READERS) {
    const u64* head = word_of(published, 0);
    const u64 first = peek(head);
    for (int slice = reader; slice < slices; slice += AT_ONCE * READERS) {
      u64 words[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        words[i] = slice + i * READERS < slices ? peek(head + (slice + i * READERS) * GROUP) : 0;
      if (slice == reader) pool.start(awaited(first, head, phase).mean);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int at = slice + i * READERS;
        if (at < slices) pool.add(slab.pixels_of(at), awaited(words[i], head + at * GROUP, phase));
      }
    }
    meeting.parts[reader][threadIdx.x % GROUP] = {pool.sum, pool.squares};  // of this reader, about the pivot
  }
  __syncthreads();
  if (threadIdx.x >= GROUP) return {0.f, 0.f};
#pragma unroll
  for (int r = 1; r < READERS; r++) {  // thread c is reader 0 of channel c
    const Part sums = meeting.parts[r][threadIdx.x];
    pool.sum += sums.mean, pool.squares += sums.m2;
  }
  return pool.total((float)pixels);
}
