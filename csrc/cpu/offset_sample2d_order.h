// Two orders in which the points of a block of planes fill the lanes of vectors: that in which the offset lies in memory.
#pragma once
#include "offset_sample2d_points.h"

namespace cellops::CELLOPS_ISA {

// Pixels of one plane. The offset is two planes, dy and dx, or pairs of them; data is a plane.
template <class S>
class PixelOrder {
 public:
  PixelOrder(const Grid<S>& grid, bool pairs) : grid_(grid), pixels_(grid.height * grid.width), pairs_(pairs) {}

  // Calls body(points) for one tile after the other.
  template <class Body>
  void for_tiles(const Body& body) {
    for (row_ = 0; row_ < grid_.height; row_ += grid_.rows) {
      const int64_t points = min_of(grid_.rows, grid_.height - row_) * grid_.width;
      for (first_ = 0; first_ < points; first_ += kTilePoints) {
        count_ = int(min_of(kTilePoints, points - first_));
        body(count_);
      }
    }
  }

  // The vector of points i, i + 1, ... of the tile: where its data lies, and how many of its lanes have any.
  int64_t at(int i) const { return row_ * grid_.width + first_ + i; }
  int64_t lanes(int i) const { return count_ - i; }

  template <bool Backward, class O>
  CELLOPS_INLINE void locate_vector(const O* offset, int i, Tile<S>* tile) const {
    Vec<S> dy, dx;
    if (pairs_) {
      unzip(load_some(offset + 2 * at(i), 2 * lanes(i)),
            load_some(offset + 2 * at(i) + kLanes<S>, 2 * lanes(i) - kLanes<S>), dy, dx);
    } else {
      dy = load_some(offset + at(i), lanes(i));
      dx = load_some(offset + pixels_ + at(i), lanes(i));
    }
    const Vec<S> y = load(grid_.y() + first_ + i) + S(row_), x = load(grid_.x() + first_ + i);
    locate<Backward>(grid_, y + dy, x + dx, VecInt<S>{}, i, tile);
  }

  template <class O>
  CELLOPS_INLINE void store_shift(O* offset, int i, Vec<S> dy, Vec<S> dx) const {
    if (pairs_) {
      Vec<S> a, b;
      zip(dy, dx, a, b);
      store_some(offset + 2 * at(i), a, 2 * lanes(i));
      store_some(offset + 2 * at(i) + kLanes<S>, b, 2 * lanes(i) - kLanes<S>);
    } else {
      store_some(offset + at(i), dy, lanes(i));
      store_some(offset + pixels_ + at(i), dx, lanes(i));
    }
  }

 private:
  const Grid<S>& grid_;
  const int64_t pixels_;
  const bool pairs_;
  int64_t row_ = 0, first_ = 0;
  int count_ = 0;
};

// Channels of one pixel, kBlockPlanes of them or, in the last block, fewer; then the next pixel. The offset is a pair for
// each channel; pixels lie `stride` channels apart, `data_stride` in data.
template <class S>
class ChannelOrder {
 public:
  ChannelOrder(const Grid<S>& grid, int64_t channels, int64_t stride, int64_t data_stride)
      : grid_(grid), channels_(channels), stride_(2 * stride), data_stride_(data_stride) {
    for (int64_t c = 0; c < kBlockPlanes; ++c) shift_[c] = Int(c * grid.plane);
  }

  template <class Body>
  void for_tiles(const Body& body) {
    constexpr int64_t step = kTilePoints / kBlockPlanes;
    const int64_t pixels = grid_.height * grid_.width;
    int64_t y = 0, x = 0;
    for (first_ = 0; first_ < pixels; first_ += step) {
      const int count = int(min_of(step, pixels - first_));
      for (int i = 0; i < count; ++i) {
        y_[i] = S(y), x_[i] = S(x);
        if (++x == grid_.width) x = 0, ++y;
      }
      body(count * kBlockPlanes);
    }
  }

  int64_t at(int i) const { return (first_ + i / kBlockPlanes) * data_stride_ + i % kBlockPlanes; }
  int64_t lanes(int i) const { return channels_ - i % kBlockPlanes; }

  template <bool Backward, class O>
  CELLOPS_INLINE void locate_vector(const O* offset, int i, Tile<S>* tile) const {
    const O* pairs = offset + shift_at(i);
    Vec<S> dy, dx;
    unzip(load_some(pairs, 2 * lanes(i)), load_some(pairs + kLanes<S>, 2 * lanes(i) - kLanes<S>), dy, dx);
    VecInt<S> shift;
    __builtin_memcpy(&shift, shift_ + i % kBlockPlanes, sizeof(shift));
    const int pixel = i / kBlockPlanes;
    locate<Backward>(grid_, broadcast(y_[pixel]) + dy, broadcast(x_[pixel]) + dx, shift, i, tile);
  }

  template <class O>
  CELLOPS_INLINE void store_shift(O* offset, int i, Vec<S> dy, Vec<S> dx) const {
    O* pairs = offset + shift_at(i);
    Vec<S> a, b;
    zip(dy, dx, a, b);
    store_some(pairs, a, 2 * lanes(i));
    store_some(pairs + kLanes<S>, b, 2 * lanes(i) - kLanes<S>);
  }

 private:
  using Int = typename IntOf<S>::type;
  int64_t shift_at(int i) const { return (first_ + i / kBlockPlanes) * stride_ + 2 * (i % kBlockPlanes); }

  const Grid<S>& grid_;
  const int64_t channels_, stride_, data_stride_;
  alignas(64) Int shift_[kBlockPlanes];
  S y_[kTilePoints / kBlockPlanes], x_[kTilePoints / kBlockPlanes];
  int64_t first_ = 0;
};

}  // namespace cellops::CELLOPS_ISA
