// Pictures on their way in and out: uint8 (N, H, W, 3), as cameras and files have them, to numbers and back.
//
//   picture_to_float   x = c * span / 255 + low      extended to the right and down by reflection
//   picture_to_uint8   c = round(clamp((y - low) * scale, 0, 255)), half to even; says which images are not finite
//
// A thread has four neighbouring pixels of a row: 12 bytes of uint8. Constants: DTYPE, PARAMETER (unused), LAYOUT of
// the numbers: 0 three planes of dense rows, 1 dense pixels (channels_last), 2 any strides (picture_to_uint8 alone).
#include "elements.cuh"

typedef unsigned char u8;

// Index i >= 0 of an endless mirror without repeated edges, as a pixel of n.
DEVICE int mirrored(int i, int n) {
  if (i < n) return i;
  if (n == 1) return 0;
  const int period = 2 * (n - 1), rest = i % period;
  return rest < n ? rest : period - rest;
}

// Grid (ceil(count / 256)), 256 threads; `count` groups of four pixels, `groups` of them a row. `words`: rows of the
// uint8 picture begin at multiples of 4 bytes, and so do all groups; `vectors`: groups of the result at multiples of
// four elements. Neither is so where a row has another length than a multiple of four.
extern "C" __global__ void __launch_bounds__(256) picture_to_float(
    const u8* input, element* out, int height, int width, int out_height, int out_width, u32 count, u32 groups,
    float span, float low, int words, int vectors) {
  const u32 index = blockIdx.x * 256u + threadIdx.x;
  if (index >= count) return;
  const u32 row = index / groups, image = row / (u32)out_height;
  const int y = (int)(row - image * (u32)out_height), x = (int)(index - row * groups) * 4;
  const u8* line = input + ((i64)image * height + mirrored(y, height)) * width * 3;
  u8 bytes[12];
  if (words && x + 4 <= width) {
    const u32* from = reinterpret_cast<const u32*>(line + (i64)x * 3);
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const u32 word = from[i];
#pragma unroll
      for (int j = 0; j < 4; j++) bytes[4 * i + j] = (u8)(word >> 8 * j);
    }
  } else {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const u8* from = line + (i64)mirrored(x + p, width) * 3;
#pragma unroll
      for (int c = 0; c < 3; c++) bytes[3 * p + c] = from[c];
    }
  }
  float values[12];
#pragma unroll
  for (int i = 0; i < 12; i++) {
    const float value = (float)bytes[i];
    // 255 c / 255 is c itself.
    values[i] = __fadd_rn(span == 255.f ? value : __fdiv_rn(__fmul_rn(value, span), 255.f), low);
  }
  if constexpr (LAYOUT == 0) {
    const i64 plane = (i64)out_height * out_width;
    element* to = out + (i64)image * 3 * plane + (i64)y * out_width + x;
#pragma unroll
    for (int c = 0; c < 3; c++, to += plane) {
      const float four[4] = {values[c], values[3 + c], values[6 + c], values[9 + c]};
      if (vectors) {
        store(to, from_floats(four));
      } else {
#pragma unroll
        for (int p = 0; p < 4; p++)
          if (x + p < out_width) to[p] = from_float<DTYPE>(four[p]);
      }
    }
  } else {
    element* to = out + ((i64)row * out_width + x) * 3;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < 3; i++) {
        const float four[4] = {values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]};
        store(to + 4 * i, from_floats(four));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 12; i++)
        if (x + i / 3 < out_width) to[i] = from_float<DTYPE>(values[i]);
    }
  }
}

// The same grid, over the pixels of the result. Strides are in elements; LAYOUT 0 has columns at 1, LAYOUT 1 channels
// at 1 and columns at 3. `vectors`: every group of four lies within its row, at a multiple of four elements. `broken`
// was zeroed; it becomes 1 for an image with a number that is not finite.
extern "C" __global__ void __launch_bounds__(256) picture_to_uint8(
    const element* input, u8* out, int* broken, i64 image_stride, i64 channel_stride, i64 row_stride,
    i64 column_stride, int height, int width, u32 count, u32 groups, float low, float scale, int words,
    int vectors) {
  const u32 index = blockIdx.x * 256u + threadIdx.x;
  if (index >= count) return;
  const u32 row = index / groups, image = row / (u32)height;
  const int y = (int)(row - image * (u32)height), x = (int)(index - row * groups) * 4;
  const element* line = input + image * image_stride + y * row_stride;
  float values[12];
  if (LAYOUT == 0 && vectors) {
#pragma unroll
    for (int c = 0; c < 3; c++) {
      const Vector<4> four = load<4>(line + c * channel_stride + x);
#pragma unroll
      for (int p = 0; p < 4; p++) values[3 * p + c] = to_float<DTYPE>(four.values[p]);
    }
  } else if (LAYOUT == 1 && vectors) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const Vector<4> four = load<4>(line + (i64)x * 3 + 4 * i);
#pragma unroll
      for (int j = 0; j < 4; j++) values[4 * i + j] = to_float<DTYPE>(four.values[j]);
    }
  } else {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const element* from = line + (x + p < width ? x + p : width - 1) * column_stride;
#pragma unroll
      for (int c = 0; c < 3; c++) values[3 * p + c] = to_float<DTYPE>(from[c * channel_stride]);
    }
  }
  u8 bytes[12];
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 12; i++) {
    finite = finite && fabsf(values[i]) <= 3.402823466e38f;
    const float value = __fmul_rn(__fadd_rn(values[i], -low), scale);
    bytes[i] = (u8)__float2int_rn(fminf(fmaxf(value, 0.f), 255.f));  // NaN becomes 0
  }
  if (!finite) broken[image] = 1;
  u8* to = out + ((i64)row * width + x) * 3;
  if (words) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const u32 low_half = bytes[4 * i] | (u32)bytes[4 * i + 1] << 8;
      reinterpret_cast<u32*>(to)[i] = low_half | (u32)bytes[4 * i + 2] << 16 | (u32)bytes[4 * i + 3] << 24;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 12; i++)
      if (x + i / 3 < width) to[i] = bytes[i];
  }
}
