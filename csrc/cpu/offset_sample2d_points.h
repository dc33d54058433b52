// Bilinear samples of planes at points that are clamped to the image, a tile of points at a time.
//
// A plane is staged in scratch in the type of the sums, with a column of zeros behind each row and a row of zeros below:
// a corner outside the image reads an exact zero, and the two upper corners of a point, and its two lower ones, are
// pairs of neighbours. Hardware gathers of the four corners take four times as long as copying these pairs does
// (24 ns against 6.4 ns for 16 points, AMD EPYC with AVX-512).
#pragma once
#include "../cellops.h"
#include "../common/layout.h"
#include "../common/pairs.h"
#include "../common/parallel.h"
#include "../common/simd.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int kTilePoints = 64;
inline constexpr int kBlockPlanes = 16;  // planes that are staged together where memory holds their channels together

// The staged planes' sizes, and the coordinates of the points before they are shifted.
template <class S>
class Grid {
 public:
  Grid(int64_t height, int64_t width)
      : height(height),
        width(width),
        row(width + 1),
        plane((height + 1) * (width + 1)),
        rows(min_of(height, max_of(1, 1024 / width))),
        last_row(broadcast(S(height - 1))),
        last_column(broadcast(S(width - 1))),
        row_length(broadcast(S(width + 1))),
        exact_(sizeof(S) == 8 || plane < 1 << 24),
        y_(rows * width + kLanes<S>),
        x_(rows * width + kLanes<S>) {
    if (failed()) return;
    for (int64_t i = 0; i < y_.count(); ++i) y_.get()[i] = S(i / width), x_.get()[i] = S(i % width);
  }
  bool failed() const { return y_.failed() || x_.failed(); }
  const S* y() const { return y_.get(); }  // of `rows` rows from the first on
  const S* x() const { return x_.get(); }

  // Where clamped coordinates that are whole numbers lie in a staged plane; 0 where one is NaN.
  CELLOPS_INLINE VecInt<S> cell(Vec<S> top, Vec<S> left) const {
    using I = VecInt<S>;
    const Vec<S> zero = {};
    if (exact_) {
      const Vec<S> cell = top * row_length + left;
      return __builtin_convertvector(cell > zero ? cell : zero, I);
    }
    const auto known = (top == top) & (left == left);
    return __builtin_convertvector(known ? top : zero, I) * __builtin_convertvector(row_length, I) +
           __builtin_convertvector(known ? left : zero, I);
  }

  const int64_t height, width;
  const int64_t row, plane;  // lengths of a staged row and plane
  const int64_t rows;        // that y and x hold
  const Vec<S> last_row, last_column, row_length;

 private:
  const bool exact_;  // S holds every cell's number
  const Buffer<S> y_, x_;
};

// What is known of the points of a tile.
template <class S>
struct Tile {
  using Int = typename IntOf<S>::type;
  alignas(64) S bottom[kTilePoints], right[kTilePoints];         // fractions of the point in its cell, or NaN
  alignas(64) Int free_y[kTilePoints], free_x[kTilePoints];      // all bits set where the coordinate has a derivative
  alignas(64) int32_t cell[kTilePoints];                         // index of the upper left corner among the staged
  alignas(64) S upper[2 * kTilePoints], lower[2 * kTilePoints];  // pairs of corners
};

template <class Int, class V>
CELLOPS_INLINE void store_int(Int* to, V value) {
  static_assert(sizeof(V) == kVectorBytes);
  __builtin_memcpy(to, &value, sizeof(V));
}

// Fills a vector of the tile's points. `shift` is added to their cells.
template <bool Backward, class S>
CELLOPS_INLINE void locate(const Grid<S>& grid, Vec<S> y, Vec<S> x, VecInt<S> shift, int at, Tile<S>* tile) {
  using Index = typename VectorOf<int32_t, 4 * kLanes<S>>::type;
  const Vec<S> zero = {};
  if constexpr (Backward) {
    const auto known = (y == y) & (x == x);
    store_int(tile->free_y + at, (y > zero) & (y < grid.last_row) & known);
    store_int(tile->free_x + at, (x > zero) & (x < grid.last_column) & known);
  }
  y = zero > y ? zero : y, x = zero > x ? zero : x;  // these keep NaN
  y = grid.last_row < y ? grid.last_row : y, x = grid.last_column < x ? grid.last_column : x;
  const Vec<S> top = floor_of<S>(y), left = floor_of<S>(x);
  store(tile->bottom + at, y - top);
  store(tile->right + at, x - left);
  const Index cell = __builtin_convertvector(grid.cell(top, left) + shift, Index);
  __builtin_memcpy(tile->cell + at, &cell, sizeof(cell));
}

// The corners of the tile's points; count is even.
template <class S>
CELLOPS_INLINE void fetch(const Grid<S>& grid, const S* staged, int count, Tile<S>* tile) {
  const S* below = staged + grid.row;
  for (int i = 0; i < count; i += 2) {
    uint64_t cells;
    __builtin_memcpy(&cells, tile->cell + i, 8);
    const uint32_t first = uint32_t(cells), second = uint32_t(cells >> 32);
    copy_pairs(staged + first, staged + second, tile->upper + 2 * i);
    copy_pairs(below + first, below + second, tile->lower + 2 * i);
  }
}

// Staging --------------------------------------------------------------------------------------------------------

// A plane [H][W] that lies in memory before `end`, up to which may be read.
template <class S, class T>
inline void stage_plane(const Grid<S>& grid, const T* from, const T* end, S* to) {
  constexpr int lanes = kLanes<S>;
  for (int64_t y = 0; y < grid.height; ++y, from += grid.width, to += grid.row) {
    if (from + round_up(grid.width, lanes) <= end) {  // reads on into the next row, writes where it will lie
      for (int64_t x = 0; x < grid.width; x += lanes) store(to + x, load(from + x));
    } else {
      for (int64_t x = 0; x < grid.width; x += lanes) store(to + x, load_some(from + x, grid.width - x));
    }
    to[grid.width] = 0;
  }
  for (int64_t x = 0; x < grid.row; ++x) to[x] = 0;
}

// `channels` planes from rows of channels [H * W][stride]. `line` is scratch of W * kBlockPlanes.
template <class S, class T>
inline void stage_rows(const Grid<S>& grid, int64_t channels, const T* from, int64_t stride, S* line, S* to) {
  for (int64_t y = 0; y < grid.height; ++y, from += grid.width * stride) {
    S* row = to + y * grid.row;
    if constexpr (sizeof(T) == 2) {
      for (int64_t x = 0; x < grid.width; ++x) convert_row(channels, from + x * stride, line + x * kBlockPlanes);
      transpose(grid.width, channels, line, kBlockPlanes, row, grid.plane);
    } else {
      transpose(grid.width, channels, from, stride, row, grid.plane);
    }
    for (int64_t c = 0; c < channels; ++c) row[c * grid.plane + grid.width] = 0;
  }
  for (int64_t c = 0; c < channels; ++c) {
    S* last = to + c * grid.plane + grid.height * grid.row;
    for (int64_t x = 0; x < grid.row; ++x) last[x] = 0;
  }
}

}  // namespace cellops::CELLOPS_ISA
