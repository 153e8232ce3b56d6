// The index map of nearest upsampling and padding, along one dimension. Constant: PAD (0 none, 1 zeros, 2 reflect,
// 3 replicate).
#pragma once
#include "elements.cuh"

// The source of output position `at` along a dimension of `size` source pixels; -1 is a zero.
DEVICE int source(int at, int before, int size, int factor) {
  int i = at - before;
  const int last = size * factor - 1;
  if (PAD == 1 && (i < 0 || i > last)) return -1;
  if (PAD == 2) i = abs(i), i = min(i, 2 * last - i);
  if (PAD == 3) i = min(max(i, 0), last);
  return (u32)i / (u32)factor;
}

// Whether output position `at` is where its source pixel is written to `kept`: once, not mirrored.
DEVICE bool owns(int at, int before, int size, int factor) {
  const int i = at - before;
  return i >= 0 && i < size * factor && (u32)i % (u32)factor == 0;
}
