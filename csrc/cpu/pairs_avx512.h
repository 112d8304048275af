// The products of product_pairs.h with AVX512-BF16. One instruction adds the products of a pair to each of 16 sums.
#pragma once
#include "pairs.h"
#include "product.h"

namespace flashpo::FLASHPO_ISA {

struct TileRegisters {};  // only AMX has them

// c = a b or c += a b for R rows of a and GROUPS times 16 columns, with 32 columns of a at a time. Each element is one
// chain over the depth, whatever R and GROUPS are.
template <int R, int GROUPS, typename Fetches>
static inline void multiply_block(const bf16* a, int64_t a_stride, Pairs b, int64_t steps, float* c, int64_t c_stride,
                                  bool add, Fetches ahead) {
  vf sum[R][GROUPS] = {};
  if (add)
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < GROUPS; ++g) sum[r][g] = load(c + r * c_stride + 16 * g);
  for (int64_t i = 0; i < steps; ++i, a += 32, b.p += b.step) {
    const bf16* row = b.p;
#pragma GCC unroll 1  // unrolled 16 times, the addresses and sums of few rows would not fit the registers
    for (int k = 0; k < 32; k += 2, row += b.pair) {
      ahead.fetch();
      __m512bh right[GROUPS];
      for (int g = 0; g < GROUPS; ++g) right[g] = (__m512bh)_mm512_loadu_si512(row + g * b.group);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * a_stride + k, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
        for (int g = 0; g < GROUPS; ++g) sum[r][g] = (vf)_mm512_dpbf16_ps((__m512)sum[r][g], left, right[g]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < GROUPS; ++g) store(c + r * c_stride + 16 * g, sum[r][g]);
}

// The same for up to R rows.
template <int R, int GROUPS, typename Fetches>
static inline void multiply_rows(int64_t rows, const bf16* a, int64_t a_stride, Pairs b, int64_t steps, float* c,
                                 int64_t c_stride, bool add, Fetches ahead) {
  if (rows >= R)
    multiply_block<R, GROUPS>(a, a_stride, b, steps, c, c_stride, add, ahead);
  else if constexpr (R > 1)
    multiply_rows<R - 1, GROUPS>(rows, a, a_stride, b, steps, c, c_stride, add, ahead);
}

// The same for any number of rows, and of columns rounded up to a multiple of 32. The sums take 24 of 32 registers.
static inline void multiply_pairs(int64_t rows, int64_t columns, int64_t steps, const bf16* a, int64_t a_stride,
                                  Pairs b, float* c, int64_t c_stride, bool add) {
  const bf16* const first = b.p;
  for (int64_t j = 0; j < columns; j += 64) {
    b.p = first + j / 16 * b.group;
    if (columns - j > 32) {
      for (int64_t i = 0; i < rows; i += 6)
        multiply_rows<6, 4>(rows - i, a + i * a_stride, a_stride, b, steps, c + i * c_stride + j, c_stride, add,
                            Near{});
    } else {
      for (int64_t i = 0; i < rows; i += 12)
        multiply_rows<12, 2>(rows - i, a + i * a_stride, a_stride, b, steps, c + i * c_stride + j, c_stride, add,
                             Near{});
    }
  }
}

}  // namespace flashpo::FLASHPO_ISA
