// The main backward pass of 3x3 windows whose lanes are channels, behind batch statistics: images are read and written
// where they lie, and only the gradient of the convolution and what passes it by are kept, a few rows of them.
//
// The weights' gradient is summed where the input's is: the convolution's gradient around a pixel, which the transposed
// convolution loads anyhow, times that pixel. Before it, each would have been loaded for its own.
#pragma once
#include "depthwise_direct.h"
#include "depthwise_gradients.h"

namespace cellops::CELLOPS_ISA {

// Fetches what the next `Count` rows of windows read first: a pixel of the input's rows, from the one below the first
// window's on, and of the gradient's, from the first window's own on. What is large comes from memory, and so many rows
// at a time are more than the hardware foresees.
template <int Count>
CELLOPS_INLINE void fetch_below(const float* input, const float* grad, int64_t row) {
#pragma GCC unroll 4
  for (int r = Count; r < 2 * Count; ++r) {
    __builtin_prefetch(input + r * row, 0, 2);
    __builtin_prefetch(grad + r * row, 0, 2);
  }
}

// As many rows of the convolution's gradient as are looked at at a time, and of what passes it by; those of a unit
// behind each other.
class DirectRing {
 public:
  template <class S>
  DirectRing(const DepthwiseWalk<S>& w, bool needed, bool has_direct)
      : unit_(kRows * w.width * w.lanes + 3 * w.lanes),
        convolved_(needed ? w.group * unit_ : 0),
        direct_(needed && has_direct ? w.group * unit_ : 0) {}
  bool failed() const { return convolved_.failed() || direct_.failed(); }
  PixelRows<float> convolved(const DepthwiseWalk<float>& w) const { return rows(w, convolved_); }
  PixelRows<float> direct(const DepthwiseWalk<float>& w) const { return rows(w, direct_); }

 private:
  static constexpr int64_t kRows = kDirectRows + 2;
  PixelRows<float> rows(const DepthwiseWalk<float>& w, const Buffer<float>& memory) const {
    return {memory.get(), w.width * w.lanes, w.lanes, unit_, INT64_MAX, kRows};
  }
  int64_t unit_;
  const Buffer<float> convolved_, direct_;
};

// What the rows of an item are read from and written to.
struct DirectImages {
  PixelRows<const float> input, grad;
  PixelRows<float> convolved, direct;  // the convolution's gradient, and what reaches the input past it
  PixelRows<float> result;             // the input's gradient, or null
  bool fetches;
};

// Rows [row, end) of the convolution's gradient.
template <int Count, class E>
void convolve_gradient(const E& ending, const DepthwiseWalk<float>& w, const DepthwiseItem& item,
                       const DirectImages& images, const DepthwiseBackwardConstants<float>& constants,
                       const float* zeros, int64_t row, int64_t end) {
  const PixelRows<const float>&input = images.input, &grad = images.grad;
  const PixelRows<float>&convolved = images.convolved, &direct = images.direct;
  for (; row + Count <= end; row += Count) {
    DirectRows<Count> rows(input, w.height, row, zeros);
    const float* given[Count];
    float *to[Count], *past[Count];
    for (int r = 0; r < Count; ++r) {
      given[r] = grad.at(row + r), to[r] = convolved.at(row + r), past[r] = E::kDirect ? direct.at(row + r) : nullptr;
    }
    for (int64_t x = 0; x < w.width; ++x, rows.go_on(1)) {
      for (int64_t u = 0; u < item.units; ++u) {
        const int64_t c = direct_channel(w, item.unit + u);
        const int64_t from = x * grad.pixel + grad.at_unit(u), at = x * convolved.pixel + convolved.at_unit(u);
        Vec<float> sums[Count], centres[Count];
        convolve_at(rows, w, x, input.at_unit(u), constants.weights.get(), c, sums, centres);
        if (images.fetches) fetch_below<Count>(rows.at[2] + input.at_unit(u), given[0] + from, input.row);
        const Vec<float> mean = load(constants.mean() + c), scale = load(constants.scale() + c),
                         shift = load(constants.shift() + c), by_value = load(constants.by_value() + c),
                         by_one = load(constants.by_one() + c);
#pragma GCC unroll 4
        for (int r = 0; r < Count; ++r) {
          const Vec<float> z = sums[r] - mean, g = load(given[r] + from), other = z * scale + shift;
          const Vec<float> through = ending.template through<float>(g, centres[r], other);
          if constexpr (E::kDirect) store(past[r] + at, ending.template through<float>(g, other, centres[r]));
          store(to[r] + at, through * scale + (z * by_value + by_one));
        }
      }
    }
  }
  if constexpr (Count > 1) convolve_gradient<Count / 2>(ending, w, item, images, constants, zeros, row, end);
}

// The input's gradient at a pixel of `Count` rows, by columns [begin, end) of the window, and what each of the window
// adds to the weights'.
template <int Count>
CELLOPS_INLINE void transpose_columns(const DirectRows<Count>& rows, const Vec<float>* taps, int begin, int end,
                                      const Vec<float>* values, Vec<float>* sums, Vec<float>* totals) {
#pragma GCC unroll 3
  for (int j = begin; j < end; ++j) {
#pragma GCC unroll 6
    for (int i = 0; i < Count + 2; ++i) {
      Vec<float> seen = load(rows.at[i] + (j - 1) * rows.pixel);
      keep_in_register<float>(seen);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        if (i < r || i - r > 2) continue;
        sums[r] += seen * taps[(i - r) * 3 + j];
        totals[(i - r) * 3 + j] += seen * values[r];
      }
    }
  }
}

// Rows [row, end) of a unit of the input's gradient. totals: of the window, 9.
template <int Count, bool Direct>
CELLOPS_INLINE void transpose_rows(const DepthwiseWalk<float>& w, const DirectImages& images, int64_t u,
                                   const Vec<float>* taps, const float* zeros, int64_t row, int64_t end, int64_t others,
                                   bool streamed, Vec<float>* totals) {
  PixelRows<float> convolved = images.convolved;
  convolved.first += convolved.at_unit(u);
  const int64_t own = images.input.at_unit(u), past = images.direct.at_unit(u), to = images.result.at_unit(u);
  for (; row + Count <= end; row += Count) {
    DirectRows<Count> rows(convolved, w.height, row, zeros);
    const float *inputs[Count], *direct[Count];
    float* results[Count];
    for (int r = 0; r < Count; ++r) {
      inputs[r] = images.input.at(row + r) + own;
      direct[r] = Direct ? images.direct.at(row + r) + past : nullptr;
      results[r] = images.result.first ? images.result.at(row + r) + to : nullptr;
    }
    for (int64_t x = 0; x < w.width; ++x, rows.go_on(1)) {
      Vec<float> values[Count], sums[Count];
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        values[r] = load(inputs[r] + x * images.input.pixel);
        sums[r] = Direct ? load(direct[r] + x * images.direct.pixel) : Vec<float>{};
      }
      // Columns that are no constants would take taps and totals out of their registers.
      const bool left = x > 0, right = x + 1 < w.width;
      if (left && right) {
        transpose_columns(rows, taps, 0, 3, values, sums, totals);
      } else if (right) {
        transpose_columns(rows, taps, 1, 3, values, sums, totals);
      } else if (left) {
        transpose_columns(rows, taps, 0, 2, values, sums, totals);
      } else {
        transpose_columns(rows, taps, 1, 2, values, sums, totals);
      }
      if (!images.result.first) continue;
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        float* at = results[r] + x * images.result.pixel;
        if (others == 0) {
          put(at, sums[r], streamed);
        } else {
          for (int64_t i = others; i < w.lanes; ++i) at[i] = sums[r][i];
        }
      }
    }
  }
  if constexpr (Count > 1) {
    transpose_rows<Count / 2, Direct>(w, images, u, taps, zeros, row, end, others, streamed, totals);
  }
}

// The same of all units of an item.
template <bool Direct>
void transpose_item(const DepthwiseWalk<float>& w, const DepthwiseItem& item, const DirectImages& images,
                    const DepthwiseBackwardConstants<float>& constants, const float* zeros, int64_t row, int64_t end,
                    bool streamed, const DepthwiseSums& sums) {
  constexpr int lanes = kLanes<float>;
  for (int64_t u = 0; u < item.units; ++u) {
    const int64_t c = direct_channel(w, item.unit + u), overlap = direct_overlap(w, item.unit + u);
    Vec<float> taps[9], totals[9] = {};
    for (int t = 0; t < 9; ++t) taps[t] = load(constants.weights.get() + (8 - t) * w.padded + c);
    // Channels that belong to another item, and so to another thread, are not written again.
    transpose_rows<kRowsAtOnce, Direct>(w, images, u, taps, zeros, row, end, u == 0 ? overlap : 0, streamed, totals);
    for (int t = 0; t < 9; ++t) {
      double* to = sums.weight(8 - t) + c;
      for (int64_t i = overlap; i < lanes; ++i) to[i] += double(totals[t][i]);
    }
  }
}

// A thread's items, of images in channels_last.
template <class E>
void differentiate_directly(const E& ending, const Team& team, const DepthwiseWalk<float>& w, const float* grad_output,
                            const float* input, float* grad_input, const DepthwiseBackwardConstants<float>& constants,
                            const DirectBorder& border, const DirectRing& ring, const DepthwiseSums& sums) {
  // A unit's pixels lie apart: only where each fills a line are they whole lines.
  const bool streamed = grad_input && kVectorBytes == kLine && w.streams(grad_input);
  const bool fetches = w.bytes(sizeof(float)) > kCacheBytes;
  int64_t begin, end;
  team.share(w.items, &begin, &end);
  for (int64_t i = end - 1; i >= begin; --i) {  // what the sums have read last may still be in a cache
    const DepthwiseItem item = w.item(i);
    DirectImages images{PixelRows<const float>::of_image(w, item, input),
                        PixelRows<const float>::of_image(w, item, grad_output),
                        ring.convolved(w),
                        ring.direct(w),
                        {},
                        fetches};
    if (grad_input) images.result = PixelRows<float>::of_image(w, item, grad_input);
    // The convolution's gradient is wanted a row beyond those of the input's.
    int64_t convolved = max_of(item.begin - 1, 0);
    for (int64_t row = item.begin; row < item.end;) {
      const int64_t last = min_of(row + kDirectRows + 1, min_of(item.end + 1, w.height));
      convolve_gradient<kDirectRows>(ending, w, item, images, constants, border.get(), convolved, last);
      convolved = last;
      const int64_t next = min_of(item.end, last == w.height ? last : last - 1);
      transpose_item<E::kDirect>(w, item, images, constants, border.get(), row, next, streamed, sums);
      row = next;
    }
  }
  if (streamed) end_streams();
}

}  // namespace cellops::CELLOPS_ISA
