// Activations and gates with their derivatives, on scalars of either compute type.
#pragma once
#include "../cellops.h"
#include "simd.h"

namespace cellops::CELLOPS_ISA {

CELLOPS_INLINE float exp_of(float x) { return __builtin_expf(x); }
CELLOPS_INLINE double exp_of(double x) { return __builtin_exp(x); }

template <class S>
CELLOPS_INLINE S sigmoid(S x) {
  return 1 / (1 + exp_of(-x));
}

template <class S>
inline S gate_value(Gate gate, S x) {
  if (gate == Gate::sigmoid) return sigmoid(x);
  const S shifted = x + 3;  // comparisons that keep NaN
  return shifted < 0 ? S(0) : shifted > 6 ? S(1) : shifted / 6;
}

// From the argument x and the value y.
template <class S>
inline S gate_derivative(Gate gate, S x, S y) {
  if (gate == Gate::sigmoid) return y * (1 - y);
  return x <= -3 || x >= 3 ? S(0) : S(1) / 6;
}

}  // namespace cellops::CELLOPS_ISA
