// Pairs of neighbouring numbers, and vectors that are not full.
#pragma once
#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace cellops::CELLOPS_ISA {

template <class S>
using Pair = typename VectorOf<S, 2 * sizeof(S)>::type;

template <class S>
CELLOPS_INLINE Pair<S> load_pair(const S* from) {
  Pair<S> pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  return pair;
}
template <class S>
CELLOPS_INLINE void store_pair(S* to, Pair<S> pair) {
  __builtin_memcpy(to, &pair, sizeof(pair));
}

// to[0, 1] = a[0, 1] and to[2, 3] = b[0, 1]; for floats in one store.
CELLOPS_INLINE void copy_pairs(const float* a, const float* b, float* to) {
  double first, second;  // eight bytes each, whatever they say
  __builtin_memcpy(&first, a, 8);
  __builtin_memcpy(&second, b, 8);
  const Quad<double> both = {first, second};
  __builtin_memcpy(to, &both, 16);
}
CELLOPS_INLINE void copy_pairs(const double* a, const double* b, double* to) {
  store_pair(to, load_pair(a));
  store_pair(to + 2, load_pair(b));
}

// even[i] = pairs[2i] and odd[i] = pairs[2i + 1] of the numbers in `a`, then `b`; and back.
template <class V>
CELLOPS_INLINE void unzip(V a, V b, V& even, V& odd) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
#if defined(__clang__) || __GNUC__ >= 12
  if constexpr (lanes == 16) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (lanes == 8) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else if constexpr (lanes == 4) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else {
    even = __builtin_shufflevector(a, b, 0, 2);
    odd = __builtin_shufflevector(a, b, 1, 3);
  }
#else
  for (int i = 0; i < lanes / 2; ++i) {
    even[i] = a[2 * i], odd[i] = a[2 * i + 1];
    even[i + lanes / 2] = b[2 * i], odd[i + lanes / 2] = b[2 * i + 1];
  }
#endif
}
template <class V>
CELLOPS_INLINE void zip(V even, V odd, V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(even[0]);
#if defined(__clang__) || __GNUC__ >= 12
  if constexpr (lanes == 16) {
    a = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    b = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (lanes == 8) {
    a = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    b = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (lanes == 4) {
    a = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
    b = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
  } else {
    a = __builtin_shufflevector(even, odd, 0, 2);
    b = __builtin_shufflevector(even, odd, 1, 3);
  }
#else
  for (int i = 0; i < lanes / 2; ++i) {
    a[2 * i] = even[i], a[2 * i + 1] = odd[i];
    b[2 * i] = even[i + lanes / 2], b[2 * i + 1] = odd[i + lanes / 2];
  }
#endif
}

// The first `count` lanes, zeros in the others; a count of a vector's lanes or more is a whole vector.
template <class T>
CELLOPS_INLINE Vec<Compute<T>> load_some(const T* from, int64_t count) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (count >= lanes) return load(from);
#if defined(__AVX512F__)
  const unsigned mask = count > 0 ? (1u << count) - 1 : 0;
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<float>>(_mm512_maskz_loadu_epi32(__mmask16(mask), from));
  if constexpr (sizeof(T) == 8) return bit_cast<Vec<Compute<T>>>(_mm512_maskz_loadu_epi64(__mmask8(mask), from));
#endif
  alignas(64) T some[lanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load(some);
}
template <class T, class V>
CELLOPS_INLINE void store_some(T* to, V value, int64_t count) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (count >= lanes) return store(to, value);
#if defined(__AVX512F__)
  const unsigned mask = count > 0 ? (1u << count) - 1 : 0;
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(to, __mmask16(mask), bit_cast<__m512i>(value));
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(to, __mmask8(mask), bit_cast<__m512i>(value));
#endif
  alignas(64) T some[lanes];
  store(some, value);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

// Of numbers that are not negative, below 2^31 for floats and 2^63 for doubles; NaN stays.
template <class S>
CELLOPS_INLINE Vec<S> floor_of(Vec<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<S>>(_mm512_roundscale_ps(bit_cast<__m512>(x), 0x09));
  return bit_cast<Vec<S>>(_mm512_roundscale_pd(bit_cast<__m512d>(x), 0x09));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<S>>(_mm256_floor_ps(bit_cast<__m256>(x)));
  return bit_cast<Vec<S>>(_mm256_floor_pd(bit_cast<__m256d>(x)));
#elif defined(__aarch64__)
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<S>>(vrndmq_f32(bit_cast<float32x4_t>(x)));
  return bit_cast<Vec<S>>(vrndmq_f64(bit_cast<float64x2_t>(x)));
#else
  const Vec<S> known = x == x ? x : Vec<S>{};
  return __builtin_convertvector(__builtin_convertvector(known, VecInt<S>), Vec<S>) + (x - known);
#endif
}

}  // namespace cellops::CELLOPS_ISA
