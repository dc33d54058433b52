// What the backward passes of depthwise convolutions know of each channel, and what they sum up for it.
#pragma once
#include "depthwise.h"

namespace cellops::CELLOPS_ISA {

// Per channel [padded]: the centred convolution is z = conv - mean, and what follows sees z * scale + shift. The
// convolution's gradient is then scale * through + by_value * z + by_one, with `through` the gradient to what follows
// sees.
template <class S>
struct DepthwiseBackwardConstants {
  explicit DepthwiseBackwardConstants(const DepthwiseWalk<S>& w)
      : weights(w.kernel * w.kernel * w.padded), numbers(5 * w.padded), padded(w.padded) {
    if (!failed()) numbers.zero();
  }
  bool failed() const { return weights.failed() || numbers.failed(); }
  S* mean() const { return numbers.get(); }
  S* scale() const { return numbers.get() + padded; }
  S* shift() const { return numbers.get() + 2 * padded; }
  S* by_value() const { return numbers.get() + 3 * padded; }
  S* by_one() const { return numbers.get() + 4 * padded; }
  const Buffer<S> weights, numbers;
  int64_t padded;
};

// Sums per channel: of `through`, of through * z, and for each weight.
struct DepthwiseSums {
  DepthwiseSums(int64_t taps, int64_t padded) : padded(padded), memory((2 + taps) * padded) {
    if (!failed()) memory.zero();
  }
  bool failed() const { return memory.failed(); }
  double* through() const { return memory.get(); }
  double* products() const { return memory.get() + padded; }
  double* weight(int64_t tap) const { return memory.get() + (2 + tap) * padded; }
  void add(const DepthwiseSums& other) const {
    for (int64_t i = 0; i < memory.count(); ++i) memory.get()[i] += other.memory.get()[i];
  }
  void zero() const { memory.zero(); }
  int64_t padded;
  const Buffer<double> memory;
};

// The numbers of one unit.
template <int Kernel, class S>
struct DepthwiseUnit {
  DepthwiseUnit(const DepthwiseWalk<S>& w, const DepthwiseBackwardConstants<S>& constants, int64_t unit, S* scratch)
      : taps(w, constants.weights.get(), unit, false, scratch),
        mean(w.of(constants.mean(), unit)),
        scale(w.of(constants.scale(), unit)),
        shift(w.of(constants.shift(), unit)),
        by_value(w.of(constants.by_value(), unit)),
        by_one(w.of(constants.by_one(), unit)) {}
  const DepthwiseTaps<Kernel, S> taps;
  const Vec<S> mean, scale, shift, by_value, by_one;
};

}  // namespace cellops::CELLOPS_ISA
