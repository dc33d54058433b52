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

// The gradient of the argument x from that of the value y.
template <class S>
inline S gate_gradient(Gate gate, S x, S y, S grad) {
  if (gate == Gate::sigmoid) return grad * y * (1 - y);
  return x > -3 && x < 3 ? grad / 6 : S(0);
}

}  // namespace cellops::CELLOPS_ISA
