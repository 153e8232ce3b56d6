// 16 bytes of a channels_last pixel, as they become operands of a product: the norm and the activation applied.
#pragma once
#include "activation.cuh"
#include "hopper.cuh"
#include "norm.cuh"

#define CHUNK_CHANNELS (DTYPE == 0 ? 4 : 8)

// The chunk that is raw in `in`, whose channels have the maps `affine`.
template <int kActivation>
DEVICE uint4 finished_chunk(const uint4& in, const Affine (&affine)[CHUNK_CHANNELS], const Activation& activation) {
#if DTYPE == 0
  auto apply = [&](u32 word, int i) {
    return round_to_tf32(activate<kActivation>(affine[i](__uint_as_float(word)), activation));
  };
#else
  auto apply = [&](u32 pair, int i) {
    const float a = affine[2 * i](low(pair)), b = affine[2 * i + 1](high(pair));
    if (kActivation == RECTIFIED) return rounded_relu(a, b);
    return rounded(activate<kActivation>(a, activation), activate<kActivation>(b, activation));
  };
#endif
  return make_uint4(apply(in.x, 0), apply(in.y, 1), apply(in.z, 2), apply(in.w, 3));
}
