// A picture in the other layout: planes of channels as pixels of channels, or the other way round.
//
// Either way every image is a matrix that is transposed. Tiles are as wide as a cache line, so each line is read once
// and written once, whatever lies between the rows (of planes often a power of two, at which lines push each other
// out of the cache).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elements.h"

struct Layout {
  const void* input;
  void* output;                             // (images, columns, rows), dense
  int64_t dtype, images, rows, columns;     // of a planar input: channels, pixels; else pixels, channels
  int64_t image_stride, row_stride;         // of the input, whose columns lie beside each other
};

namespace {

template <typename T>
struct Transposition {
  static constexpr int64_t TILE = 64 / sizeof(T);
  const Layout& a;

  void whole_tile(const T* from, T* to) const {
    T tile[TILE][TILE];
    for (int64_t r = 0; r < TILE; r++) std::memcpy(tile[r], from + r * a.row_stride, sizeof(tile[r]));
    for (int64_t c = 0; c < TILE; c++) {
      T line[TILE];
      for (int64_t r = 0; r < TILE; r++) line[r] = tile[r][c];
      std::memcpy(to + c * a.rows, line, sizeof(line));
    }
  }

  void part_of_a_tile(const T* from, T* to, int64_t rows, int64_t columns) const {
    for (int64_t c = 0; c < columns; c++)
      for (int64_t r = 0; r < rows; r++) to[c * a.rows + r] = from[r * a.row_stride + c];
  }

  void tile(const T* from, T* to, int64_t row, int64_t column) const {
    const int64_t rows = std::min(TILE, a.rows - row), columns = std::min(TILE, a.columns - column);
    from += row * a.row_stride + column;
    to += column * a.rows + row;
    if (rows == TILE && columns == TILE) whole_tile(from, to);
    else part_of_a_tile(from, to, rows, columns);
  }

  // Strips along the shorter side one after another: what is written, or read, then lies beside what was before.
  void run() const {
    const bool across = a.rows < a.columns;
    const int64_t strips = ((across ? a.columns : a.rows) + TILE - 1) / TILE, shorter = std::min(a.rows, a.columns);
    const int64_t grain = std::max<int64_t>(1, 32768 / (shorter * TILE));
    at::parallel_for(0, a.images * strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t image = i / strips, at = i % strips * TILE;
        const T* from = static_cast<const T*>(a.input) + image * a.image_stride;
        T* to = static_cast<T*>(a.output) + image * a.rows * a.columns;
        for (int64_t other = 0; other < shorter; other += TILE)
          tile(from, to, across ? other : at, across ? at : other);
      }
    });
  }
};

}  // namespace

extern "C" int64_t styleforge_layout_size() { return sizeof(Layout); }

extern "C" void styleforge_layout(const Layout* a) {
  if (a->dtype == FLOAT32) return Transposition<float>{*a}.run();
  Transposition<BFloat16>{*a}.run();
}
