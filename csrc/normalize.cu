// The way into a convolution, and the end of an instance norm, in one pass over the pixels:
//
//   z   = act((x - mean) / sqrt(variance + eps) * weight + bias) + residual
//   out = pad(upsample_nearest(z)),   and z itself where `kept` is given
//
// Every output pixel finds its source by index arithmetic; nothing else is written.
// Absent parts are null pointers. Constants: DTYPE, PARAMETER, LAYOUT (below), VECTOR, UPSAMPLE (1 or 2; 0 where
// the factor is only known at run time), ACTIVATION (of activation.cuh), PAD (0 none, 1 zeros, 2 reflect, 3 replicate),
// RESIDUAL and OUTPUT (the DTYPE of the residual, and of what is written). With an OUTPUT of 8 bits, which channels_last
// pictures in vectors of 4 or more have, `out` is z * `per_unit` rounded to integers, and `kept` is z in DTYPE.
#include "activation.cuh"
#include "dependent_launch.cuh"
#include "norm.cuh"
#include "source.cuh"

#define CHANNELS_LAST 0  // every tensor channels_last: a thread moves VECTOR channels of a pixel
#define CONTIGUOUS 1     // every tensor contiguous: a thread moves VECTOR pixels of a plane
#define STRIDED 2        // tensors of different layouts: one element a thread, in the output's order

typedef Storage<RESIDUAL>::type added;
typedef Storage<OUTPUT>::type result;
#if OUTPUT >= INT8
#define KEPT DTYPE
#define PER_UNIT , float per_unit
#define PASS_UNIT , per_unit
#else
#define KEPT OUTPUT
#define PER_UNIT
#define PASS_UNIT
#endif
typedef Storage<KEPT>::type keeping;

#define UNROLL 4
// Of a multiprocessor. Functions with an exponential need more registers.
#define BLOCKS (ACTIVATION < TANH ? 3 : 2)

// Blocks run from the last pixel to the first: the statistics have just been read in the other
// direction, so the pixels read last are still in the L2 cache.
#define REVERSED(axis) (gridDim.axis - 1 - blockIdx.axis)

// The activation of each of a thread's channels: of a PReLU one for each, with its slope, else one for all.
#if ACTIVATION == PRELU
#define SLOPES , const element *__restrict__ slopes, i64 slope_stride  // 0 where all channels have one slope
#define WITH_SLOPE(channel) \
  { to_float<DTYPE>(slopes[(channel) * slope_stride]), 0.f, activation.scale, activation.offset }
#else
#define SLOPES
#define WITH_SLOPE(channel) activation
#endif

#define ARGUMENTS                                                                                                   \
  const element *__restrict__ x, const added *__restrict__ residual, result *__restrict__ out,                      \
      keeping *__restrict__ kept, const float *mean, const float *variance, const parameter *weight,                \
      const parameter *bias, float eps, Activation activation, i64 image_stride, i64 weight_stride, i64 bias_stride, \
      int channels, int height, int width, int run_time_factor, int top, int left, int out_height,                  \
      int out_width SLOPES PER_UNIT
#define FACTOR (UPSAMPLE ? UPSAMPLE : run_time_factor)

#if LAYOUT == CHANNELS_LAST
#if ACTIVATION == PRELU
#define ACTIVATIONS(name) const Activation(&name)[VECTOR]
#define ACTIVATION_OF(v) activation[v]
#else
#define ACTIVATIONS(name) const Activation& name
#define ACTIVATION_OF(v) activation
#endif

// One segment of a row: pixels start, start + columns, ... below end, UNROLL loads in flight.
template <bool kResidual, bool kKeep> DEVICE void write_row(
    const Affine (&affine)[VECTOR], ACTIVATIONS(activation), const element* from_row, const added* more_row,
    result* to_row, keeping* kept_row, bool zero_row, int start, int end, int columns, int channels, int left,
    int width, int factor PER_UNIT) {
  for (int x0 = start; x0 < end; x0 += UNROLL * columns) {
    Vector<VECTOR> in[UNROLL];
    Vector<VECTOR, RESIDUAL> more[UNROLL];
    int from[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      from[u] = source(min(x0 + u * columns, end - 1), left, width, factor);
      const int offset = PAD == 1 ? max(from[u], 0) * channels : from[u] * channels;
      in[u] = load<VECTOR>(from_row + offset);
      if (kResidual) more[u] = load<VECTOR, RESIDUAL>(more_row + offset);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int at = x0 + u * columns;
      float values[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; v++) {
        values[v] = activate_and_scale<ACTIVATION>(affine[v](to_float<DTYPE>(in[u].values[v])), ACTIVATION_OF(v));
        if (kResidual) values[v] += to_float<RESIDUAL>(more[u].values[v]);
        if (PAD == 1 && (zero_row || from[u] < 0)) values[v] = 0.f;
      }
      const Vector<VECTOR, KEPT> whole = from_floats<KEPT>(values);
#if OUTPUT >= INT8
#pragma unroll
      for (int v = 0; v < VECTOR; v++) values[v] *= per_unit;
      const Vector<VECTOR, OUTPUT> written = from_floats<OUTPUT>(values);
#else
      const Vector<VECTOR, OUTPUT>& written = whole;
#endif
      if (at < end) {
        store<VECTOR>(to_row + at * channels, written);
        if (kKeep && owns(at, left, width, factor)) store<VECTOR>(kept_row + from[u] * channels, whole);
      }
    }
  }
}

// Grid (blocks, N, ceil(C / VECTOR / 256)), 256 threads: `lanes` channel groups x pixels. The work is
// `segments` segments of `segment` pixels for every output row, which has under 2^30 elements; blocks
// take them in turn.
extern "C" __global__ void __launch_bounds__(256, BLOCKS) normalize(ARGUMENTS, int lanes, int segments, int segment) {
  launch_dependents();
  wait_for_previous();
  const Norm norm = {mean, variance, weight, bias, eps, image_stride, weight_stride, bias_stride};
  const int factor = FACTOR;
  const int group = blockIdx.z * 256 + threadIdx.x % lanes, column = threadIdx.x / lanes, columns = 256 / lanes;
  const i64 channel = (i64)group * VECTOR, image = REVERSED(y);
  if (column >= columns || channel >= channels) return;
  Affine affine[VECTOR];
#pragma unroll
  for (int v = 0; v < VECTOR; v++) affine[v] = norm.at(image, channel + v);
#if ACTIVATION == PRELU
  Activation own[VECTOR];
#pragma unroll
  for (int v = 0; v < VECTOR; v++) own[v] = WITH_SLOPE(channel + v);
#define OWN own
#else
#define OWN activation
#endif
  for (int task = out_height * segments - 1 - blockIdx.x; task >= 0; task -= gridDim.x) {
    const int y = task / segments, start = task % segments * segment, end = min(out_width, start + segment);
    const int from_y = source(y, top, height, factor);
    const i64 from_row = (image * height + max(from_y, 0)) * width * channels + channel;
    result* to_row = out + (image * out_height + y) * out_width * channels + channel;
    const bool keeps = kept && owns(y, top, height, factor);
#define WRITE_ROW(RESIDUAL, KEEP)                                                                              \
  write_row<RESIDUAL, KEEP>(affine, OWN, x + from_row, residual + from_row, to_row, kept + from_row,    \
                            from_y < 0, start + column, end, columns, channels, left, width, factor PASS_UNIT)
    if (residual)
      keeps ? WRITE_ROW(true, true) : WRITE_ROW(true, false);
    else
      keeps ? WRITE_ROW(false, true) : WRITE_ROW(false, false);
  }
}
#elif LAYOUT == CONTIGUOUS
// Grid (blocks a plane, min(N C, 65535)), 256 threads. VECTOR > 1 only without pad and upsample,
// where the host passes a plane as one row.
extern "C" __global__ void __launch_bounds__(256, 2) normalize(ARGUMENTS, i64 planes) {
  launch_dependents();
  wait_for_previous();
  const Norm norm = {mean, variance, weight, bias, eps, image_stride, weight_stride, bias_stride};
  const int factor = FACTOR;
  const i64 pixels = (i64)height * width, out_pixels = (i64)out_height * out_width;
  for (i64 plane = REVERSED(y); plane < planes; plane += gridDim.y) {
    const Affine affine = norm.at(plane / channels, plane % channels);
    const Activation own = WITH_SLOPE(plane % channels);
    const element* from = x + plane * pixels;
    const added* add = residual + plane * pixels;
    if (PAD == 0 && UPSAMPLE == 1) {
      const i64 stride = (i64)gridDim.x * 256 * VECTOR;
      for (i64 at = ((i64)REVERSED(x) * 256 + threadIdx.x) * VECTOR; at < pixels; at += UNROLL * stride) {
        Vector<VECTOR> in[UNROLL];
        Vector<VECTOR, RESIDUAL> more[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
          if (at + u * stride < pixels) {
            in[u] = load<VECTOR>(from + at + u * stride);
            if (residual) more[u] = load<VECTOR, RESIDUAL>(add + at + u * stride);
          }
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
          if (at + u * stride < pixels) {
            float values[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
              values[v] = activate_and_scale<ACTIVATION>(affine(to_float<DTYPE>(in[u].values[v])), own);
              if (residual) values[v] += to_float<RESIDUAL>(more[u].values[v]);
            }
            const Vector<VECTOR, OUTPUT> written = from_floats<OUTPUT>(values);
            store<VECTOR>(out + plane * out_pixels + at + u * stride, written);
            if (kept) store<VECTOR>(kept + plane * pixels + at + u * stride, written);
          }
      }
    } else {
      for (int y = blockIdx.x; y < out_height; y += gridDim.x) {
        const int from_y = source(y, top, height, factor);
        for (int at = threadIdx.x; at < out_width; at += 256) {
          const int from_x = source(at, left, width, factor);
          float value = 0.f;
          const i64 i = (i64)from_y * width + from_x;
          if (from_y >= 0 && from_x >= 0) {
            value = activate_and_scale<ACTIVATION>(affine(to_float<DTYPE>(from[i])), own);
            if (residual) value += to_float<RESIDUAL>(add[i]);
          }
          const result written = from_float<OUTPUT>(value);
          out[plane * out_pixels + (i64)y * out_width + at] = written;
          if (kept && owns(y, top, height, factor) && owns(at, left, width, factor)) kept[plane * pixels + i] = written;
        }
      }
    }
  }
}
#else
// Strides are of image, channel, row and pixel, in elements; `out` and `kept` are dense.
struct Strides {
  i64 image, channel, row, pixel;
  DEVICE i64 at(i64 n, i64 c, i64 y, i64 x) const { return n * image + c * channel + y * row + x * pixel; }
};

// Grid (output rows, N), 256 threads over the channels and pixels of a row.
extern "C" __global__ void __launch_bounds__(256) normalize(
    ARGUMENTS, int out_channels_last, int kept_channels_last, i64 x_image, i64 x_channel, i64 x_row, i64 x_pixel,
    i64 r_image, i64 r_channel, i64 r_row, i64 r_pixel) {
  launch_dependents();
  wait_for_previous();
  const Norm norm = {mean, variance, weight, bias, eps, image_stride, weight_stride, bias_stride};
  const int factor = FACTOR, y = REVERSED(x), inner = out_channels_last ? channels : out_width;
  const i64 n = REVERSED(y), pixels = (i64)height * width, out_pixels = (i64)out_height * out_width;
  const Strides in = {x_image, x_channel, x_row, x_pixel}, add = {r_image, r_channel, r_row, r_pixel};
  const int from_y = source(y, top, height, factor);
  for (int i = threadIdx.x; i < channels * out_width; i += 256) {
    const int outer = (u32)i / (u32)inner, rest = i - outer * inner;
    const int c = out_channels_last ? rest : outer, at = out_channels_last ? outer : rest;
    const int from_x = source(at, left, width, factor);
    float value = 0.f;
    if (from_y >= 0 && from_x >= 0) {
      const float normed = norm.at(n, c)(to_float<DTYPE>(x[in.at(n, c, from_y, from_x)]));
      const Activation own = WITH_SLOPE(c);
      value = activate_and_scale<ACTIVATION>(normed, own);
      if (residual) value += to_float<RESIDUAL>(residual[add.at(n, c, from_y, from_x)]);
    }
    const result written = from_float<OUTPUT>(value);
    const i64 row = (i64)y * out_width, plane = n * channels + c;
    out[out_channels_last ? (n * out_pixels + row) * channels + i : plane * out_pixels + row + at] = written;
    if (kept && owns(y, top, height, factor) && owns(at, left, width, factor)) {
      const i64 pixel = (i64)from_y * width + from_x;
      kept[kept_channels_last ? (n * pixels + pixel) * channels + c : plane * pixels + pixel] = written;
    }
  }
}
#endif
