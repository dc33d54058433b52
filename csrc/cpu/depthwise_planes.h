// 3x3 windows in NCHW, read where the plane lies. What a window misses beside the first and the last column are lanes
// that a load leaves zero: no block with zeros between its rows has to be written and read for them. In float32, and
// where loads can leave lanes out.
#pragma once
#include "depthwise.h"

namespace cellops::CELLOPS_ISA {

template <class Params>
bool reads_planes(const Params& p) {
#if defined(__AVX2__)
  return p.dtype == Dtype::float32 && p.kernel == 3 && !p.channels_last && !turns_planes<float>(p);
#else
  return (void)p, false;
#endif
}

// Where an item's plane begins in its images; in NCHW an item has one unit, a channel.
CELLOPS_INLINE int64_t plane_of(const DepthwiseWalk<float>& w, const DepthwiseItem& item) {
  return (item.image * w.channels + item.unit) * w.height * w.width;
}

// A row of zeros, for the rows above and below a plane.
class PlaneBorder {
 public:
  explicit PlaneBorder(int64_t width) : zeros_(width) {
    if (!failed()) zeros_.zero();
  }
  bool failed() const { return zeros_.failed(); }
  const float* get() const { return zeros_.get(); }

 private:
  const Buffer<float> zeros_;
};

// Which lanes of a vector at a column see a pixel on their left, are one, and see one on their right.
struct PlaneEdges {
  static PlaneEdges at(int64_t column, int64_t width) {
    return {{column == 0, width - column}, {0, width - column}, {0, width - column - 1}};
  }
  SomeLanes left, middle, right;
};

// The convolution at a column of `Count` rows, and the elements themselves. at: where the Count + 2 rows begin that the
// windows see. Middle: no lane is without a pixel. Whole: each has one on either side too.
template <int Count, bool Middle, bool Whole>
CELLOPS_INLINE void convolve_plane(const float* const* at, int64_t column, const PlaneEdges& edges,
                                   const DepthwiseTaps<3, float>& taps, Vec<float>* sums, Vec<float>* centres) {
#pragma GCC unroll 4
  for (int r = 0; r < Count; ++r) sums[r] = Vec<float>{};
#pragma GCC unroll 6
  for (int i = 0; i < Count + 2; ++i) {
    const float* from = at[i] + column;
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      Vec<float> seen = Whole || (Middle && j == 1) ? load(from + j - 1)
                        : j == 0                    ? edges.left.of(from - 1)
                        : j == 1                    ? edges.middle.of(from)
                                                    : edges.right.of(from + 1);
      keep_in_register<float>(seen);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        if (i >= r && i - r < 3) sums[r] += seen * taps.at((i - r) * 3 + j);
        if (i - r == 1 && j == 1) centres[r] = seen;
      }
    }
  }
}

template <int Count, class Body>
CELLOPS_INLINE void for_plane_rows(const DepthwiseTaps<3, float>& taps, const float* plane, int64_t height,
                                   int64_t width, const float* zeros, int64_t row, int64_t end, const Body& body) {
  constexpr int lanes = kLanes<float>;
  const int64_t whole = width / lanes * lanes;
  const PlaneEdges first = PlaneEdges::at(0, width), none = PlaneEdges::at(1, width + 2 * lanes),
                   last = PlaneEdges::at(whole, width), right = PlaneEdges::at(whole - lanes, width);
  for (; row + Count <= end; row += Count) {
    const float* at[Count + 2];
    for (int i = 0; i < Count + 2; ++i) {
      const int64_t seen = row + i - 1;
      at[i] = seen >= 0 && seen < height ? plane + seen * width : zeros;
    }
    Vec<float> sums[Count], centres[Count];
    const auto end_column = [&](int64_t column, const auto& only) CELLOPS_INLINE_LAMBDA {
      int64_t element = row * width + column;
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r, element += width) body(element, only, sums[r], centres[r]);
    };
    for (int64_t column = 0; column < whole; column += lanes) {
      if (!kLeavesLanesOutForFree && column > 0 && column + lanes < width) {
        convolve_plane<Count, true, true>(at, column, none, taps, sums, centres);
      } else {
        const PlaneEdges edges{column == 0 ? first.left : none.left, none.middle,
                               column + lanes == width ? right.right : none.right};
        convolve_plane<Count, true, false>(at, column, edges, taps, sums, centres);
      }
      end_column(column, EveryLane{});
    }
    if (whole < width) {
      convolve_plane<Count, false, false>(at, whole, last, taps, sums, centres);
      end_column(whole, FirstLanes<float>(width - whole));
    }
  }
  if constexpr (Count > 1) for_plane_rows<Count / 2>(taps, plane, height, width, zeros, row, end, body);
}

// Calls body(element, only, convolved, value) for the vectors that cover rows [begin, end) of a plane: `element` is the
// first lane's in the plane, `only` as for for_rows.
template <class Body>
CELLOPS_INLINE void for_plane_windows(const DepthwiseWalk<float>& w, const DepthwiseTaps<3, float>& given_taps,
                                      const float* plane, const PlaneBorder& border, int64_t begin, int64_t end,
                                      const Body& body) {
  const DepthwiseTaps<3, float> taps = given_taps;
  for_plane_rows<kRowsAtOnce>(taps, plane, w.height, w.width, border.get(), begin, end, body);
}

// The convolution at one element of a plane.
inline float convolve_element(const DepthwiseWalk<float>& w, const DepthwiseTaps<3, float>& taps, const float* plane,
                              int64_t row, int64_t column) {
  float sum = 0;
  for (int64_t y = max_of(row - 1, 0); y < min_of(row + 2, w.height); ++y) {
    for (int64_t x = max_of(column - 1, 0); x < min_of(column + 2, w.width); ++x) {
      sum += plane[y * w.width + x] * taps.at((y - row + 1) * 3 + x - column + 1)[0];
    }
  }
  return sum;
}

// Fetches what is read after some rows of a plane, as many bytes for each vector: the item's next rows, or the next
// item's.
class PlaneAhead {
 public:
  PlaneAhead(const DepthwiseWalk<float>& w, const DepthwiseItem& item, int64_t row, int64_t next, const float* images) {
    const bool goes_on = row + w.rows < item.end;
    const DepthwiseItem then = goes_on ? item : w.item(max_of(0, min_of(next, w.items - 1)));
    const int64_t first = goes_on ? row + w.rows + 1 : then.begin;
    at_ = images + plane_of(w, then) + first * w.width;
  }
  CELLOPS_INLINE void fetch() {
    __builtin_prefetch(at_, 0, 2);
    at_ += kLanes<float>;
  }

 private:
  const float* at_;
};

}  // namespace cellops::CELLOPS_ISA
