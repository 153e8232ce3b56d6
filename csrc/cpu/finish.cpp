// A producer's norm, activation and residual, upsampled and padded, in one pass:
//
//   z      = act((x - mean) / sqrt(variance + eps) * weight + bias) + residual
//   output = pad(upsample_nearest(z)), and z itself where it is kept
//
// Every source row is finished once, into the first row of the output that shows it; further rows are copies of that
// one, which is still in the cache.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "activation.h"

enum Padding : int64_t { ZEROS, REFLECT, REPLICATE };

struct Finish {
  const void *input, *residual;                        // residual: null for none
  void *output, *kept;                                 // kept: null if nobody asked
  const float *mean, *variance, *weight, *bias;        // each null for none
  int64_t mean_stride, weight_stride, bias_stride;     // from image to image: 0 or the channels
  int64_t dtype, output_dtype, planar;                 // as in statistics.cpp; kept is of `dtype`
  int64_t images, channels, height, width;
  int64_t input_strides[3], residual_strides[3];       // image, row, pixel; if planar image, channel, row
  int64_t upsample, left, right, top, bottom, mode;
  double eps;
  Activation activation;
};

namespace {

// A norm as (x - mean) * scale + bias, of every (image, channel).
struct Affine {
  std::vector<float> mean, scale, bias;

  explicit Affine(const Finish& a) : mean(a.images * a.channels), scale(mean.size(), 1.f), bias(mean.size()) {
    if (!a.mean) return;
    for (int64_t n = 0; n < a.images; n++)
      for (int64_t c = 0; c < a.channels; c++) {
        const int64_t i = n * a.channels + c, j = n * a.mean_stride + c;
        mean[i] = a.mean[j];
        scale[i] = 1 / std::sqrt(a.variance[j] + a.eps);
        if (a.weight) scale[i] *= a.weight[n * a.weight_stride + c];
        if (a.bias) bias[i] = a.bias[n * a.bias_stride + c];
      }
  }
};

// The source's row or column that one of the padded, enlarged picture shows; -1 for none.
int64_t shown(int64_t at, int64_t before, int64_t size, int64_t upsample, int64_t mode) {
  int64_t i = at - before;
  const int64_t enlarged = size * upsample;
  if (i < 0 || i >= enlarged) {
    if (mode == ZEROS) return -1;
    if (mode == REPLICATE) i = i < 0 ? 0 : enlarged - 1;
    else i = i < 0 ? -i : 2 * (enlarged - 1) - i;
  }
  return i / upsample;
}

// The output's rows by the source row that they show, and those that show none.
struct Rows {
  std::vector<std::vector<int64_t>> of;
  std::vector<int64_t> empty;

  explicit Rows(const Finish& a) : of(a.height) {
    const int64_t height = a.height * a.upsample + a.top + a.bottom;
    for (int64_t y = 0; y < height; y++) {
      const int64_t from = shown(y, a.top, a.height, a.upsample, a.mode);
      (from < 0 ? empty : of[from]).push_back(y);
    }
  }
};

template <Kind kind, typename T, typename Out>
struct Pass {
  const Finish& a;
  const Affine& affine;
  const int64_t out_width = a.width * a.upsample + a.left + a.right;

  // What is in a row of `unit` numbers a pixel beside the picture, once the picture is there.
  void pad_row(Out* row, int64_t unit) const {
    auto fill = [&](int64_t x) {
      Out* to = row + x * unit;
      const int64_t from = shown(x, a.left, a.width, a.upsample, a.mode);
      if (from < 0) std::fill_n(to, unit, Out(0.f));
      else std::copy_n(row + (a.left + from * a.upsample) * unit, unit, to);
    };
    for (int64_t x = 0; x < a.left; x++) fill(x);
    for (int64_t x = out_width - a.right; x < out_width; x++) fill(x);
  }

  // Channels of a pixel, from `c` on, of which `lanes` count.
  void vector(int64_t c, int64_t lanes, int64_t params, const T* in, const T* residual, Out* out, T* kept) const {
    Floats x = load(in + c, lanes);
    x = at::vec::fmadd(x - load(affine.mean.data() + params, lanes), load(affine.scale.data() + params, lanes),
                       load(affine.bias.data() + params, lanes));
    x = apply<kind>(x, a.activation);
    if (residual) x = x + load(residual + c, lanes);
    if (kept) store(kept + c, x, lanes);
    for (int64_t u = 0; u < a.upsample; u++) store(out + u * a.channels + c, x, lanes);
  }

  void row_of_pixels(int64_t n, int64_t y, Out* row) const {
    const T* in = static_cast<const T*>(a.input) + n * a.input_strides[0] + y * a.input_strides[1];
    const T* residual = static_cast<const T*>(a.residual);
    if (residual) residual += n * a.residual_strides[0] + y * a.residual_strides[1];
    T* kept = static_cast<T*>(a.kept);
    if (kept) kept += (n * a.height + y) * a.width * a.channels;
    Out* out = row + a.left * a.channels;
    const int64_t whole = a.channels / LANES * LANES, params = n * a.channels;
    for (int64_t x = 0; x < a.width; x++) {
      for (int64_t c = 0; c < whole; c += LANES) vector(c, LANES, params + c, in, residual, out, kept);
      if (whole < a.channels) vector(whole, a.channels - whole, params + whole, in, residual, out, kept);
      in += a.input_strides[2];
      if (residual) residual += a.residual_strides[2];
      if (kept) kept += a.channels;
      out += a.upsample * a.channels;
    }
    pad_row(row, a.channels);
  }

  void row_of_plane(int64_t n, int64_t channel, int64_t y, Out* row, float* line) const {
    const int64_t param = n * a.channels + channel;
    auto at = [&](const int64_t* strides) { return n * strides[0] + channel * strides[1] + y * strides[2]; };
    const T* in = static_cast<const T*>(a.input) + at(a.input_strides);
    const T* residual = static_cast<const T*>(a.residual);
    if (residual) residual += at(a.residual_strides);
    T* kept = static_cast<T*>(a.kept);
    if (kept) kept += (param * a.height + y) * a.width;
    Out* out = row + a.left;
    const Floats mean(affine.mean[param]), scale(affine.scale[param]), bias(affine.bias[param]);
    for (int64_t x = 0; x < a.width; x += LANES) {
      const int64_t lanes = std::min(LANES, a.width - x);
      Floats v = apply<kind>(at::vec::fmadd(load(in + x, lanes) - mean, scale, bias), a.activation);
      if (residual) v = v + load(residual + x, lanes);
      if (kept) store(kept + x, v, lanes);
      if (a.upsample == 1) store(out + x, v, lanes);
      else v.store(line + x, lanes);
    }
    if (a.upsample > 1)
      for (int64_t x = 0; x < a.width; x++) std::fill_n(out + x * a.upsample, a.upsample, Out(line[x]));
    pad_row(row, 1);
  }

  void run() const {
    const Rows rows(a);
    const int64_t unit = a.planar ? 1 : a.channels, length = out_width * unit;
    const int64_t pictures = a.planar ? a.images * a.channels : a.images;
    const int64_t out_height = a.height * a.upsample + a.top + a.bottom;
    const int64_t grain = std::max<int64_t>(1, 16384 / length);
    at::parallel_for(0, pictures * a.height, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> line(a.planar && a.upsample > 1 ? a.width : 0);
      for (int64_t i = begin; i < end; i++) {
        const int64_t picture = i / a.height, y = i % a.height;
        Out* out = static_cast<Out*>(a.output) + picture * out_height * length;
        const auto& shows = rows.of[y];
        Out* first = out + shows[0] * length;
        if (a.planar) row_of_plane(picture / a.channels, picture % a.channels, y, first, line.data());
        else row_of_pixels(picture, y, first);
        for (size_t k = 1; k < shows.size(); k++) std::memcpy(out + shows[k] * length, first, length * sizeof(Out));
      }
    });
    if (rows.empty.empty()) return;
    at::parallel_for(0, pictures, 1, [&](int64_t begin, int64_t end) {
      for (int64_t picture = begin; picture < end; picture++)
        for (int64_t y : rows.empty)
          std::fill_n(static_cast<Out*>(a.output) + (picture * out_height + y) * length, length, Out(0.f));
    });
  }
};

template <typename T, typename Out>
void run(const Finish& a) {
  const Affine affine(a);
  switch (kind_of(a.activation)) {
    case PLAIN: return Pass<PLAIN, T, Out>{a, affine}.run();
    case RECTIFIED: return Pass<RECTIFIED, T, Out>{a, affine}.run();
    case LEAKY: return Pass<LEAKY, T, Out>{a, affine}.run();
    default: return Pass<ANY, T, Out>{a, affine}.run();
  }
}

}  // namespace

extern "C" int64_t styleforge_finish_size() { return sizeof(Finish); }

extern "C" void styleforge_finish(const Finish* a) {
  if (a->dtype == FLOAT32) return run<float, float>(*a);
  if (a->output_dtype == FLOAT32) return run<BFloat16, float>(*a);
  run<BFloat16, BFloat16>(*a);
}
