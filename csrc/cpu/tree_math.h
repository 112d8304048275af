// How tree attention stores and multiplies tiles: in words of 32 bits. A word is a float, or a pair of bfloat16 where
// instructions multiply such pairs.
//
// product: c = a b or c += a b, with sums in fp32. The rows of a are stored one after the other. A word of b holds PACK
// rows of a column. `turn` transposes words, and `pack` turns rows into words of b. So, from rows x: x can be used as a
// and pack(x) as b; and for the transpose of x, turn(pack(x)) can be used as a and turn(x) as b.
#pragma once
#include <algorithm>

#include "product.h"
#ifdef FLASHPO_PAIRS
#include "product_pairs.h"
#endif

namespace flashpo::FLASHPO_ISA {

constexpr int64_t LANES = 16;  // rows in memory are padded to a multiple of so many words
constexpr int64_t CHAIN = 64;  // products that are summed in one chain; the rounding error grows with this number

// to (columns, rows) = from (rows, columns) transposed. Both sizes are multiples of LANES.
static inline void turn(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < columns; j += W) {
      vu block[W];
      for (int64_t r = 0; r < W; ++r) std::memcpy(&block[r], from + (i + r) * columns + j, sizeof(vu));
      transpose(block);
      for (int64_t r = 0; r < W; ++r) std::memcpy(to + (j + r) * rows + i, &block[r], sizeof(vu));
    }
  }
}

#ifndef FLASHPO_PAIRS
struct Math {
  static constexpr int64_t PACK = 1;
  static constexpr int64_t BLOCK = 1;  // `product` rounds rows and depth up to multiples of this
  struct Registers {};                 // must exist while products are computed

  // Load a row of `padded` words, with zeros after its `count` numbers.
  template <typename T>
  static void load_row(const T* from, int64_t count, int64_t padded, float* to) {
    int64_t j = 0;
    for (; j + W <= count; j += W) store(to + j, load(from + j));
    if (j < count) {
      store(to + j, load_part(from + j, static_cast<int>(count - j), 0.0f));
      j += W;
    }
    std::fill(to + std::min(j, padded), to + padded, 0.0f);
  }
  static void pack(const float* from, int64_t rows, int64_t words, float* to) {
    std::copy(from, from + rows * words, to);
  }
  // Store W numbers from column j: of a row, or of PACK rows, packed.
  static void put(float* row, int64_t j, vf x) { store(row + j, x); }
  static void put_packed(float* row, int64_t j, const vf (&x)[PACK]) { store(row + j, x[0]); }

  // Strides are in words.
  static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool add) {
    for (int64_t k = 0; k < depth; k += CHAIN, add = true)
      VectorProduct<float>(nullptr)(rows, columns, k, std::min(k + CHAIN, depth), a, a_stride, b, b_stride, c,
                                    c_stride, add, Ahead{});
  }
};
#else
struct Math {
  static constexpr int64_t PACK = 2;
  static constexpr int64_t BLOCK = 32;
  using Registers = TileRegisters;

  static void load_row(const bf16* from, int64_t count, int64_t padded, float* to) {
    bf16* const row = reinterpret_cast<bf16*>(to);
    std::copy(from, from + count, row);
    std::fill(row + count, row + PACK * padded, bf16{0});
  }
  static void pack(const float* from, int64_t rows, int64_t words, float* to) {
    for (int64_t i = 0; i < rows; i += 2, from += 2 * words, to += 2 * words) {
      for (int64_t j = 0; j < words; j += W) {
        const __m512i even = _mm512_loadu_si512(from + j), odd = _mm512_loadu_si512(from + words + j);
        store_interleaved(even, odd, to + 2 * j, to + 2 * j + W);
      }
    }
  }
  static void put(float* row, int64_t j, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<bf16*>(row) + j),
                        (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  static void put_packed(float* row, int64_t j, const vf (&x)[PACK]) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    _mm512_storeu_si512(row + j, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both));
  }

  static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool add) {
    const Pairs pairs{reinterpret_cast<const bf16*>(b), 2 * b_stride, 32, 32 * b_stride};
    multiply_pairs(rows, columns, (depth + 31) / 32, reinterpret_cast<const bf16*>(a), 2 * a_stride, pairs, c, c_stride,
                   add);
  }
};
#endif

}  // namespace flashpo::FLASHPO_ISA
