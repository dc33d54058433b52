// Stores that pass the caches by. They save the reading of a line before it is written, a third of a copy's traffic,
// and leave the caches to the input; whoever reads the output next finds it in memory. So only where it would not have
// stayed in the cache anyhow.
#pragma once
#include "simd.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int64_t kLine = 64;  // bytes that the cache takes at a time

// A call that touches more than this does not leave its output in the cache: what one core reaches of the last cache is
// 16 to 64 MiB on current CPUs. The system's own answer counts caches of other cores, 320 MiB on an EPYC where it
// is 32.
inline constexpr int64_t kCacheBytes = 32 << 20;

// Whether to stream `output`, written in rows of `row` values by a call that touches `bytes` in all. A row must not
// shift against the cache's lines, as whole lines are streamed.
template <class T>
inline bool streams(const T* output, int64_t row, int64_t bytes) {
#if defined(__AVX2__)
  return row * int64_t(sizeof(T)) % kLine == 0 && (uintptr_t)output % kLine == 0 && bytes > kCacheBytes;
#else
  return (void)output, (void)row, (void)bytes, false;
#endif
}

// Each thread that streamed calls it before others read.
inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Stores a vector; a streamed one to an aligned address.
template <class T, class V>
CELLOPS_INLINE void put(T* to, V value, bool streamed) {
#if defined(__AVX2__)
  if (streamed) {
    const auto bits = stored(to, value);
    if constexpr (sizeof(bits) == 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i*)to, bit_cast<__m512i>(bits));
#endif
    } else if constexpr (sizeof(bits) == 32) {
      _mm256_stream_si256((__m256i*)to, bit_cast<__m256i>(bits));
    } else {
      _mm_stream_si128((__m128i*)to, bit_cast<__m128i>(bits));
    }
    return;
  }
#endif
  (void)streamed;
  store(to, value);
}

// A row of `count` values that are written and not read: vector(i, streamed) for whole vectors at i, of which the last
// may overlap the one before; scalar(i) where the row is shorter than one.
template <class T, class Vector, class Scalar>
CELLOPS_INLINE void each_written(int64_t count, bool streamed, const Vector& vector, const Scalar& scalar) {
  constexpr int lanes = kLanes<Compute<T>>;
  int64_t i = 0;
  if (count < lanes) {
    for (; i < count; ++i) scalar(i);
    return;
  }
  for (; i + lanes <= count; i += lanes) vector(i, streamed);
  if (i < count) vector(count - lanes, false);
}

// Writes `count` numbers in a run; streamed in whole lines.
template <class T, class S>
inline void store_run(int64_t count, const S* from, T* to, bool streamed) {
  constexpr int lanes = kLanes<S>, line = int(kLine / sizeof(T));
  int64_t i = 0;
  if (streamed) {
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to) % kLine / sizeof(T));
    for (; i < min_of(head, count); ++i) from_compute(to + i, from[i]);
    for (; i + line <= count; i += line) {
#pragma GCC unroll 16
      for (int k = 0; k < line; k += lanes) put(to + i + k, load(from + i + k), true);
    }
  }
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  for (; i < count; ++i) from_compute(to + i, from[i]);
}

}  // namespace cellops::CELLOPS_ISA
