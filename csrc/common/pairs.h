// Pairs and quadruples of neighbouring numbers, and vectors that are not full.
#pragma once
#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace cellops::CELLOPS_ISA {

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

// The last lane of `before`, then all but the last of `value`.
template <class V>
CELLOPS_INLINE V shift_in(V before, V value) {
  constexpr int lanes = sizeof(V) / sizeof(value[0]);
#if defined(__clang__) || __GNUC__ >= 12
  if constexpr (lanes == 16) {
    return __builtin_shufflevector(before, value, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
  } else if constexpr (lanes == 8) {
    return __builtin_shufflevector(before, value, 7, 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (lanes == 4) {
    return __builtin_shufflevector(before, value, 3, 4, 5, 6);
  } else {
    return __builtin_shufflevector(before, value, 1, 2);
  }
#else
  V shifted;
  shifted[0] = before[lanes - 1];
  for (int i = 1; i < lanes; ++i) shifted[i] = value[i - 1];
  return shifted;
#endif
}

// Four vectors as four columns of quadruples: in each 16-byte part rows become columns.
CELLOPS_INLINE void transpose_quads(Vec<float>& a, Vec<float>& b, Vec<float>& c, Vec<float>& d) {
#if defined(__AVX512F__)
  const __m512 p = bit_cast<__m512>(a), q = bit_cast<__m512>(b), r = bit_cast<__m512>(c), s = bit_cast<__m512>(d);
  const __m512 pq_low = _mm512_unpacklo_ps(p, q), pq_high = _mm512_unpackhi_ps(p, q);
  const __m512 rs_low = _mm512_unpacklo_ps(r, s), rs_high = _mm512_unpackhi_ps(r, s);
  a = bit_cast<Vec<float>>(_mm512_shuffle_ps(pq_low, rs_low, 0x44));
  b = bit_cast<Vec<float>>(_mm512_shuffle_ps(pq_low, rs_low, 0xee));
  c = bit_cast<Vec<float>>(_mm512_shuffle_ps(pq_high, rs_high, 0x44));
  d = bit_cast<Vec<float>>(_mm512_shuffle_ps(pq_high, rs_high, 0xee));
#elif defined(__AVX2__)
  const __m256 p = bit_cast<__m256>(a), q = bit_cast<__m256>(b), r = bit_cast<__m256>(c), s = bit_cast<__m256>(d);
  const __m256 pq_low = _mm256_unpacklo_ps(p, q), pq_high = _mm256_unpackhi_ps(p, q);
  const __m256 rs_low = _mm256_unpacklo_ps(r, s), rs_high = _mm256_unpackhi_ps(r, s);
  a = bit_cast<Vec<float>>(_mm256_shuffle_ps(pq_low, rs_low, 0x44));
  b = bit_cast<Vec<float>>(_mm256_shuffle_ps(pq_low, rs_low, 0xee));
  c = bit_cast<Vec<float>>(_mm256_shuffle_ps(pq_high, rs_high, 0x44));
  d = bit_cast<Vec<float>>(_mm256_shuffle_ps(pq_high, rs_high, 0xee));
#else
  transpose4(a, b, c, d);
#endif
}

// Quadruples lie in memory in an order that suits the transposition: that of each fourth lane from the first on, then
// of each fourth lane from the second on, and so forth. Doubles keep theirs.
CELLOPS_INLINE VecInt<float> in_quad_order(VecInt<float> value) {
#if defined(__AVX512F__)
  alignas(64) static const int32_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return bit_cast<VecInt<float>>(_mm512_permutexvar_epi32(_mm512_load_si512(kOrder), bit_cast<__m512i>(value)));
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return bit_cast<VecInt<float>>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(value), order));
#else
  return value;
#endif
}
CELLOPS_INLINE VecInt<double> in_quad_order(VecInt<double> value) { return value; }

// Lane i of a, b, c and d: the four numbers from data + 2 * at on, where `at` is that lane's of kLanes in quad order.
CELLOPS_INLINE void load_quads(const float* data, const int32_t* at, Vec<float>& a, Vec<float>& b, Vec<float>& c,
                               Vec<float>& d) {
  using Loaded = VectorOf<float, 16>::unaligned;
  const auto load_vector = [&](const int32_t* at) {
    const Quad<float> first = *(const Loaded*)(data + 2 * int64_t(at[0]));
#if defined(__AVX512F__)
    __m512 four = _mm512_castps128_ps512(bit_cast<__m128>(first));
    four = _mm512_insertf32x4(four, _mm_loadu_ps(data + 2 * int64_t(at[1])), 1);
    four = _mm512_insertf32x4(four, _mm_loadu_ps(data + 2 * int64_t(at[2])), 2);
    return bit_cast<Vec<float>>(_mm512_insertf32x4(four, _mm_loadu_ps(data + 2 * int64_t(at[3])), 3));
#elif defined(__AVX2__)
    const __m256 both = _mm256_castps128_ps256(bit_cast<__m128>(first));
    return bit_cast<Vec<float>>(_mm256_insertf128_ps(both, _mm_loadu_ps(data + 2 * int64_t(at[1])), 1));
#else
    return first;
#endif
  };
  constexpr int quads = kVectorBytes / 16;
  a = load_vector(at), b = load_vector(at + quads), c = load_vector(at + 2 * quads), d = load_vector(at + 3 * quads);
  transpose_quads(a, b, c, d);
}
CELLOPS_INLINE void load_quads(const double* data, const int32_t* at, Vec<double>& a, Vec<double>& b, Vec<double>& c,
                               Vec<double>& d) {
  a = b = c = d = Vec<double>{};
  for (int i = 0; i < kLanes<double>; ++i) {
    const double* quad = data + 2 * int64_t(at[i]);
    a[i] = quad[0], b[i] = quad[1], c[i] = quad[2], d[i] = quad[3];
  }
}

// The quadruples of the lanes of a, b, c and d, in quad order.
CELLOPS_INLINE void store_quads(float* to, Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
  transpose_quads(a, b, c, d);
  constexpr int lanes = kLanes<float>;
  store(to, a), store(to + lanes, b), store(to + 2 * lanes, c), store(to + 3 * lanes, d);
}
CELLOPS_INLINE void store_quads(double* to, Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d) {
  for (int i = 0; i < kLanes<double>; ++i, to += 4) to[0] = a[i], to[1] = b[i], to[2] = c[i], to[3] = d[i];
}
template <class S>
CELLOPS_INLINE void add_quad(S* to, const S* quad) {
  using Quadruple = typename VectorOf<S, 4 * int(sizeof(S))>::unaligned;
  *(Quadruple*)to += *(const Quadruple*)quad;
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
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<float>>(_mm256_maskload_epi32((const int*)from, first_lanes(count)));
  }
#endif
  alignas(64) T some[lanes] = {};
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_store_si256((__m256i*)some, _mm256_maskz_loadu_epi16(__mmask16(mask), from));
    return load(some);
  }
#endif
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
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return _mm256_maskstore_epi32((int*)to, first_lanes(count), bit_cast<__m256i>(value));
  }
#endif
  alignas(64) T some[lanes];
  store(some, value);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    return _mm256_mask_storeu_epi16(to, __mmask16(mask), _mm256_load_si256((const __m256i*)some));
  }
#endif
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

// a > b ? a : b and a < b ? a : b, so b where one is NaN; in one instruction, which compilers do not always see.
template <class S>
CELLOPS_INLINE Vec<S> larger_of(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<S>>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#endif
  return a > b ? a : b;
}
template <class S>
CELLOPS_INLINE Vec<S> smaller_of(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<S>>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#endif
  return a < b ? a : b;
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
