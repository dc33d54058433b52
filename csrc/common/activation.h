// Activations and gates with their derivatives, of either compute type: gates on scalars, activations on vectors.
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

template <class S>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440055e-4f;  // multiples of the first are exact
  static constexpr float rounder = 0x1.8p23f;  // a sum with it has its fraction rounded away, the integer in low bits
  static constexpr float least = -105, most = 89;
  static constexpr int mantissa_bits = 23, bias = 127, degree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  static constexpr double rounder = 0x1.8p52;
  static constexpr double least = -746, most = 710;
  static constexpr int mantissa_bits = 52, bias = 1023, degree = 13;
};

// e^x to 1.5 units in the last place, denormal results included: Taylor's polynomial on |r| <= ln(2) / 2, times 2^n in
// two steps, as 2^n itself may be out of range.
template <class S>
CELLOPS_INLINE Vec<S> exp_of_lanes(Vec<S> x) {
  using K = ExpConstants<S>;
  x = x < broadcast(K::least) ? broadcast(K::least) : x;  // comparisons that keep NaN
  x = x > broadcast(K::most) ? broadcast(K::most) : x;
  const Vec<S> rounded = x * S(1.44269504088896340736) + K::rounder, n = rounded - K::rounder;
  const Vec<S> r = (x - n * K::ln2_high) - n * K::ln2_low;
  Vec<S> p = broadcast(S(1));
#pragma GCC unroll 16
  for (int k = K::degree; k >= 1; --k) p = p * r * (S(1) / S(k)) + S(1);
  const VecInt<S> exponent = bit_cast<VecInt<S>>(rounded) - bit_cast<VecInt<S>>(broadcast(K::rounder));
  const VecInt<S> half = exponent >> 1;
  return p * bit_cast<Vec<S>>((half + K::bias) << K::mantissa_bits) *
         bit_cast<Vec<S>>((exponent - half + K::bias) << K::mantissa_bits);
}

template <class S>
CELLOPS_INLINE Vec<S> sigmoid_of_lanes(Vec<S> x) {
  return S(1) / (S(1) + exp_of_lanes<S>(-x));
}

// The standard normal distribution: its cumulated probability, and `bell` = e^(-x^2 / 2).
//
// The tail is bell * t * Q(t) with t = 1 / (1 + |x| / 4): Q was fitted to the quotient at Chebyshev's nodes, to 1e-8
// (degree 9) and 4e-16 (degree 20) of itself. A tail's relative error is that of bell, x^2 units in the last place.
template <class S>
CELLOPS_INLINE Vec<S> normal_probability(Vec<S> x, Vec<S>* bell) {
  static constexpr float kFloat[] = {0.0153836033f, -0.0563454643f, 0.036615255f,  0.0483180834f, -0.00367795936f,
                                     0.0953755683f, 0.0690116361f,  0.0961508647f, 0.0994166231f, 0.0997517922f};
  static constexpr double kDouble[] = {0.0020143056427327479,   -0.021869698410064467, 0.10805228364135556,
                                       -0.31968829213438834,    0.6273750021909523,    -0.85722444547139916,
                                       0.84092367643027875,     -0.61435723392636712,  0.34953897590734038,
                                       -0.15071957917568871,    0.044641261037054275,  -0.018877029208476212,
                                       -0.00094565635077757263, 0.0069826754207530991, 0.02339170239656131,
                                       0.043251212371222162,    0.063502337835818574,  0.081035272120710875,
                                       0.093502089200853102,    0.099735570385793828,  0.099735570095734708};
  const Vec<S> size = x < Vec<S>{} ? -x : x;
  const Vec<S> t = S(1) / (S(1) + size * S(0.25));
  Vec<S> q;
  if constexpr (sizeof(S) == 4) {
    q = broadcast(kFloat[0]);
#pragma GCC unroll 16
    for (int k = 1; k < 10; ++k) q = q * t + kFloat[k];
  } else {
    q = broadcast(kDouble[0]);
#pragma GCC unroll 32
    for (int k = 1; k < 21; ++k) q = q * t + kDouble[k];
  }
  *bell = exp_of_lanes<S>(x * x * S(-0.5));
  const Vec<S> tail = *bell * t * q;
  return x < Vec<S>{} ? tail : S(1) - tail;
}

template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};

// Calls body(tag), tag.value the activation as a constant.
template <class Body>
CELLOPS_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      return body(ActivationTag<Activation::none>());
    case Activation::relu:
      return body(ActivationTag<Activation::relu>());
    case Activation::relu6:
      return body(ActivationTag<Activation::relu6>());
    case Activation::gelu:
      return body(ActivationTag<Activation::gelu>());
    case Activation::silu:
      return body(ActivationTag<Activation::silu>());
    case Activation::hardswish:
      return body(ActivationTag<Activation::hardswish>());
  }
}

// NaN stays NaN: a comparison with it is false.
template <Activation A, class S>
CELLOPS_INLINE Vec<S> activate(Vec<S> x) {
  const Vec<S> zero{}, six = broadcast(S(6));
  if constexpr (A == Activation::relu) return x < zero ? zero : x;
  if constexpr (A == Activation::relu6) return x < zero ? zero : x > six ? six : x;
  if constexpr (A == Activation::silu) return x * sigmoid_of_lanes<S>(x);
  if constexpr (A == Activation::hardswish) {
    const Vec<S> shifted = x + S(3);
    return x * (shifted < zero ? zero : shifted > six ? six : shifted) * (S(1) / 6);
  }
  if constexpr (A == Activation::gelu) {
    Vec<S> bell;
    return x * normal_probability<S>(x, &bell);
  }
  return x;
}

// The derivative; at the kinks what PyTorch takes: 0 at those of relu and relu6, at 3 the 1 of hardswish.
template <Activation A, class S>
CELLOPS_INLINE Vec<S> activation_slope(Vec<S> x) {
  const Vec<S> zero{}, one = broadcast(S(1));
  if constexpr (A == Activation::relu) return x <= zero ? zero : one;
  if constexpr (A == Activation::relu6) return x <= zero ? zero : x >= broadcast(S(6)) ? zero : one;
  if constexpr (A == Activation::silu) {
    const Vec<S> s = sigmoid_of_lanes<S>(x);
    return s * (S(1) + x * (S(1) - s));
  }
  if constexpr (A == Activation::hardswish) {
    return x <= broadcast(S(-3)) ? zero : x < broadcast(S(3)) ? x * (S(1) / 3) + S(0.5) : one;
  }
  if constexpr (A == Activation::gelu) {
    Vec<S> bell;
    const Vec<S> probability = normal_probability<S>(x, &bell);
    return probability + x * bell * S(0.39894228040143267794);
  }
  return one;
}

}  // namespace cellops::CELLOPS_ISA
