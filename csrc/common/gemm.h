// The register-blocked matrix product that the convolutions share.
//
// One micro-kernel, C[r][n] += sum_k A[r][k] * B[k][n]: A is broadcast, B is read in vectors, C stays in registers.
// It works in units: a unit is one number (float, double), or a pair of neighbouring bfloat16 along k where the
// instruction set multiplies such pairs (AVX512-BF16, AMX), which it treats as one 32-bit element.
#pragma once
#include "simd.h"
#include "tiles.h"

namespace cellops::CELLOPS_ISA {

// Rows of C a micro-kernel call produces, and its panel's width in vectors; sized for 32 or 16 registers.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRows = 12, kOuterRows = 8;
#else
inline constexpr int kRows = 6, kOuterRows = 4;
#endif
inline constexpr int kPanelVectors = 2;

template <class S>
struct Multiply {  // plain numbers
  using Unit = S;
  using Sum = S;
  using Element = S;               // what a unit is made of
  static constexpr int depth = 1;  // numbers along k in a unit
  static CELLOPS_INLINE void add(Vec<S>& sum, Vec<Unit> a, Vec<Unit> b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
struct MultiplyPairs {  // pairs of bfloat16, summed in float32
  using Unit = float;   // as bits
  using Sum = float;
  using Element = bfloat16;
  static constexpr int depth = 2;
  static CELLOPS_INLINE void add(Vec<float>& sum, Vec<float> a, Vec<float> b) {
    sum = bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
};
#endif

// The product for tensors of a type.
template <class T>
struct ChooseMultiply {
  using type = Multiply<Compute<T>>;
};
#if defined(__AVX512BF16__)
template <>
struct ChooseMultiply<bfloat16> {
  using type = MultiplyPairs;
};
#endif
template <class T>
using MultiplyFor = typename ChooseMultiply<T>::type;

// sum[r][n] += sum_k A[r][k] * B[k][n] of a block in registers. The rows of A lie a_row units apart and its columns
// a_step: a_step == 1 reads rows (A as it lies), a_row == 1 reads columns (A transposed). Three rows share a pointer:
// more would not fit an x86 address.
template <class M, int Rows, int Vectors>
CELLOPS_INLINE void multiply_block(int64_t depth, const typename M::Unit* a, int64_t a_row, int64_t a_step,
                                   const typename M::Unit* b, int64_t b_step,
                                   Vec<typename M::Sum> (&sum)[Rows][Vectors]) {
  using S = typename M::Sum;
  constexpr int lanes = kLanes<S>, pointers = (Rows + 2) / 3;
  const typename M::Unit* rows[pointers];
  for (int i = 0; i < pointers; ++i) rows[i] = a + 3 * i * a_row;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<S> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<S> x = broadcast(rows[r / 3][r % 3 * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) M::add(sum[r][v], x, row[v]);
    }
    for (int i = 0; i < pointers; ++i) rows[i] += a_step;
    b += b_step;
  }
}

template <class M, int Rows, int Vectors, bool Accumulate>
inline void micro_kernel(int64_t depth, const typename M::Unit* a, int64_t a_row, int64_t a_step,
                         const typename M::Unit* b, int64_t b_step, typename M::Sum* c, int64_t c_row) {
  using S = typename M::Sum;
  constexpr int lanes = kLanes<S>;
  Vec<S> sum[Rows][Vectors] = {};  // not begun with C: in long sums every term would be rounded to the digits of C
  multiply_block<M>(depth, a, a_row, a_step, b, b_step, sum);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      S* to = c + r * c_row + v * lanes;
      store(to, Accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <class S>
inline constexpr int kPanel = kPanelVectors * kLanes<S>;

// C[rows][columns] (+)= A[rows][depth] * B, with B packed in panels of kPanel columns: panel after panel, each
// [depth][kPanel]. Whole micro-kernels run: C and A have room for round_up(rows, kRows) rows, C for
// round_up(columns, lanes) columns, and B is zero past its last column.
template <class M, bool Accumulate>
inline void multiply_packed(int64_t rows, int64_t columns, int64_t depth, const typename M::Unit* a, int64_t a_row,
                            const typename M::Unit* b, int64_t panel_stride, typename M::Sum* c, int64_t c_row) {
  constexpr int lanes = kLanes<typename M::Sum>, panel = kPanelVectors * lanes;
  if constexpr (M::depth > 1) {
    if (uses_tiles && depth >= kTilePairs) {
      const int64_t whole = depth / kTilePairs * kTilePairs;
      multiply_in_tiles<Accumulate>(kRows, rows, columns, whole, a, a_row, b, panel, panel_stride, c, c_row);
      if (whole < depth) {
        multiply_packed<M, true>(rows, columns, depth - whole, a + whole, a_row, b + whole * panel, panel_stride, c,
                                 c_row);
      }
      return;
    }
  }
  for (int64_t n = 0; n < columns; n += panel, b += panel_stride) {
    for (int64_t r = 0; r < rows; r += kRows) {
      if (columns - n > lanes) {
        micro_kernel<M, kRows, kPanelVectors, Accumulate>(depth, a + r * a_row, a_row, 1, b, panel, c + r * c_row + n,
                                                          c_row);
      } else {
        micro_kernel<M, kRows, 1, Accumulate>(depth, a + r * a_row, a_row, 1, b, panel, c + r * c_row + n, c_row);
      }
    }
  }
}

// C[rows][columns] += A^T B over `depth` units, A[depth][a_step] and B[depth][b_step] row by row as they lie.
// C has room for round_up(rows, kOuterRows) rows and round_up(columns, lanes) columns; so have A's and B's rows.
template <class M>
inline void multiply_outer(int64_t rows, int64_t columns, int64_t depth, const typename M::Unit* a, int64_t a_step,
                           const typename M::Unit* b, int64_t b_step, typename M::Sum* c, int64_t c_row) {
  constexpr int lanes = kLanes<typename M::Sum>, panel = kPanelVectors * lanes;
  for (int64_t n = 0; n < columns; n += panel) {
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      if (columns - n > lanes) {
        micro_kernel<M, kOuterRows, kPanelVectors, true>(depth, a + r, 1, a_step, b + n, b_step, c + r * c_row + n,
                                                         c_row);
      } else {
        micro_kernel<M, kOuterRows, 1, true>(depth, a + r, 1, a_step, b + n, b_step, c + r * c_row + n, c_row);
      }
    }
  }
}

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileRows = 8, kDotRows = 4;
#else
inline constexpr int kTileRows = 4, kDotRows = 2;
#endif
inline constexpr int kTileVectors = 3, kDotColumns = 4;

// The product of A[rows][depth] and B[depth][columns] as they lie, in blocks of at most Rows rows and Vectors vectors;
// no row is computed in vain, be they few. Calls finish(row, column, sum) for every block of it, sum[r][v] of vectors.
// Rows of A lie a_row units apart and its columns a_step. `columns` is a multiple of the lanes.
template <class M, int Rows, int Vectors, class Finish>
inline void multiply_blocks(int64_t rows, int64_t columns, int64_t depth, const typename M::Unit* a, int64_t a_row,
                            int64_t a_step, const typename M::Unit* b, int64_t b_step, const Finish& finish,
                            int64_t row = 0, int64_t column = 0) {
  using S = typename M::Sum;
  constexpr int64_t lanes = kLanes<S>, panel = Vectors * lanes;
  int64_t n = 0;
  for (; n + panel <= columns; n += panel) {
    for (int64_t r = 0; r + Rows <= rows; r += Rows) {
      Vec<S> sum[Rows][Vectors] = {};
      multiply_block<M>(depth, a + r * a_row, a_row, a_step, b + n, b_step, sum);
      finish(row + r, column + n, sum);
    }
  }
  if constexpr (Vectors > 1) {
    if (n < columns) {
      multiply_blocks<M, Rows, 1>(rows / Rows * Rows, columns - n, depth, a, a_row, a_step, b + n, b_step, finish, row,
                                  column + n);
    }
  }
  if constexpr (Rows > 1) {
    const int64_t done = rows / Rows * Rows;
    if (done < rows) {
      multiply_blocks<M, Rows / 2, Vectors>(rows - done, columns, depth, a + done * a_row, a_row, a_step, b, b_step,
                                            finish, row + done, column);
    }
  }
}

// Calls body(row, column, vector) for every vector of a block that multiply_blocks finishes.
template <class S, int Rows, int Vectors, class Body>
CELLOPS_INLINE void each_vector(int64_t row, int64_t column, const Vec<S> (&sum)[Rows][Vectors], const Body& body) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) body(row + r, column + v * kLanes<S>, sum[r][v]);
  }
}

// What multiply_blocks calls to finish a block, from what finishes a vector: finish(row, column, vector).
template <class S, class Finish>
CELLOPS_INLINE auto by_vector(const Finish& finish) {
  return [finish](int64_t row, int64_t column, const auto& sum)
             CELLOPS_INLINE_LAMBDA { each_vector<S>(row, column, sum, finish); };
}

// What multiply_blocks calls to add the product to C, whose rows lie c_row apart.
template <class S>
CELLOPS_INLINE auto adding_to(S* c, int64_t c_row) {
  return by_vector<S>([=](int64_t r, int64_t n, Vec<S> value) CELLOPS_INLINE_LAMBDA {
    S* to = c + r * c_row + n;
    store(to, load(to) + value);
  });
}

// C[r][j] += the product of row r of A and row j of B, each `depth` units long: of plain numbers whole vectors.
template <class M, int Rows, int Columns>
inline void dot_kernel(int64_t depth, const typename M::Unit* a, int64_t a_row, const typename M::Unit* b,
                       int64_t b_row, typename M::Sum* c, int64_t c_row) {
  using S = typename M::Sum;
  constexpr int64_t lanes = kLanes<S>;
  Vec<S> sum[Rows][Columns] = {};
  const auto add = [&](const auto& from) CELLOPS_INLINE_LAMBDA {
    Vec<S> column[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) column[j] = from(b + j * b_row);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec<S> row = from(a + r * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) M::add(sum[r][j], row, column[j]);
    }
  };
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) add([k](const S* row) CELLOPS_INLINE_LAMBDA { return load(row + k); });
  if constexpr (M::depth > 1) {
    if (k < depth) add([=](const S* row) CELLOPS_INLINE_LAMBDA { return load_first<S>(row + k, depth - k); });
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Columns == 4) {
      S sums[4];
      sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3], sums);
      for (int j = 0; j < 4; ++j) c[r * c_row + j] += sums[j];
    } else {
      for (int j = 0; j < Columns; ++j) c[r * c_row + j] += sum_of<S>(sum[r][j]);
    }
  }
}

// C[rows][columns] += A[rows][depth] * B[columns][depth]^T, all as they lie.
template <class M, int Rows = kDotRows>
inline void multiply_dots(int64_t rows, int64_t columns, int64_t depth, const typename M::Unit* a, int64_t a_row,
                          const typename M::Unit* b, int64_t b_row, typename M::Sum* c, int64_t c_row) {
  int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) {
    int64_t j = 0;
    for (; j + kDotColumns <= columns; j += kDotColumns) {
      dot_kernel<M, Rows, kDotColumns>(depth, a + r * a_row, a_row, b + j * b_row, b_row, c + r * c_row + j, c_row);
    }
    for (; j < columns; ++j) {
      dot_kernel<M, Rows, 1>(depth, a + r * a_row, a_row, b + j * b_row, b_row, c + r * c_row + j, c_row);
    }
  }
  if constexpr (Rows > 1) {
    if (r < rows) {
      multiply_dots<M, 1>(rows - r, columns, depth, a + r * a_row, a_row, b, b_row, c + r * c_row, c_row);
    }
  }
}

}  // namespace cellops::CELLOPS_ISA
