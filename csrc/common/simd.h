// Vectors of one width per instruction set, on the compiler's vector extensions.
// Included by the files that are compiled once per instruction set, so everything sits in a namespace of that
// variant and nothing here instantiates a std:: template: the linker must never merge code across variants.
#pragma once
#include <cstdint>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef CELLOPS_ISA
#error "compile with -DCELLOPS_ISA=<variant>"
#endif
#include "../cellops.h"
#include "dtype.h"
#define CELLOPS_INLINE inline __attribute__((always_inline))
#define CELLOPS_INLINE_LAMBDA __attribute__((always_inline))

// A variant whose instructions are bfloat16's alone leaves the other types to the one that it names here.
#ifdef CELLOPS_OTHER_DTYPES
namespace cellops::CELLOPS_OTHER_DTYPES {
#define X(name, Params, Tensors) bool name(const Params&, const Tensors&, int);
#include "../cpu/ops.inc"
#undef X
}  // namespace cellops::CELLOPS_OTHER_DTYPES
#endif

namespace cellops::CELLOPS_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class S, int Bytes>
struct VectorOf {
  typedef S type __attribute__((vector_size(Bytes)));
  typedef S unaligned __attribute__((vector_size(Bytes), aligned(alignof(S)), may_alias));
};
template <class S>
using Vec = typename VectorOf<S, kVectorBytes>::type;
template <class S>
inline constexpr int kLanes = kVectorBytes / int(sizeof(S));

template <class S>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class S>
using VecInt = Vec<typename IntOf<S>::type>;
using Half = VectorOf<uint16_t, kVectorBytes / 2>;  // as many 16-bit values as a vector has floats

// Defines the entry point `name`: the template `kernel` at the storage type that the params name.
#ifndef CELLOPS_OTHER_DTYPES
#define CELLOPS_DISPATCH(name, kernel, Params, Tensors)                  \
  bool name(const Params& params, const Tensors& tensors, int threads) { \
    switch (params.dtype) {                                              \
      case Dtype::float32:                                               \
        return kernel<float>(params, tensors, threads);                  \
      case Dtype::float64:                                               \
        return kernel<double>(params, tensors, threads);                 \
      case Dtype::bfloat16:                                              \
        return kernel<bfloat16>(params, tensors, threads);               \
      case Dtype::float16:                                               \
        return kernel<float16>(params, tensors, threads);                \
    }                                                                    \
    return false;                                                        \
  }
#else
#define CELLOPS_DISPATCH(name, kernel, Params, Tensors)                                                        \
  bool name(const Params& params, const Tensors& tensors, int threads) {                                       \
    if (params.dtype != Dtype::bfloat16) return cellops::CELLOPS_OTHER_DTYPES::name(params, tensors, threads); \
    return kernel<bfloat16>(params, tensors, threads);                                                         \
  }
#endif

CELLOPS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
CELLOPS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
CELLOPS_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
CELLOPS_INLINE int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

template <class S>
CELLOPS_INLINE Vec<S> broadcast(S value) {
  return value - Vec<S>{};
}

// Vectors ------------------------------------------------------------------------------------------------------

// Makes the compiler load a vector into a register, not take it as an operand in memory of each that uses it.
template <class S>
CELLOPS_INLINE void keep_in_register(Vec<S>& value) {
#if defined(__x86_64__)
  __asm__("" : "+v"(value));
#else
  (void)value;
#endif
}

CELLOPS_INLINE Vec<float> load(const float* from) { return *(const VectorOf<float, kVectorBytes>::unaligned*)from; }
CELLOPS_INLINE Vec<double> load(const double* from) { return *(const VectorOf<double, kVectorBytes>::unaligned*)from; }
CELLOPS_INLINE Vec<float> load(const bfloat16* from) {
  const Half::type half = *(const Half::unaligned*)from;
  return bit_cast<Vec<float>>(__builtin_convertvector(half, Vec<uint32_t>) << 16);
}
CELLOPS_INLINE Vec<float> load(const float16* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
#else
  Vec<float> value = {};
  for (int i = 0; i < kLanes<float>; ++i) value[i] = to_compute(from[i]);
  return value;
#endif
}

CELLOPS_INLINE void store(float* to, Vec<float> value) { *(VectorOf<float, kVectorBytes>::unaligned*)to = value; }
CELLOPS_INLINE void store(double* to, Vec<double> value) { *(VectorOf<double, kVectorBytes>::unaligned*)to = value; }

// A vector in the form that it is stored in.
CELLOPS_INLINE Vec<float> stored(const float*, Vec<float> value) { return value; }
CELLOPS_INLINE Vec<double> stored(const double*, Vec<double> value) { return value; }
CELLOPS_INLINE Half::type stored(const bfloat16*, Vec<float> value) {
#if defined(__AVX512BF16__)
  // The instruction gives what follows, bit for bit, but takes denormals (class 0x20) for zeros.
  const __m512 floats = bit_cast<__m512>(value);
  if (__builtin_expect(_mm512_fpclass_ps_mask(floats, 0x20) == 0, 1)) {
    return bit_cast<Half::type>(_mm512_cvtneps_pbh(floats));
  }
#endif
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(value);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  return __builtin_convertvector(value == value ? rounded : quiet, Half::type);
}
CELLOPS_INLINE Half::type stored(const float16*, Vec<float> value) {
#if defined(__AVX512F__)
  return bit_cast<Half::type>(_mm512_cvtps_ph(bit_cast<__m512>(value), 0));
#elif defined(__F16C__)
  return bit_cast<Half::type>(_mm256_cvtps_ph(bit_cast<__m256>(value), 0));
#else
  float16 halves[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) from_compute(halves + i, value[i]);
  return bit_cast<Half::type>(halves);
#endif
}
CELLOPS_INLINE void store(bfloat16* to, Vec<float> value) { *(Half::unaligned*)to = stored(to, value); }
CELLOPS_INLINE void store(float16* to, Vec<float> value) { *(Half::unaligned*)to = stored(to, value); }

// The first `count` < lanes values of a vector; the others are read as zero and not written.
template <class S, class T>
CELLOPS_INLINE Vec<S> load_first(const T* from, int64_t count) {
  S values[kLanes<S>] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_compute(from[i]);
  return load(values);
}
template <class T, class V>
CELLOPS_INLINE void store_first(T* to, V value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_compute(to + i, value[i]);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits set in the first `count` lanes of eight.
CELLOPS_INLINE __m256i first_lanes(int64_t count) {
  alignas(32) static const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t from = 8 - max_of(0, min_of(count, 8));
  return _mm256_loadu_si256((const __m256i*)(kMask + from));
}
// Not the same for storing, which some processors with AVX2 do in microcode.
template <>
CELLOPS_INLINE Vec<float> load_first<float, float>(const float* from, int64_t count) {
  return bit_cast<Vec<float>>(_mm256_maskload_ps(from, first_lanes(count)));
}
#endif
#if defined(__AVX512F__)
template <>
CELLOPS_INLINE Vec<float> load_first<float, float>(const float* from, int64_t count) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
}
template <>
CELLOPS_INLINE void store_first<float, Vec<float>>(float* to, Vec<float> value, int64_t count) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), bit_cast<__m512>(value));
}
#endif

// Zero in the lanes from `count` on.
template <class S>
CELLOPS_INLINE Vec<S> keep_first(Vec<S> value, int64_t count) {
  using Int = typename IntOf<S>::type;
  VecInt<S> lane{};
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = Int(i);
  return lane < VecInt<S>{} + Int(count) ? value : Vec<S>{};
}

// Loads lanes [begin, end) of a vector of floats, those of them that there are, and zeros in the others. With AVX-512
// that is a load like any other, with AVX2 one of its own, and before that one for each lane.
#if defined(__AVX512F__)
inline constexpr bool kLeavesLanesOutForFree = true;
#else
inline constexpr bool kLeavesLanesOutForFree = false;
#endif
class SomeLanes {
 public:
#if defined(__AVX512F__)
  CELLOPS_INLINE SomeLanes(int64_t begin, int64_t end)
      : mask_(__mmask16(~0u << begin & ~(~0u << max_of(0, min_of(end, 16))))) {}
  CELLOPS_INLINE Vec<float> of(const float* from) const {
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(mask_, from));
  }

 private:
  __mmask16 mask_;
#elif defined(__AVX2__)
  CELLOPS_INLINE SomeLanes(int64_t begin, int64_t end)
      : mask_(_mm256_andnot_si256(first_lanes(begin), first_lanes(end))) {}
  CELLOPS_INLINE Vec<float> of(const float* from) const {
    return bit_cast<Vec<float>>(_mm256_maskload_ps(from, mask_));
  }

 private:
  __m256i mask_;
#else
  SomeLanes(int64_t begin, int64_t end) : begin_(begin), end_(min_of(end, kLanes<float>)) {}
  Vec<float> of(const float* from) const {
    Vec<float> value{};
    for (int64_t i = begin_; i < end_; ++i) value[i] = from[i];
    return value;
  }

 private:
  int64_t begin_, end_;
#endif
};

// Sixteen-byte quarters, for the shuffles that every instruction set has.
template <class S>
using Quad = typename VectorOf<S, 16>::type;

#if defined(__clang__) || __GNUC__ >= 12
#define CELLOPS_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define CELLOPS_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (VectorOf<int32_t, 16>::type){i, j, k, l})
#endif

CELLOPS_INLINE void transpose4(Quad<float>& a, Quad<float>& b, Quad<float>& c, Quad<float>& d) {
  const Quad<float> ab_low = CELLOPS_SHUFFLE4(a, b, 0, 4, 1, 5), ab_high = CELLOPS_SHUFFLE4(a, b, 2, 6, 3, 7);
  const Quad<float> cd_low = CELLOPS_SHUFFLE4(c, d, 0, 4, 1, 5), cd_high = CELLOPS_SHUFFLE4(c, d, 2, 6, 3, 7);
  a = CELLOPS_SHUFFLE4(ab_low, cd_low, 0, 1, 4, 5);
  b = CELLOPS_SHUFFLE4(ab_low, cd_low, 2, 3, 6, 7);
  c = CELLOPS_SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5);
  d = CELLOPS_SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7);
}

struct Add {
  template <class V>
  CELLOPS_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Greater {
  template <class V>
  CELLOPS_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// Joins the 16-byte parts of a vector.
template <class S, class Join = Add>
CELLOPS_INLINE Quad<S> fold(Vec<S> value, Join join = {}) {
#if defined(__AVX512F__)
  const __m512i bits = bit_cast<__m512i>(value);
  const auto half = join(bit_cast<typename VectorOf<S, 32>::type>(_mm512_castsi512_si256(bits)),
                         bit_cast<typename VectorOf<S, 32>::type>(_mm512_extracti64x4_epi64(bits, 1)));
#else
  const auto half = value;
  (void)join;
#endif
#if defined(__AVX2__)
  return join(bit_cast<Quad<S>>(_mm256_castsi256_si128(bit_cast<__m256i>(half))),
              bit_cast<Quad<S>>(_mm256_extracti128_si256(bit_cast<__m256i>(half), 1)));
#else
  return half;
#endif
}

template <class S>
CELLOPS_INLINE S sum_of(Vec<S> value) {
  const Quad<S> quarter = fold<S>(value);
  S total = quarter[0];
  for (int i = 1; i < 16 / int(sizeof(S)); ++i) total += quarter[i];
  return total;
}

// joined[i] = the lanes of the i-th vector, joined.
template <class Join>
CELLOPS_INLINE void join_lanes(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* joined, Join join) {
  Quad<float> qa = fold<float>(a, join), qb = fold<float>(b, join), qc = fold<float>(c, join),
              qd = fold<float>(d, join);
  transpose4(qa, qb, qc, qd);
  *(VectorOf<float, 16>::unaligned*)joined = join(join(qa, qb), join(qc, qd));
}
template <class Join>
CELLOPS_INLINE void join_lanes(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double* joined, Join join) {
  const Quad<double> quads[4] = {fold<double>(a, join), fold<double>(b, join), fold<double>(c, join),
                                 fold<double>(d, join)};
  for (int i = 0; i < 4; ++i) joined[i] = join(quads[i][0], quads[i][1]);
}

// sums[i] and maxima[i] = that of the lanes of the i-th vector; which of two a maximum is beside a NaN is not said.
template <class S>
CELLOPS_INLINE void sums_of(Vec<S> a, Vec<S> b, Vec<S> c, Vec<S> d, S* sums) {
  join_lanes(a, b, c, d, sums, Add{});
}
template <class S>
CELLOPS_INLINE void maxima_of(Vec<S> a, Vec<S> b, Vec<S> c, Vec<S> d, S* maxima) {
  join_lanes(a, b, c, d, maxima, Greater{});
}

}  // namespace cellops::CELLOPS_ISA
