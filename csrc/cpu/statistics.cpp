// Mean and biased variance of every (image, channel), in one read of the picture.
#include "moments.h"

struct Statistics {
  const void* input;
  float *mean, *variance;              // (images, channels)
  int64_t dtype, planar;               // planar: pixels of a channel lie beside each other, else channels of a pixel
  int64_t images, channels, pixels;
  int64_t image_stride, stride;        // from channel to channel if planar, else from pixel to pixel
};

namespace {

template <typename T>
void of_pixels(const Statistics& a) {
  const int64_t size = pixels_of_a_piece(a.channels), pieces = (a.pixels + size - 1) / size;
  Moments moments(a.images, pieces, a.channels);
  for (int64_t i = 0; i < pieces; i++) moments.pixels[i] = std::min(size, a.pixels - i * size);
  at::parallel_for(0, a.images * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t image = i / pieces, piece = i % pieces;
      const T* from = static_cast<const T*>(a.input) + image * a.image_stride + piece * size * a.stride;
      piece_moments(from, moments.pixels[piece], a.stride, a.channels, moments.mean(image, piece),
                    moments.square(image, piece));
    }
  });
  moments.merge(a.mean, a.variance);
}

// Pieces of one channel, whose vectors are merged lane by lane. Moments of (image, channel, piece).
template <typename T>
void of_planes(const Statistics& a) {
  const int64_t pieces = (a.pixels + PIECE - 1) / PIECE, planes = a.images * a.channels;
  std::vector<float> means(planes * pieces), squares(planes * pieces);
  at::parallel_for(0, planes * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t plane = i / pieces, start = i % pieces * PIECE, size = std::min(PIECE, a.pixels - start);
      const T* from = static_cast<const T*>(a.input) + plane / a.channels * a.image_stride +
                      plane % a.channels * a.stride + start;
      const int64_t vectors = size / LANES, rest = size % LANES;
      double mean = 0, square = 0;
      float lanes_mean[LANES], lanes_square[LANES];
      if (vectors) {
        Floats m, s;
        vector_moments(from, vectors, LANES, LANES, m, s);
        m.store(lanes_mean), s.store(lanes_square);
        for (float lane : lanes_mean) mean += lane * static_cast<double>(vectors);
      }
      float tail[LANES] = {};
      load(from + vectors * LANES, rest).store(tail);
      for (int64_t k = 0; k < rest; k++) mean += tail[k];
      mean /= size;
      for (int64_t k = 0; vectors && k < LANES; k++)
        square += lanes_square[k] + vectors * (lanes_mean[k] - mean) * (lanes_mean[k] - mean);
      for (int64_t k = 0; k < rest; k++) square += (tail[k] - mean) * (tail[k] - mean);
      // The rounded mean is what later pieces see: what it is off by belongs to the squares, and is below their digits.
      means[i] = mean, squares[i] = square;
    }
  });
  at::parallel_for(0, planes, std::max<int64_t>(1, 4096 / pieces), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; plane++) {
      double mean = 0, square = 0;
      auto size = [&](int64_t i) { return static_cast<double>(std::min(PIECE, a.pixels - i * PIECE)); };
      for (int64_t i = 0; i < pieces; i++) mean += size(i) * means[plane * pieces + i];
      mean /= a.pixels;
      for (int64_t i = 0; i < pieces; i++) {
        const double d = means[plane * pieces + i] - mean;
        square += squares[plane * pieces + i] + size(i) * d * d;
      }
      a.mean[plane] = mean, a.variance[plane] = square / a.pixels;
    }
  });
}

}  // namespace

extern "C" int64_t styleforge_statistics_size() { return sizeof(Statistics); }

extern "C" void styleforge_statistics(const Statistics* a) {
  if (a->dtype == FLOAT32) a->planar ? of_planes<float>(*a) : of_pixels<float>(*a);
  else a->planar ? of_planes<BFloat16>(*a) : of_pixels<BFloat16>(*a);
}
