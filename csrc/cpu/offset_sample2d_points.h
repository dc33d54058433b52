// Bilinear samples of planes at points that are clamped to the image, a tile of points at a time.
//
// A plane is staged in scratch in the type of the sums, each pixel beside the one below it, with zeros behind the last
// column and below the last row: the four corners of a point are four neighbouring numbers, and a corner outside the
// image is an exact zero. For 16 points, loading and blending four neighbours takes 5 ns, hardware gathers of two pairs
// 13 ns (AMD EPYC with AVX-512).
#pragma once
#include "../cellops.h"
#include "../common/layout.h"
#include "../common/pairs.h"
#include "../common/parallel.h"
#include "../common/simd.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int kBlockPlanes = 16;  // planes that are staged together where memory holds their channels together

template <class S>
inline constexpr int64_t kLineCells = 32 / sizeof(S);  // staged cells of a cache line

// The staged planes' sizes, and the coordinates of the points before they are shifted. A cell is a pixel with its right
// and lower neighbours.
template <class S>
struct Grid {
  using Int = typename IntOf<S>::type;

  Grid(int64_t height, int64_t width)
      : height(height),
        width(width),
        row(round_up(width + 1, kLineCells<S>)),
        plane(((height + 1) * (row / kLineCells<S>) | 1) * kLineCells<S>),
        rows(min_of(height, max_of(1, 1024 / width))),
        exact(sizeof(S) == 8 || plane < 1 << 24),
        last_row(broadcast(S(height - 1))),
        last_column(broadcast(S(width - 1))),
        row_real(broadcast(S(row))),
        row_int(VecInt<S>{} + Int(row)),
        planes{},
        y(rows * width + kLanes<S>),
        x(rows * width + kLanes<S>) {
    for (int i = 0; i < kLanes<S>; ++i) planes[i] = Int(i * plane);
    if (failed()) return;
    for (int64_t i = 0; i < y.count(); ++i) y.get()[i] = S(i / width), x.get()[i] = S(i % width);
  }
  bool failed() const { return y.failed() || x.failed(); }

  const int64_t height, width;
  // Cells of a staged row, in whole cache lines, and of a plane, in an odd number of them: with a power of two, the
  // same place of all planes would share a few lines of the first-level cache.
  const int64_t row, plane;
  const int64_t rows;  // that y and x hold, from the first on
  const bool exact;    // S holds the number of every cell of a plane
  const Vec<S> last_row, last_column, row_real;
  const VecInt<S> row_int;
  VecInt<S> planes;  // where the planes of a vector's lanes begin, if each has its own
  const Buffer<S> y, x;
};

// Points that are worked on in one go: runs of `length`, pixels of a plane or channels of a pixel. The next run begins
// `step` points behind in a tile, a whole number of vectors; `stride` numbers behind in data, `shift_stride` in an
// offset. There a run's dx lie `other` behind its dy; in pairs with them where `other` is 0.
struct Runs {
  int64_t count, length, step, stride, shift_stride, other;
};

template <class S, class O>
CELLOPS_INLINE void load_shifts(const O* from, int64_t i, int64_t count, int64_t other, Vec<S>& dy, Vec<S>& dx) {
  if (other == 0) {
    const O* pairs = from + 2 * i;
    unzip(load_some(pairs, 2 * count), load_some(pairs + kLanes<S>, 2 * count - kLanes<S>), dy, dx);
  } else {
    dy = load_some(from + i, count), dx = load_some(from + other + i, count);
  }
}
template <class S, class O>
CELLOPS_INLINE void store_shifts(O* to, int64_t i, int64_t count, int64_t other, Vec<S> dy, Vec<S> dx) {
  if (other == 0) {
    Vec<S> a, b;
    zip(dy, dx, a, b);
    store_some(to + 2 * i, a, 2 * count);
    store_some(to + 2 * i + kLanes<S>, b, 2 * count - kLanes<S>);
  } else {
    store_some(to + i, dy, count), store_some(to + other + i, dx, count);
  }
}

inline constexpr int kTilePoints = 256;

// What is known of the points of a tile.
template <class S>
struct Tile {
  alignas(64) S y[kTilePoints], x[kTilePoints];  // clamped coordinates, or NaN
  alignas(64) int32_t cell[kTilePoints];         // of the staged planes, in quad order
  alignas(64) S received[4 * kTilePoints];       // what each corner receives of grad_output, in quad order
};

// The points of some runs without their shifts: (first_row + y, x), one for each point of a run of pixels, one for each
// run of channels, which lie in planes of their own.
template <class S>
struct Origin {
  S first_row;
  const S *y, *x;
};

// The phases of a tile are loops of their own: in one loop, the cells would be read back as soon as they are written,
// which costs half as much time again. `noipa`, not `noinline`: GCC 12.2 takes a scattering loop that it cannot inline
// for one without effect and drops the call.
#if defined(__clang__)
#define CELLOPS_PHASE inline __attribute__((noinline))
#else
#define CELLOPS_PHASE inline __attribute__((noipa))
#endif

template <bool Channels, class S, class O>
CELLOPS_PHASE void locate(const Grid<S>& grid, const Runs& given, const Origin<S>& origin, const O* offset,
                          Tile<S>* tile) {
  const Runs runs = given;
  const S *from_y = origin.y, *from_x = origin.x;
  using I = VecInt<S>;
  using Int = typename IntOf<S>::type;
  using Index = typename VectorOf<int32_t, 4 * kLanes<S>>::type;
  constexpr int lanes = kLanes<S>;
  const Vec<S> zero = {}, last_row = grid.last_row, last_column = grid.last_column, row = grid.row_real,
               first_row = broadcast(origin.first_row);
  const I row_int = grid.row_int;
  const bool exact = grid.exact;
  const Int more_planes = Int((Channels ? lanes : 1) * grid.plane);
  I plane = Channels ? grid.planes : I{};
  S *to_y = tile->y, *to_x = tile->x;
  int32_t* to_cell = tile->cell;
  for (int64_t run = 0; run < runs.count; ++run) {
    for (int64_t i = 0; i < runs.length; i += lanes) {
      Vec<S> dy, dx;
      load_shifts<S>(offset, i, runs.length - i, runs.other, dy, dx);
      Vec<S> y = (Channels ? broadcast(from_y[run]) : load(from_y + i)) + first_row + dy;
      Vec<S> x = (Channels ? broadcast(from_x[run]) : load(from_x + i)) + dx;
      y = smaller_of<S>(last_row, larger_of<S>(zero, y));  // these keep NaN
      x = smaller_of<S>(last_column, larger_of<S>(zero, x));
      store(to_y + i, y), store(to_x + i, x);
      const Vec<S> top = floor_of<S>(y), left = floor_of<S>(x);
      I cell;
      if (exact) {
        cell = __builtin_convertvector(larger_of<S>(top * row + left, zero), I);  // 0 for NaN
      } else {
        cell = __builtin_convertvector(larger_of<S>(top, zero), I) * row_int +
               __builtin_convertvector(larger_of<S>(left, zero), I);
      }
      const Index placed = __builtin_convertvector(in_quad_order(cell + plane), Index);
      __builtin_memcpy(to_cell + i, &placed, sizeof(placed));
      if constexpr (Channels) plane += more_planes;
    }
    plane = Channels ? grid.planes : plane + more_planes;
    offset += runs.shift_stride, to_y += runs.step, to_x += runs.step, to_cell += runs.step;
  }
}

// Fetching -------------------------------------------------------------------------------------------------------

inline constexpr int64_t kAhead = 32;                      // pixels
inline constexpr int64_t kFetchedFrom = int64_t(1) << 20;  // bytes of an offset: less is in the cache

// Asks for `bytes` of each of some pixels that lie `stride` bytes apart. Rows of many channels, each in a page of its
// own, are not foreseen by the hardware. Inlined always: GCC drops calls of a function that does nothing else.
template <bool Write>
CELLOPS_INLINE void fetch_pixels(const void* from, int64_t stride, int64_t bytes, int64_t first, int64_t last) {
  const char* at = static_cast<const char*>(from) + first * stride;
  for (int64_t pixel = first; pixel < last; ++pixel, at += stride) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, Write);
  }
}

// Staging --------------------------------------------------------------------------------------------------------

// One row of cells from a row of numbers and the one below it, or null.
template <class S, class T>
CELLOPS_INLINE void stage_row(const T* from, const T* below, int64_t width, int64_t row, S* to) {
  constexpr int lanes = kLanes<S>;
  for (int64_t x = 0; x < row; x += lanes) {
    Vec<S> a, b;
    zip(load_some(from + x, width - x), below ? load_some(below + x, width - x) : Vec<S>{}, a, b);
    store(to + 2 * x, a);
    if (x + lanes / 2 < row) store(to + 2 * x + lanes, b);
  }
}

// A plane [H][W].
template <class S, class T>
inline void stage_plane(const Grid<S>& grid, const T* from, S* to) {
  constexpr int lanes = kLanes<S>;
  const int64_t height = grid.height, width = grid.width, row = grid.row;
  if (row > lanes) {
    for (int64_t y = 0; y < height; ++y, from += width, to += 2 * row) {
      stage_row(from, y + 1 < height ? from + width : nullptr, width, row, to);
    }
    return;
  }
  Vec<S> here = load_some(from, width);
  for (int64_t y = 1; y <= height; ++y, to += 2 * row) {
    const Vec<S> below = y < height ? load_some(from + y * width, width) : Vec<S>{};
    Vec<S> a, b;
    zip(here, below, a, b);
    store(to, a);
    if (lanes / 2 < row) store(to + lanes, b);
    here = below;
  }
}

// `channels` planes from rows of channels [H * W][stride]. `lines` is scratch for three rows, each [kBlockPlanes][W].
template <class S, class T>
inline void stage_rows(const Grid<S>& grid, int64_t channels, const T* from, int64_t stride, S* lines, S* to) {
  const int64_t height = grid.height, width = grid.width, row = grid.row, line = kBlockPlanes * width;
  const int64_t size = sizeof(T), ahead = div_up(kAhead, width);
  for (int64_t y = 0; y < height; ++y, from += width * stride) {
    if (y + ahead < height) {
      fetch_pixels<false>(from, stride * size, channels * size, ahead * width, (ahead + 1) * width);
    }
    S *here = lines + y % 2 * line, *above = lines + (y + 1) % 2 * line;
    if constexpr (sizeof(T) == 2) {
      S* wide = lines + 2 * line;
      for (int64_t x = 0; x < width; ++x) convert_row(channels, from + x * stride, wide + x * kBlockPlanes);
      transpose(width, channels, wide, kBlockPlanes, here, width);
    } else {
      transpose(width, channels, from, stride, here, width);
    }
    for (int64_t c = 0; c < channels; ++c) {
      S* plane = to + 2 * c * grid.plane;
      if (y > 0) stage_row(above + c * width, here + c * width, width, row, plane + 2 * (y - 1) * row);
      if (y + 1 == height) {
        stage_row(here + c * width, static_cast<const S*>(nullptr), width, row, plane + 2 * y * row);
      }
    }
  }
}

}  // namespace cellops::CELLOPS_ISA
