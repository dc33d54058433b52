// Between the two memory formats, a few rows of pixels at a time.
#pragma once
#include "pairs.h"
#include "tiles.h"

namespace cellops::CELLOPS_ISA {

// Turns a square of as many vectors as they have lanes: lane j of vector i becomes lane i of vector j.
CELLOPS_INLINE void turn(Vec<float>* square) {
  constexpr int lanes = kLanes<float>;
#pragma GCC unroll 4
  for (int i = 0; i < lanes; i += 4) transpose_quads(square[i], square[i + 1], square[i + 2], square[i + 3]);
  // The square of the 16-byte parts that are turned in themselves now.
#pragma GCC unroll 4
  for (int i = 0; lanes > 4 && i < 4; ++i) {
#if defined(__AVX512F__)
    const auto at = [&](int k) { return bit_cast<__m512>(square[4 * k + i]); };
    const __m512 even = _mm512_shuffle_f32x4(at(0), at(1), 0x88), odd = _mm512_shuffle_f32x4(at(0), at(1), 0xdd);
    const __m512 more_even = _mm512_shuffle_f32x4(at(2), at(3), 0x88);
    const __m512 more_odd = _mm512_shuffle_f32x4(at(2), at(3), 0xdd);
    square[i] = bit_cast<Vec<float>>(_mm512_shuffle_f32x4(even, more_even, 0x88));
    square[4 + i] = bit_cast<Vec<float>>(_mm512_shuffle_f32x4(odd, more_odd, 0x88));
    square[8 + i] = bit_cast<Vec<float>>(_mm512_shuffle_f32x4(even, more_even, 0xdd));
    square[12 + i] = bit_cast<Vec<float>>(_mm512_shuffle_f32x4(odd, more_odd, 0xdd));
#elif defined(__AVX2__)
    const __m256 first = bit_cast<__m256>(square[i]), second = bit_cast<__m256>(square[4 + i]);
    square[i] = bit_cast<Vec<float>>(_mm256_permute2f128_ps(first, second, 0x20));
    square[4 + i] = bit_cast<Vec<float>>(_mm256_permute2f128_ps(first, second, 0x31));
#endif
  }
}

// to[j][i] = from[i][j] for i < rows, j < columns, with conversion; strides count elements.
template <class To, class From>
inline void transpose(int64_t rows, int64_t columns, const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  int64_t i = 0;
  if constexpr (sizeof(From) == 4 && sizeof(To) == 4) {
    using Unaligned = VectorOf<float, 16>::unaligned;
    for (; i + 4 <= rows; i += 4) {
      const float* source = from + i * from_stride;
      float* target = to + i;
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        Quad<float> a = *(const Unaligned*)(source + j), b = *(const Unaligned*)(source + from_stride + j),
                    c = *(const Unaligned*)(source + 2 * from_stride + j),
                    d = *(const Unaligned*)(source + 3 * from_stride + j);
        transpose4(a, b, c, d);
        *(Unaligned*)(target + j * to_stride) = a;
        *(Unaligned*)(target + (j + 1) * to_stride) = b;
        *(Unaligned*)(target + (j + 2) * to_stride) = c;
        *(Unaligned*)(target + (j + 3) * to_stride) = d;
      }
      for (; j < columns; ++j) {
        for (int k = 0; k < 4; ++k) target[j * to_stride + k] = source[k * from_stride + j];
      }
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      if constexpr (sizeof(From) == sizeof(To) && sizeof(To) == 2) {
        to[j * to_stride + i] = from[i * from_stride + j];
      } else {
        from_compute(to + j * to_stride + i, to_compute(from[i * from_stride + j]));
      }
    }
  }
}

// One row of numbers to another type.
template <class To, class From>
inline void convert_row(int64_t count, const From* from, To* to) {
  constexpr int lanes = kLanes<Compute<From>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  for (; i < count; ++i) from_compute(to + i, to_compute(from[i]));
}

#if defined(__AVX512BF16__)
// Two vectors of floats to bfloat16, woven: even[0], odd[0], even[1], odd[1], ...
CELLOPS_INLINE __m512i weave(Vec<float> even, Vec<float> odd) {
  alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(odd), bit_cast<__m512>(even)));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
}

// A vector of pairs from the numbers at `even` and `odd`, which may be null: zeros.
CELLOPS_INLINE Vec<float> pair_at(const float* even, const float* odd) {
  return bit_cast<Vec<float>>(weave(load(even), odd ? load(odd) : Vec<float>{}));
}
CELLOPS_INLINE Vec<float> pair_at(const bfloat16* even, const bfloat16* odd) {
  const auto bits = [](const bfloat16* row) CELLOPS_INLINE_LAMBDA {
    return __builtin_convertvector(*(const Half::unaligned*)row, Vec<uint32_t>);
  };
  return bit_cast<Vec<float>>((odd ? bits(odd) : Vec<uint32_t>{}) << 16 | bits(even));
}

// Rows in pairs: pairs[i][c] holds bfloat16 of rows 2i and 2i + 1 at column c, zero past the last row. Whole vectors
// are read and written, past the last column too.
template <class T>
inline void pair_rows(int64_t rows, int64_t columns, const T* from, int64_t from_stride, float* pairs,
                      int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * from_stride, pairs += to_stride) {
    const T* odd = i + 1 < rows ? from + from_stride : nullptr;
    for (int64_t c = 0; c < columns; c += kLanes<float>) store(pairs + c, pair_at(from + c, odd ? odd + c : nullptr));
  }
}

// Zeros behind the pairs of `rows` rows, up to a whole number of tiles; returns the pairs with these.
inline int64_t zero_last_pairs(int64_t rows, int64_t columns, float* pairs, int64_t stride) {
  const int64_t end = round_up(div_up(rows, 2), kTilePairs);
  for (int64_t i = div_up(rows, 2); i < end; ++i) {
    __builtin_memset(pairs + i * stride, 0, size_t(columns) * sizeof(float));
  }
  return end;
}
#endif

// One image plane-wise [channels][pixels] to rows [pixels][stride], or back; in blocks that stay in the first cache.
template <class To, class From>
inline void planes_to_rows(int64_t channels, int64_t first, int64_t last, const From* planes, int64_t pixels, To* rows,
                           int64_t stride) {
  constexpr int64_t block = 16;
  for (int64_t p = first; p < last; p += block) {
    transpose(channels, min_of(block, last - p), planes + p, pixels, rows + p * stride, stride);
  }
}
template <class To, class From>
inline void rows_to_planes(int64_t channels, int64_t count, const From* rows, int64_t stride, To* planes,
                           int64_t pixels) {
  constexpr int64_t block = 16;
  for (int64_t c = 0; c < channels; c += block) {
    transpose(count, min_of(block, channels - c), rows + c, stride, planes + c * pixels, pixels);
  }
}

}  // namespace cellops::CELLOPS_ISA
