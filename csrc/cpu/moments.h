// Mean and variance out of those of pieces, so that neither a large mean nor the number of threads matters.
//
// A piece is read twice while it is in the first-level cache: for its mean, as what its pixels differ from the first
// one (of equal pixels exactly nothing), and for the squares of what is left when the mean is taken off. Pieces are
// merged in double precision, in their order. Which pixels make a piece follows from the shape alone.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "elements.h"

constexpr int64_t PIECE = 4096;  // numbers, about

// Of pieces: (images, pieces, channels) means and sums of squared differences from them, and their pixels.
struct Moments {
  int64_t images, pieces, channels;
  std::vector<float> means, squares;
  std::vector<int64_t> pixels;  // of each piece of an image

  Moments(int64_t images, int64_t pieces, int64_t channels)
      : images(images), pieces(pieces), channels(channels), means(images * pieces * channels),
        squares(means.size()), pixels(pieces) {}

  float* mean(int64_t image, int64_t piece) { return means.data() + (image * pieces + piece) * channels; }
  float* square(int64_t image, int64_t piece) { return squares.data() + (image * pieces + piece) * channels; }

  // Mean and biased variance (images, channels).
  void merge(float* mean_out, float* variance_out) {
    constexpr int64_t BLOCK = 16;
    const int64_t blocks = (channels + BLOCK - 1) / BLOCK;
    int64_t total = 0;
    for (int64_t count : pixels) total += count;
    const int64_t grain = std::max<int64_t>(1, 65536 / (pieces * BLOCK));
    at::parallel_for(0, images * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t image = i / blocks, first = i % blocks * BLOCK, width = std::min(BLOCK, channels - first);
        double mean_of[BLOCK] = {}, sum[BLOCK] = {};
        for (int64_t piece = 0; piece < pieces; piece++) {
          const float* m = mean(image, piece) + first;
          const double count = pixels[piece];
          for (int64_t c = 0; c < width; c++) mean_of[c] += count * m[c];
        }
        for (int64_t c = 0; c < width; c++) mean_of[c] /= total;
        for (int64_t piece = 0; piece < pieces; piece++) {
          const float *m = mean(image, piece) + first, *s = square(image, piece) + first;
          const double count = pixels[piece];
          for (int64_t c = 0; c < width; c++) {
            const double d = m[c] - mean_of[c];
            sum[c] += s[c] + count * d * d;
          }
        }
        for (int64_t c = 0; c < width; c++) {
          mean_out[image * channels + first + c] = mean_of[c];
          variance_out[image * channels + first + c] = sum[c] / total;
        }
      }
    });
  }
};

constexpr int UNROLLED = 4;

// Of `count` vectors, `stride` numbers apart, of which the first `lanes` numbers count.
template <typename T>
inline void vector_moments(const T* from, int64_t count, int64_t stride, int64_t lanes, Floats& mean, Floats& squares) {
  Floats sums[UNROLLED], corrections[UNROLLED], parts[UNROLLED];
  for (int k = 0; k < UNROLLED; k++) sums[k] = corrections[k] = parts[k] = Floats(0.f);
  int64_t i = 0;
  const Floats origin = load(from, lanes), inverse(1.f / static_cast<float>(count));
  for (; i + UNROLLED <= count; i += UNROLLED)
    for (int k = 0; k < UNROLLED; k++) sums[k] = sums[k] + (load(from + (i + k) * stride, lanes) - origin);
  for (; i < count; i++) sums[0] = sums[0] + (load(from + i * stride, lanes) - origin);
  mean = origin + (sums[0] + sums[1] + (sums[2] + sums[3])) * inverse;
  auto add = [&](int k, const T* at) {
    const Floats d = load(at, lanes) - mean;
    corrections[k] = corrections[k] + d;
    parts[k] = at::vec::fmadd(d, d, parts[k]);
  };
  for (i = 0; i + UNROLLED <= count; i += UNROLLED)
    for (int k = 0; k < UNROLLED; k++) add(k, from + (i + k) * stride);
  for (; i < count; i++) add(0, from + i * stride);
  const Floats correction = corrections[0] + corrections[1] + (corrections[2] + corrections[3]);
  squares = parts[0] + parts[1] + (parts[2] + parts[3]) - correction * correction * inverse;
  mean = mean + correction * inverse;
}

// Of `pixels` pixels, `stride` numbers apart, of `channels` numbers each.
template <typename T>
inline void piece_moments(const T* from, int64_t pixels, int64_t stride, int64_t channels, float* means,
                          float* squares) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const int64_t lanes = std::min(LANES, channels - c);
    Floats mean, square;
    if (lanes == LANES) vector_moments(from + c, pixels, stride, LANES, mean, square);
    else vector_moments(from + c, pixels, stride, lanes, mean, square);
    mean.store(means + c, lanes);
    square.store(squares + c, lanes);
  }
}

inline int64_t pixels_of_a_piece(int64_t channels) { return std::max<int64_t>(16, PIECE / channels); }
