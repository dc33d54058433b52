// The product of bfloat16 pairs in AMX's tile registers, on CPUs that have them: one instruction multiplies a tile of
// A, up to 16 rows of 16 pairs, by 16 rows of B, 16 pairs each, which is what the packed panels of gemm.h are made of.
//
// Its throughput is a cycle for each row of A, 16 times the numbers of two vector FMA units. A 2 x 2 block of tiles of
// C takes as many cycles of products as it has rows, and half as many for loading the tiles that they need.
#pragma once
#include "simd.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int64_t kTilePairs = 16;  // along k

#if defined(CELLOPS_WITH_AMX) && defined(__AVX512BF16__)
extern bool uses_tiles;  // the dispatcher's: the CPU has tiles and the system has allowed them

// Registers 0 to 3 hold C, 4 and 5 A, 6 and 7 B. Other programs of the thread have tiles of other sizes: the
// configuration is set before a product and given back after it.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = uint8_t(i < 6 ? rows : kTilePairs);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Rows lie `stride` floats apart.
template <int Register>
CELLOPS_INLINE void load_tile(const float* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(Register) : "memory");
}
template <int Register>
CELLOPS_INLINE void store_tile(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * stride), "i"(Register) : "memory");
}
template <int Register>
CELLOPS_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int C, int A, int B>
CELLOPS_INLINE void multiply_tile_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// A block of Rows x Columns tiles of C; tiles of A and C have `rows` rows.
template <int Rows, int Columns, bool Accumulate>
inline void tile_block(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* b, int64_t b_step,
                       float* c, int64_t c_row) {
  float* const lower = c + rows * c_row;
  if constexpr (Accumulate) {
    load_tile<0>(c, c_row);
    if constexpr (Columns > 1) load_tile<1>(c + 16, c_row);
    if constexpr (Rows > 1) load_tile<2>(lower, c_row);
    if constexpr (Rows > 1 && Columns > 1) load_tile<3>(lower + 16, c_row);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kTilePairs, a += kTilePairs, b += kTilePairs * b_step) {
    load_tile<4>(a, a_row);
    load_tile<6>(b, b_step);
    multiply_tile_pairs<0, 4, 6>();
    if constexpr (Columns > 1) {
      load_tile<7>(b + 16, b_step);
      multiply_tile_pairs<1, 4, 7>();
    }
    if constexpr (Rows > 1) {
      load_tile<5>(a + rows * a_row, a_row);
      multiply_tile_pairs<2, 5, 6>();
      if constexpr (Columns > 1) multiply_tile_pairs<3, 5, 7>();
    }
  }
  store_tile<0>(c, c_row);
  if constexpr (Columns > 1) store_tile<1>(c + 16, c_row);
  if constexpr (Rows > 1) store_tile<2>(lower, c_row);
  if constexpr (Rows > 1 && Columns > 1) store_tile<3>(lower + 16, c_row);
}

// C[rows][columns] (+)= A[rows][depth] * B[depth][columns] in pairs; `depth` is a multiple of kTilePairs. Rows of A lie
// a_row apart; those of B b_step, 32 columns at a time, the next 32 b_panel further on. A and C have room for
// round_up(rows, tile_rows) rows, B and C for round_up(columns, 16) columns.
template <bool Accumulate>
inline void multiply_in_tiles(int64_t tile_rows, int64_t rows, int64_t columns, int64_t depth, const float* a,
                              int64_t a_row, const float* b, int64_t b_step, int64_t b_panel, float* c, int64_t c_row) {
  const TileRegisters registers(tile_rows);
  for (int64_t n = 0; n < columns; n += 32, b += b_panel) {
    const bool wide = columns - n > 16;
    for (int64_t r = 0; r < rows; r += 2 * tile_rows) {
      const bool high = r + tile_rows < rows;
      const float* from = a + r * a_row;
      float* to = c + r * c_row + n;
      if (high && wide) {
        tile_block<2, 2, Accumulate>(tile_rows, depth, from, a_row, b, b_step, to, c_row);
      } else if (high) {
        tile_block<2, 1, Accumulate>(tile_rows, depth, from, a_row, b, b_step, to, c_row);
      } else if (wide) {
        tile_block<1, 2, Accumulate>(tile_rows, depth, from, a_row, b, b_step, to, c_row);
      } else {
        tile_block<1, 1, Accumulate>(tile_rows, depth, from, a_row, b, b_step, to, c_row);
      }
    }
  }
}
#else
inline constexpr bool uses_tiles = false;
template <bool Accumulate>
inline void multiply_in_tiles(int64_t, int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, int64_t,
                              float*, int64_t) {}
#endif

}  // namespace cellops::CELLOPS_ISA
