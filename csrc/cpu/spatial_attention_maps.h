// The small part of spatial attention: maps of one number for each pixel, rows of which are kept in a window that moves
// down the image, and what lies between them: the convolution of the maps, its transpose, and the gradient of its taps.
#pragma once
#include "../common/activation.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "spatial_attention_passes.h"

namespace cellops::CELLOPS_ISA {

// Rows of several maps. Each has `half` zeros on its left and at least as many on its right, so that a tap that hangs
// over the border reads zeros, and whole vectors may be read.
template <class S>
class Window {
 public:
  Window(int64_t maps, int64_t rows, int64_t width, int64_t half)
      : maps_(maps), rows_(rows), half_(half), stride_(round_up(width, kLanes<S>) + 2 * half) {}
  bool allocate() {
    memory_.allocate(maps_ * rows_ * stride_);
    return !memory_.failed();
  }
  // Goes to the top of an image.
  void reset() {
    first_ = 0;
    memory_.zero();
  }
  // The first column, `half` elements before that of the image.
  S* padded(int64_t map, int64_t row) const { return memory_.get() + (map * rows_ + row - first_) * stride_; }
  int64_t map_step() const { return rows_ * stride_; }
  S* row(int64_t map, int64_t row) const { return padded(map, row) + half_; }
  // Lets go of the rows above `first`.
  void move(int64_t first) {
    if (first <= first_) return;
    const int64_t left = first_ + rows_ - first;
    for (int64_t map = 0; map < maps_ && left > 0; ++map) {
      __builtin_memmove(padded(map, first_), padded(map, first), left * stride_ * sizeof(S));
    }
    first_ = first;
  }

 private:
  const int64_t maps_, rows_, half_, stride_;
  int64_t first_ = 0;
  Buffer<S> memory_;
};

// The taps of one row of a kernel: tap j reads the row of a map that begins at from + j * step, and weighs
// weight[j * weight_step].
template <class S>
struct Taps {
  int64_t count;
  const S* from;
  int64_t step;
  const S* weight;
  int64_t weight_step;
};

// sums += the taps' rows, weighted; reads and writes whole vectors.
template <class S>
void add_taps(int64_t width, const Taps<S>& taps, S* sums) {
  constexpr int lanes = kLanes<S>;
  in_blocks<4>(div_up(width, lanes), [&](int64_t v, auto block) {
    constexpr int B = decltype(block)::value;
    Vec<S> sum[B];
    for (int b = 0; b < B; ++b) sum[b] = load(sums + (v + b) * lanes);
    for (int64_t j = 0; j < taps.count; ++j) {
      const S* row = taps.from + j * taps.step + v * lanes;
      for (int b = 0; b < B; ++b) sum[b] += load(row + b * lanes) * taps.weight[j * taps.weight_step];
    }
    for (int b = 0; b < B; ++b) store(sums + (v + b) * lanes, sum[b]);
  });
}

// products[j] += the sum of row * (the row of tap j); reads whole vectors.
template <class S>
void dot_taps(int64_t width, const Taps<S>& taps, const S* row, S* products) {
  in_blocks<4>(taps.count, [&](int64_t j, auto block) {
    Vec<S> sum[4] = {};
    for (int64_t x = 0; x < width; x += kLanes<S>) {
      const Vec<S> value = load(row + x);
      for (int b = 0; b < block.value; ++b) sum[b] += value * load(taps.from + (j + b) * taps.step + x);
    }
    S totals[4];
    sums_of(sum[0], sum[1], sum[2], sum[3], totals);
    for (int b = 0; b < block.value; ++b) products[j + b] += totals[b];
  });
}

// scale = sigmoid(logits + bias) and, in backward, grad_logits = dot * scale * (1 - scale), whose sum is returned.
// Whole vectors are read and written; the lanes past `count` do not enter the sum.
template <bool Backward, class S>
S gate_row(int64_t count, const S* logits, S bias, const S* dot, S* scale, S* grad_logits) {
  constexpr int lanes = kLanes<S>;
  S total = 0;
  for (int64_t x = 0; x < count; x += lanes) {
    const Vec<S> gate = sigmoid_of_lanes<S>(load(logits + x) + broadcast(bias));
    store(scale + x, gate);
    if constexpr (Backward) {
      const Vec<S> grad = load(dot + x) * gate * (1 - gate);
      store(grad_logits + x, grad);
      if (x + lanes <= count) {
        total += sum_of<S>(grad);
      } else {
        for (int64_t i = x; i < count; ++i) total += grad_logits[i];
      }
    }
  }
  return total;
}

}  // namespace cellops::CELLOPS_ISA
