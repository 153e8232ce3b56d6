// The result of a convolution that PyTorch ran in another form, put in its place: bias, activation, the rounding to the
// output's dtype, and the output's mean and variance from the same pass. Pixels are channels_last.
//
//   DIRECT     the convolution itself
//   SUBPIXEL   four 2x2 convolutions in one, of the picture before it was enlarged by 2: channels 2 p + q of
//              (images, height / 2 + 1, width / 2 + 1, 4, channels) are output rows of parity p, columns of parity q
//   COLUMNS    one convolution for every column of the kernel, (images, height, width + columns - 1, columns, channels)
//              whose results are added, each of a pixel farther right
#include "activation.h"
#include "moments.h"

enum Form : int64_t { DIRECT, SUBPIXEL, COLUMNS };

struct Assemble {
  const void* input;
  void* output;
  const float* bias;                    // null for none, and in the form DIRECT
  float *mean, *variance;               // null if nobody asked
  int64_t dtype, output_dtype, form, columns;
  int64_t images, channels, height, width;  // of the output
  Activation activation;
};

namespace {

template <typename In, typename Out>
struct Pass {
  const Assemble& a;

  // `lanes` numbers of a pixel from channel `c` on.
  void vector(const In* from, Out* to, int64_t c, int64_t lanes) const {
    Floats x = load(from + c, lanes);
    if (a.bias) x = x + load(a.bias + c, lanes);
    store(to + c, apply<ANY>(x, a.activation), lanes);
  }

  void pixel(const In* from, Out* to) const {
    const int64_t whole = a.channels / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) vector(from, to, c, LANES);
    if (whole < a.channels) vector(from, to, whole, a.channels - whole);
  }

  // Pixels (image, y, first) to (image, y, last - 1) of the output.
  void pixels(int64_t image, int64_t y, int64_t first, int64_t last, Out* to) const {
    const In* input = static_cast<const In*>(a.input);
    const int64_t c = a.channels;
    if (a.form == DIRECT) {
      // oneDNN has added the bias: all numbers are alike, however few a pixel has.
      const In* from = input + ((image * a.height + y) * a.width + first) * c;
      const int64_t numbers = (last - first) * c, whole = numbers / LANES * LANES;
      for (int64_t i = 0; i < whole; i += LANES) vector(from, to, i, LANES);
      if (whole < numbers) vector(from, to, whole, numbers - whole);
    } else if (a.form == SUBPIXEL) {
      const int64_t p = y & 1, row = (image * (a.height / 2 + 1) + y / 2 + p) * (a.width / 2 + 1);
      for (int64_t x = first; x < last; x++) {
        const int64_t q = x & 1;
        pixel(input + ((row + x / 2 + q) * 4 + 2 * p + q) * c, to + (x - first) * c);
      }
    } else {
      // Channels are few: a pixel's numbers of all columns are added one by one, and the sums are a row of vectors.
      float sums[LANES * 8];
      const int64_t step = a.columns * c, at_once = LANES * 8 / c;
      const In* from = input + (image * a.height + y) * (a.width + a.columns - 1) * step;
      for (int64_t x = first; x < last; x += at_once) {
        const int64_t count = std::min(at_once, last - x), numbers = count * c;
        for (int64_t i = 0; i < count; i++)
          for (int64_t o = 0; o < c; o++) {
            const In* at = from + (x + i) * step + o;
            float sum = a.bias ? a.bias[o] : 0.f;
            for (int64_t k = 0; k < a.columns; k++) sum += static_cast<float>(at[k * (step + c)]);
            sums[i * c + o] = sum;
          }
        for (int64_t i = 0; i < numbers; i += LANES) {
          const int64_t lanes = std::min(LANES, numbers - i);
          store(to + (x - first) * c + i, apply<ANY>(load(sums + i, lanes), a.activation), lanes);
        }
      }
    }
  }

  void run() const {
    const int64_t size = pixels_of_a_piece(a.channels), in_row = (a.width + size - 1) / size;
    const int64_t pieces = a.height * in_row;
    Moments moments(a.mean ? a.images : 0, pieces, a.channels);
    for (int64_t i = 0; i < pieces; i++) moments.pixels[i] = std::min(size, a.width - i % in_row * size);
    at::parallel_for(0, a.images * pieces, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t image = i / pieces, piece = i % pieces, y = piece / in_row, first = piece % in_row * size;
        Out* to = static_cast<Out*>(a.output) + ((image * a.height + y) * a.width + first) * a.channels;
        pixels(image, y, first, first + moments.pixels[piece], to);
        if (a.mean)
          piece_moments(to, moments.pixels[piece], a.channels, a.channels, moments.mean(image, piece),
                        moments.square(image, piece));
      }
    });
    if (a.mean) moments.merge(a.mean, a.variance);
  }
};

}  // namespace

extern "C" int64_t styleforge_assemble_size() { return sizeof(Assemble); }

extern "C" void styleforge_assemble(const Assemble* a) {
  if (a->output_dtype == FLOAT32) Pass<float, float>{*a}.run();
  else if (a->dtype == FLOAT32) Pass<float, BFloat16>{*a}.run();
  else Pass<BFloat16, BFloat16>{*a}.run();
}
