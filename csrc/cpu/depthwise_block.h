// Blocks of rows of an image in the compute type: how they are filled, and emptied again.
#pragma once
#include "../common/layout.h"
#include "depthwise.h"

namespace cellops::CELLOPS_ISA {

// Rows of a group of units.
template <class S>
class DepthwiseBlock {
 public:
  DepthwiseBlock(const DepthwiseWalk<S>& walk, int64_t rows)
      : pitch_(walk.pitch),
        front_(round_up(walk.half * walk.step, walk.lanes)),
        // one vector more keeps the units from falling on the same cache sets
        stride_(round_up(front_ + rows * walk.pitch + walk.half * walk.step, walk.lanes) + 3 * walk.lanes),
        memory_(walk.group * stride_) {
    if (failed()) return;
    for (int64_t u = 0; u < walk.group; ++u) {  // the neighbours of the first and of the last row's ends
      __builtin_memset(at(u, 0) - front_, 0, size_t(front_) * sizeof(S));
      __builtin_memset(at(u, rows), 0, size_t(stride_ - front_ - rows * walk.pitch) * sizeof(S));
    }
  }
  bool failed() const { return memory_.failed(); }
  S* at(int64_t unit, int64_t row) const { return memory_.get() + unit * stride_ + front_ + row * pitch_; }
  int64_t stride() const { return stride_; }  // elements from a unit to the next

  // Moves `count` rows from `first` on to the front.
  void keep(int64_t units, int64_t first, int64_t count) const {
    for (int64_t u = 0; u < units; ++u) {
      __builtin_memmove(at(u, 0), at(u, first), size_t(count * pitch_) * sizeof(S));
    }
  }

 private:
  int64_t pitch_, front_, stride_;
  Buffer<S> memory_;
};

// The pixels of a unit's rows in a block, one after the other.
template <class S>
class DepthwisePixels {
 public:
  DepthwisePixels(const DepthwiseWalk<S>& w, S* rows, int64_t pixel)
      : at_(rows + pixel / w.width * w.pitch + pixel % w.width * w.lanes),
        left_(w.width - pixel % w.width),
        width_(w.width),
        gap_(w.half * w.lanes) {}
  CELLOPS_INLINE S* next() {
    S* at = at_;
    at_ += kLanes<S>;
    if (--left_ == 0) at_ += gap_, left_ = width_;
    return at;
  }

 private:
  S* at_;
  int64_t left_, width_, gap_;
};

template <bool Value>
struct Flag {
  constexpr operator bool() const { return Value; }
};

// Calls work(pixel, pixels, whole) for as many pixels at a time as a vector has lanes, of which the last may be some
// that were there before; `whole` says so to the compiler, and is false where there are fewer.
template <class Work>
CELLOPS_INLINE void for_squares(int64_t pixels, bool whole, const Work& work) {
  constexpr int64_t lanes = kLanes<float>;
  if (whole && pixels >= lanes) {
    for (int64_t p = 0; p < pixels; p += lanes) work(min_of(p, pixels - lanes), lanes, Flag<true>());
  } else {
    for (int64_t p = 0; p < pixels; p += lanes) work(p, min_of(lanes, pixels - p), Flag<false>());
  }
}

// Pixels of rows [first, last) of an item's planes, all of them inside, turned around into a block from its row `to`
// on.
template <class T>
inline void load_turned(const DepthwiseWalk<float>& w, const DepthwiseItem& item, const T* images, int64_t first,
                        int64_t last, const DepthwiseBlock<float>& block, int64_t to) {
  constexpr int lanes = kLanes<float>;
  const int64_t plane = w.height * w.width;
  for (int64_t u = 0; u < item.units; ++u) {
    const int64_t channel = (item.unit + u) * lanes, count = min_of(lanes, w.channels - channel);
    const T* from = images + (item.image * w.channels + channel) * plane + first * w.width;
    for_squares((last - first) * w.width, count == lanes,
                [&](int64_t pixel, int64_t pixels, auto whole) CELLOPS_INLINE_LAMBDA {
                  Vec<float> square[lanes];
#pragma GCC unroll 16
                  for (int c = 0; c < lanes; ++c) {
                    const T* at = from + c * plane + pixel;
                    square[c] = whole ? load(at) : c < count ? load_first<float>(at, pixels) : Vec<float>{};
                  }
                  turn(square);
                  DepthwisePixels<float> target(w, block.at(u, to), pixel);
#pragma GCC unroll 16
                  for (int i = 0; i < lanes; ++i) {
                    if (whole || i < pixels) store(target.next(), square[i]);
                  }
                });
  }
}

// Writes a block of results to rows [first, last) of an item's planes.
template <class T>
inline void store_turned(const DepthwiseWalk<float>& w, const DepthwiseItem& item, const DepthwiseBlock<float>& block,
                         int64_t first, int64_t last, T* images) {
  constexpr int lanes = kLanes<float>;
  const int64_t plane = w.height * w.width;
  for (int64_t u = 0; u < item.units; ++u) {
    const int64_t channel = (item.unit + u) * lanes, count = min_of(lanes, w.channels - channel);
    T* to = images + (item.image * w.channels + channel) * plane + first * w.width;
    for_squares((last - first) * w.width, count == lanes,
                [&](int64_t pixel, int64_t pixels, auto whole) CELLOPS_INLINE_LAMBDA {
                  Vec<float> square[lanes];
                  DepthwisePixels<float> source(w, block.at(u, 0), pixel);
#pragma GCC unroll 16
                  for (int i = 0; i < lanes; ++i) square[i] = whole || i < pixels ? load(source.next()) : Vec<float>{};
                  turn(square);
#pragma GCC unroll 16
                  for (int c = 0; c < lanes; ++c) {
                    T* at = to + c * plane + pixel;
                    if (whole) {
                      store(at, square[c]);
                    } else if (c < count) {
                      store_first(at, square[c], pixels);
                    }
                  }
                });
  }
}

// Reads rows [first, last) of an item's image into a block, from its row `to` on; rows outside the image are zero.
template <class T, class S>
inline void load_rows(const DepthwiseWalk<S>& w, const DepthwiseItem& item, const T* images, int64_t first,
                      int64_t last, const DepthwiseBlock<S>& block, int64_t to) {
  constexpr int lanes = kLanes<S>;
  const int64_t pixels = w.height * w.width, stride = block.stride();
  const T* image = images + item.image * w.channels * pixels;
  const FirstLanes<S> rest(w.width % lanes);
  const int64_t left = w.channels - item.unit * lanes, whole = min_of(item.units, left / lanes);
  if constexpr (sizeof(S) == sizeof(float)) {
    const int64_t top = max_of(first, 0), bottom = min_of(last, w.height);
    if (w.turned && top < bottom) load_turned(w, item, images, top, bottom, block, to + top - first);
  }
  for (int64_t r = first; r < last; ++r, ++to) {
    S* row = block.at(0, to);
    if (r < 0 || r >= w.height) {
      for (int64_t u = 0; u < item.units; ++u) __builtin_memset(row + u * stride, 0, size_t(w.pitch) * sizeof(S));
      continue;
    }
    if (!w.by_channel) {
      const T *from = image + item.unit * pixels + r * w.width, *end = image + (item.unit + 1) * pixels;
      int64_t x = 0;
      for (; x + lanes <= w.width; x += lanes) store(row + x, load(from + x));
      if (x < w.width) {
        store(row + x, from + x + lanes <= end ? rest(load(from + x)) : load_first<S>(from + x, w.width - x));
        x += lanes;
      }
      for (; x < w.pitch; ++x) row[x] = 0;
      continue;
    }
    const T* from = image + r * w.width * w.channels + item.unit * lanes;
    S* pixel = row;
    for (int64_t x = 0; w.channels_last && x < w.width; ++x, from += w.channels, pixel += lanes) {
      for (int64_t u = 0; u < whole; ++u) store(pixel + u * stride, load(from + u * lanes));
      if (whole < item.units) store(pixel + whole * stride, load_first<S>(from + whole * lanes, left % lanes));
    }
    for (int64_t u = 0; u < item.units; ++u) {
      __builtin_memset(row + w.width * lanes + u * stride, 0, size_t(w.half * lanes) * sizeof(S));
    }
  }
}

// Writes a block of results to rows [first, last) of an item's image.
template <class T, class S>
inline void store_rows(const DepthwiseWalk<S>& w, const DepthwiseItem& item, const DepthwiseBlock<S>& block,
                       int64_t first, int64_t last, T* images, bool streamed) {
  constexpr int lanes = kLanes<S>;
  const int64_t pixels = w.height * w.width, stride = block.stride();
  T* image = images + item.image * w.channels * pixels;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (w.turned) return store_turned(w, item, block, first, last, images);
  }
  if (!w.channels_last) {
    T* to = image + item.unit * pixels + first * w.width;
    if (!w.flat) {
      store_run((last - first) * w.width, block.at(0, 0), to, streamed);
    } else {
      for (int64_t r = 0; r < last - first; ++r) store_run(w.width, block.at(0, r), to + r * w.width, false);
    }
    return;
  }
  const int64_t left = w.channels - item.unit * lanes, whole = min_of(item.units, left / lanes);
  for (int64_t r = first; r < last; ++r) {
    const S* row = block.at(0, r - first);
    T* to = image + r * w.width * w.channels + item.unit * lanes;
    for (int64_t x = 0; x < w.width; ++x, to += w.channels, row += lanes) {
      for (int64_t u = 0; u < whole; ++u) put(to + u * lanes, load(row + u * stride), streamed);
      if (whole < item.units) store_first(to + whole * lanes, load(row + whole * stride), left % lanes);
    }
  }
}

// Rows [begin - border, begin + rows + border) of an item's image in a block; all but the first call keep what the one
// before has read of them.
template <class T, class S>
inline void load_window(const DepthwiseWalk<S>& w, const DepthwiseItem& item, const T* images, int64_t begin,
                        int64_t rows, int64_t border, const DepthwiseBlock<S>& block) {
  const int64_t kept = begin == item.begin ? 0 : 2 * border;
  if (kept) block.keep(item.units, w.rows, kept);
  load_rows(w, item, images, begin - border + kept, begin + rows + border, block, kept);
}

}  // namespace cellops::CELLOPS_ISA
