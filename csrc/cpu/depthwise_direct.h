// 3x3 windows in channels_last, read where the image lies. A neighbour is a whole pixel away, so that nothing has to be
// moved for it: a block would cost a writing and a reading of every value, and keep loading and computing apart. In
// float32 only: a half type, widened once for a block, would be widened for every tap here, and gains nothing.
//
// What a window misses beside the first and the last column are taps that are left out; above and below the image it
// reads zeros.
#pragma once
#include "depthwise.h"

namespace cellops::CELLOPS_ISA {

// How many rows of windows are worked on at once: what they load is shared, and their sums and the values in the
// middle, with a value and three taps, fit in 16 registers.
inline constexpr int kDirectRows = 4;

template <class Params>
bool reads_directly(const Params& p) {
  return p.dtype == Dtype::float32 && p.kernel == 3 && p.channels_last && p.channels >= kLanes<float>;
}

// The first channel of a unit. The last one's overlap with those before it where it would not be whole.
CELLOPS_INLINE int64_t direct_channel(const DepthwiseWalk<float>& w, int64_t unit) {
  return min_of(unit * w.lanes, w.channels - w.lanes);
}

// How many of a unit's channels are those of the one before.
CELLOPS_INLINE int64_t direct_overlap(const DepthwiseWalk<float>& w, int64_t unit) {
  return unit * w.lanes - direct_channel(w, unit);
}

// Rows of pixels and the units of an item in them: of an image, or of a ring, in which a row takes the
// place of the one `ring` before it.
template <class T>
struct PixelRows {
  T* first;                  // of row 0, pixel 0 and the item's first unit
  int64_t row, pixel, unit;  // elements from one to the next
  int64_t last;              // of the last unit, at most: in an image its channels overlap
  int64_t ring = INT64_MAX;

  static PixelRows of_image(const DepthwiseWalk<float>& w, const DepthwiseItem& item, T* images) {
    const int64_t channel = direct_channel(w, item.unit);
    return {images + item.image * w.height * w.width * w.channels + channel, w.width * w.channels, w.channels, w.lanes,
            w.channels - w.lanes - channel};
  }
  CELLOPS_INLINE T* at(int64_t index) const { return first + index % ring * row; }
  CELLOPS_INLINE int64_t at_unit(int64_t index) const { return min_of(index * unit, last); }
};

// Where the rows that `Count` rows of windows see begin, and how far apart their pixels are.
template <int Count>
struct DirectRows {
  static constexpr int count = Count + 2;

  // zeros: three pixels.
  template <class T>
  CELLOPS_INLINE DirectRows(const PixelRows<T>& rows, int64_t height, int64_t first, const float* zeros)
      : pixel(rows.pixel) {
    for (int i = 0; i < count; ++i) {
      const int64_t row = first + i - 1;
      const bool inside = row >= 0 && row < height;
      at[i] = inside ? rows.at(row) : zeros + pixel;
      step[i] = inside ? pixel : 0;
    }
  }
  CELLOPS_INLINE void go_on(int64_t pixels) {
    for (int i = 0; i < count; ++i) at[i] += pixels * step[i];
  }
  const float* at[count];
  int64_t step[count];
  int64_t pixel;
};

// The convolution around a pixel of `Count` rows at `element` of them, and the elements themselves, by columns
// [begin, end) of the window.
template <int Count>
CELLOPS_INLINE void convolve_columns(const DirectRows<Count>& rows, const DepthwiseWalk<float>& w, int64_t element,
                                     const float* weights, int64_t channel, int begin, int end, Vec<float>* sums,
                                     Vec<float>* centres) {
#pragma GCC unroll 4
  for (int r = 0; r < Count; ++r) sums[r] = centres[r] = Vec<float>{};
#pragma GCC unroll 3
  for (int j = begin; j < end; ++j) {
    const float* tap = weights + j * w.padded + channel;
    const int64_t column = element + (j - 1) * rows.pixel;
    const Vec<float> above = load(tap), beside = load(tap + 3 * w.padded), below = load(tap + 6 * w.padded);
#pragma GCC unroll 6
    for (int i = 0; i < Count + 2; ++i) {
      Vec<float> value = load(rows.at[i] + column);
      keep_in_register<float>(value);
      if (i < Count) sums[i] += value * above;
      if (i >= 1 && i <= Count) {
        sums[i - 1] += value * beside;
        if (j == 1) centres[i - 1] = value;
      }
      if (i >= 2) sums[i - 2] += value * below;
    }
  }
}

// The same by all columns that there are around the pixels at `x`.
template <int Count>
CELLOPS_INLINE void convolve_at(const DirectRows<Count>& rows, const DepthwiseWalk<float>& w, int64_t x,
                                int64_t element, const float* weights, int64_t channel, Vec<float>* sums,
                                Vec<float>* centres) {
  if (x > 0 && x + 1 < w.width) {
    convolve_columns(rows, w, element, weights, channel, 0, 3, sums, centres);
  } else {
    convolve_columns(rows, w, element, weights, channel, x == 0 ? 1 : 0, x + 1 == w.width ? 2 : 3, sums, centres);
  }
}

// `Count` pixels, one below the other, and some channels of them.
template <int Count>
struct DirectPlace {
  static constexpr int count = Count;
  int64_t unit, channel;  // the unit, counted from the item's first, and its first channel
  int64_t element;        // that channel of the upper pixel, in the image
};

template <int Count, class Body>
CELLOPS_INLINE void for_direct_rows(const DepthwiseWalk<float>& w, const DepthwiseItem& item,
                                    const PixelRows<const float>& image, const float* zeros, const float* weights,
                                    int64_t row, const Body& body) {
  for (; row + Count <= item.end; row += Count) {
    DirectRows<Count> rows(image, w.height, row, zeros);
    int64_t pixel = row * w.width * w.channels;
    for (int64_t x = 0; x < w.width; ++x, pixel += w.channels, rows.go_on(1)) {
      for (int64_t u = 0; u < item.units; ++u) {
        const int64_t c = direct_channel(w, item.unit + u);
        Vec<float> sums[Count], centres[Count];
        convolve_at(rows, w, x, image.at_unit(u), weights, c, sums, centres);
        body(DirectPlace<Count>{u, c, pixel + c}, sums, centres);
      }
    }
  }
  if constexpr (Count > 1) for_direct_rows<Count / 2>(w, item, image, zeros, weights, row, body);
}

// What lies above and below an image: three pixels of zeros are enough.
class DirectBorder {
 public:
  explicit DirectBorder(int64_t channels) : zeros_(3 * channels) {
    if (!failed()) zeros_.zero();
  }
  bool failed() const { return zeros_.failed(); }
  const float* get() const { return zeros_.get(); }

 private:
  const Buffer<float> zeros_;
};

// Calls body(place, convolved, values) for all rows and units of an item. weights: [9][padded].
template <class Body>
CELLOPS_INLINE void for_direct_windows(const DepthwiseWalk<float>& w, const DepthwiseItem& item, const float* images,
                                       const DirectBorder& border, const float* weights, const Body& body) {
  for_direct_rows<kDirectRows>(w, item, PixelRows<const float>::of_image(w, item, images), border.get(), weights,
                               item.begin, body);
}

// The convolution at one pixel, of an item's unit.
inline Vec<float> convolve_pixel(const DepthwiseWalk<float>& w, const DepthwiseItem& item, const float* images,
                                 int64_t row, int64_t x, const DirectBorder& border, const float* weights,
                                 int64_t unit) {
  const auto image = PixelRows<const float>::of_image(w, item, images);
  DirectRows<1> rows(image, w.height, row, border.get());
  rows.go_on(x);
  Vec<float> sum, centre;
  convolve_at(rows, w, x, image.at_unit(unit), weights, direct_channel(w, item.unit + unit), &sum, &centre);
  return sum;
}

}  // namespace cellops::CELLOPS_ISA
