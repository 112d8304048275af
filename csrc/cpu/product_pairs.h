// The products of product.h for bfloat16, whose instructions take the rows of b in pairs.
#pragma once
#include "../ops.h"
#ifdef FLASHPO_TILES
#include "pairs_amx.h"
#else
#include "pairs_avx512.h"
#endif
#include "product.h"

namespace flashpo::FLASHPO_ISA {

// The kernels for all other dtypes.
#ifdef FLASHPO_EMULATE
namespace without_pairs = flashpo::baseline;
#else
namespace without_pairs = flashpo::avx512;
#endif

// Interleave 32 columns of two rows into words, and store the words of 16 columns at each of the two places.
static inline void store_interleaved(__m512i even, __m512i odd, void* first, void* second) {
  alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, high, odd));
}

// Interleaves each tile of the cache into scratch before it is multiplied.
class PairProduct {
 public:
  using Operand = bf16;
  explicit PairProduct(float* scratch) : pairs_(reinterpret_cast<bf16*>(scratch)) {}

  // c has room for rows up to a multiple of 16 and columns up to one of 32. a is 0 from column `last` to a multiple of
  // 32.
  void operator()(int64_t rows, int64_t columns, int64_t first, int64_t last, const bf16* a, int64_t a_stride,
                  const bf16* b, int64_t b_stride, float* c, int64_t c_stride, bool add, Ahead ahead) {
    interleave(b, b_stride, first, last, columns, ahead);
    const Pairs pairs{pairs_, 32, 512, (columns + 31) / 32 * 1024};
    multiply_pairs(rows, columns, (last + 31) / 32, a, a_stride, pairs, c, c_stride, add);
  }

  static void operand(const bf16* from, int64_t count, bf16* to) {
    std::copy(from, from + count, to);
    std::fill(to + count, to + (count + 31) / 32 * 32, bf16{0});
  }

 private:
  // Store b's rows [first, last), and 0 for the others up to a multiple of 32, as tiles of 16 pairs of rows and 16
  // columns.
  void interleave(const bf16* b, int64_t b_stride, int64_t first, int64_t last, int64_t columns, Ahead ahead) {
    const int64_t depth = (last + 31) / 32 * 32, groups = (columns + 31) / 32;
    ahead.fetch_all_but(depth / 2 * groups);
    ahead = ahead.next(depth / 2 * groups, b);
    for (int64_t k = 0; k < depth; k += 2) {
      bf16* to = pairs_ + k / 32 * groups * 1024 + k % 32 / 2 * 32;
      for (int64_t j = 0; j < columns; j += 32, to += 1024) {
        const __mmask32 live = columns - j >= 32 ? ~0u : (1u << (columns - j)) - 1;
        const auto row = [&](int64_t i) {
          return _mm512_maskz_loadu_epi16(first <= i && i < last ? live : 0, b + i * b_stride + j);
        };
        ahead.fetch();
        store_interleaved(row(k), row(k + 1), to, to + 512);
      }
    }
  }

  bf16* pairs_;
  TileRegisters tiles_;
};

}  // namespace flashpo::FLASHPO_ISA
