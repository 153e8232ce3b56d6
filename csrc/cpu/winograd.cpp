// A 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): four outputs of a tile by 16 products instead of 36.
//
// A tile of 4x4 inputs d and the weights g become 16 numbers a channel each, B' d B and G g G' (the latter packed once,
// in double precision), which are multiplied and added up over the channels: 16 matrix products. Four outputs are
// A' m A of the sums m. Some tiles at a time go all the way while they are in the second-level cache, and the moments
// of their outputs are taken there. Fewer additions in a row make it no less exact than a direct convolution.
//
// Inputs are finished and padded, and channels_last; so is the output. Channels are multiples of 16.
#include "activation.h"
#include "moments.h"

constexpr int64_t PANEL = 16;       // output channels of a panel of packed weights (16, panels, channels, PANEL)
constexpr int64_t ROWS = 6;         // tiles that the inner loop multiplies at a time, by VECTORS vectors of outputs
constexpr int64_t VECTORS = 2;
constexpr int64_t CACHED = 98304;   // numbers that the tiles of a step take, unless they are too few for its weights

struct Winograd {
  const float* input;                // (images, height + 2, width + 2, channels)
  void* output;                      // (images, height, width, out_channels)
  const float *weights, *bias;       // bias: null for none
  float *mean, *variance;            // null if nobody asked
  int64_t output_dtype, images, channels, out_channels, height, width;
  Activation activation;
};

namespace {

// `rows` tiles (a row of `depth` numbers each) times `depth` x (VECTORS * LANES) weights.
template <int rows>
inline void multiply(const float* a, int64_t depth, const float* b, float* out, int64_t out_stride) {
  Floats sums[rows][VECTORS];
  const float* panels[VECTORS];
  for (int v = 0; v < VECTORS; v++) panels[v] = b + v * LANES / PANEL * depth * PANEL + v * LANES % PANEL;
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Floats(0.f);
  for (int64_t k = 0; k < depth; k++) {
    const Floats b0 = Floats::loadu(panels[0] + k * PANEL), b1 = Floats::loadu(panels[1] + k * PANEL);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const Floats x(a[r * depth + k]);
      sums[r][0] = at::vec::fmadd(x, b0, sums[r][0]);
      sums[r][1] = at::vec::fmadd(x, b1, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) sums[r][v].store(out + r * out_stride + v * LANES);
}

void multiply_rows(int64_t rows, const float* a, int64_t depth, const float* b, float* out, int64_t out_stride) {
  for (; rows >= ROWS; rows -= ROWS, a += ROWS * depth, out += ROWS * out_stride)
    multiply<ROWS>(a, depth, b, out, out_stride);
  switch (rows) {
    case 5: return multiply<5>(a, depth, b, out, out_stride);
    case 4: return multiply<4>(a, depth, b, out, out_stride);
    case 3: return multiply<3>(a, depth, b, out, out_stride);
    case 2: return multiply<2>(a, depth, b, out, out_stride);
    case 1: return multiply<1>(a, depth, b, out, out_stride);
    default: return;
  }
}

template <typename Out>
struct Pass {
  const Winograd& a;
  const int64_t across = (a.width + 1) / 2, tiles = (a.height + 1) / 2 * across;
  const int64_t padded = (a.out_channels + 2 * PANEL - 1) / (2 * PANEL) * 2 * PANEL;  // outputs of packed weights
  const int64_t at_once = std::clamp<int64_t>(CACHED / (16 * (a.channels + padded)) / ROWS * ROWS, 4 * ROWS, 8 * ROWS);

  // B' d B of tile `tile`, as row `row` of each of 16 matrices of `rows` rows.
  void transform_input(int64_t image, int64_t tile, float* to, int64_t rows, int64_t row) const {
    const int64_t y = tile / across * 2, x = tile % across * 2, c = a.channels, width = a.width + 2;
    const float* from[4][4];
    // Beyond the last row or column are pixels that no output of the picture sees.
    for (int64_t i = 0; i < 4; i++)
      for (int64_t j = 0; j < 4; j++) {
        const int64_t line = std::min(y + i, a.height + 1), column = std::min(x + j, width - 1);
        from[i][j] = a.input + ((image * (a.height + 2) + line) * width + column) * c;
      }
    for (int64_t k = 0; k < c; k += LANES) {
      Floats rows_done[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Floats d0 = Floats::loadu(from[0][j] + k), d1 = Floats::loadu(from[1][j] + k),
                     d2 = Floats::loadu(from[2][j] + k), d3 = Floats::loadu(from[3][j] + k);
        rows_done[0][j] = d0 - d2, rows_done[1][j] = d1 + d2, rows_done[2][j] = d2 - d1, rows_done[3][j] = d1 - d3;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Floats d0 = rows_done[i][0], d1 = rows_done[i][1], d2 = rows_done[i][2], d3 = rows_done[i][3];
        float* at = to + (4 * i * rows + row) * c + k;
        const int64_t step = rows * c;
        (d0 - d2).store(at), (d1 + d2).store(at + step), (d2 - d1).store(at + 2 * step), (d1 - d3).store(at + 3 * step);
      }
    }
  }

  // A' m A: the outputs of a tile, to those of the four places that are not null, twice.
  void transform_output(const float* from, int64_t step, Out* const (&to)[4], Out* const (&copies)[4]) const {
    for (int64_t k = 0; k < a.out_channels; k += LANES) {
      Floats halves[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const float* at = from + j * step + k;
        const Floats m0 = Floats::loadu(at), m1 = Floats::loadu(at + 4 * step), m2 = Floats::loadu(at + 8 * step),
                     m3 = Floats::loadu(at + 12 * step);
        halves[0][j] = m0 + m1 + m2, halves[1][j] = m1 - m2 - m3;
      }
      const Floats bias = a.bias ? Floats::loadu(a.bias + k) : Floats(0.f);
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const Floats* m = halves[i];
        const Floats left = apply<ANY>(m[0] + m[1] + m[2] + bias, a.activation);
        const Floats right = apply<ANY>(m[1] - m[2] - m[3] + bias, a.activation);
        if (to[2 * i]) store(to[2 * i] + k, left, LANES), store(copies[2 * i] + k, left, LANES);
        if (to[2 * i + 1]) store(to[2 * i + 1] + k, right, LANES), store(copies[2 * i + 1] + k, right, LANES);
      }
    }
  }

  int64_t pixels_of(int64_t tile) const {
    const int64_t y = tile / across * 2, x = tile % across * 2;
    return std::min<int64_t>(2, a.height - y) * std::min<int64_t>(2, a.width - x);
  }

  void run() const {
    const int64_t steps = (tiles + at_once - 1) / at_once, c = a.channels, o = a.out_channels;
    Moments moments(a.mean ? a.images : 0, steps, o);
    for (int64_t tile = 0; tile < tiles; tile++) moments.pixels[tile / at_once] += pixels_of(tile);
    at::parallel_for(0, a.images * steps, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> inputs(16 * at_once * c), products(16 * at_once * padded);
      std::vector<Out> outputs(4 * at_once * o);
      for (int64_t i = begin; i < end; i++) {
        const int64_t image = i / steps, step = i % steps, first = step * at_once;
        const int64_t rows = std::min(at_once, tiles - first);
        for (int64_t row = 0; row < rows; row++) transform_input(image, first + row, inputs.data(), rows, row);
        for (int64_t k = 0; k < 16; k++)
          for (int64_t to = 0; to < padded; to += VECTORS * LANES)
            multiply_rows(rows, inputs.data() + k * rows * c, c, a.weights + (k * padded + to) * c,
                          products.data() + k * rows * padded + to, padded);
        Out* pixel = outputs.data();
        for (int64_t row = 0; row < rows; row++) {
          const int64_t y = (first + row) / across * 2, x = (first + row) % across * 2;
          Out *places[4], *copies[4];
          for (int64_t p = 0; p < 4; p++) {
            const bool inside = y + p / 2 < a.height && x + p % 2 < a.width;
            const int64_t place = (image * a.height + y + p / 2) * a.width + x + p % 2;
            places[p] = inside ? static_cast<Out*>(a.output) + place * o : nullptr;
            copies[p] = pixel;
            pixel += inside ? o : 0;
          }
          transform_output(products.data() + row * padded, rows * padded, places, copies);
        }
        if (a.mean)
          piece_moments(outputs.data(), moments.pixels[step], o, o, moments.mean(image, step),
                        moments.square(image, step));
      }
    });
    if (a.mean) moments.merge(a.mean, a.variance);
  }
};

}  // namespace

extern "C" int64_t styleforge_winograd_size() { return sizeof(Winograd); }

extern "C" void styleforge_winograd(const Winograd* a) {
  if (a->output_dtype == FLOAT32) Pass<float>{*a}.run();
  else Pass<BFloat16>{*a}.run();
}
