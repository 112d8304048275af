// The products of product.h for bfloat16 with AMX. One instruction computes 16 x 16 sums of 32 products each; it takes
// the rows of b in pairs.
#pragma once
#ifdef FLASHPO_EMULATE_AMX
#include "amx_emulated.h"
#else
#include <immintrin.h>
#endif

#include "../ops.h"
#include "product.h"

namespace flashpo::FLASHPO_ISA {

// The kernels for all other dtypes.
#ifdef FLASHPO_EMULATE_AMX
namespace without_tiles = flashpo::baseline;
#else
namespace without_tiles = flashpo::avx512;
#endif

// Configures the tile registers while it exists: 0 to 3 are for sums, 4 and 5 for rows of a, 6 and 7 for 16 pairs of
// rows of b. Tiles 0, 1 and 4 have `upper` rows, tiles 2, 3 and 5 have `lower` rows.
class TileRegisters {
 public:
  TileRegisters() { use(16, 16); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;

  void use(int64_t upper, int64_t lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(i >= 6 ? 16 : i < 2 || i == 4 ? upper : lower);
      config.row_bytes[i] = config.rows[i] > 0 ? 64 : 0;
    }
    _tile_loadconfig(&config);
  }

 private:
  int64_t upper_ = 0, lower_ = 0;
};

// b with its rows in pairs. The strides, in numbers, lead to the next pair, the next 16 columns and the next 32 rows.
struct Pairs {
  const bf16* p;
  int64_t pair, group, step;
};

// c = a b or c += a b for 16 rows of a and `GROUPS` tiles of 16 columns, with 32 columns of a at a time.
template <int GROUPS>
static inline void multiply_tiles(const bf16* a, int64_t a_stride, Pairs b, int64_t steps, float* c, int64_t c_stride,
                                  bool add) {
  const int64_t c_bytes = c_stride * sizeof(float), b_bytes = b.pair * sizeof(bf16);
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (GROUPS == 4) {
      _tile_loadd(2, c + 32, c_bytes);
      _tile_loadd(3, c + 48, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (GROUPS == 4) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t i = 0; i < steps; ++i, a += 32, b.p += b.step) {
    _tile_loadd(4, a, a_stride * sizeof(bf16));
    _tile_loadd(5, b.p, b_bytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b.p + b.group, b_bytes);
    _tile_dpbf16ps(1, 4, 6);
    if constexpr (GROUPS == 4) {
      _tile_loadd(5, b.p + 2 * b.group, b_bytes);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, b.p + 3 * b.group, b_bytes);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (GROUPS == 4) {
    _tile_stored(2, c + 32, c_bytes);
    _tile_stored(3, c + 48, c_bytes);
  }
}

// The same for any number of rows and columns, rounded up to a multiple of 16 and of 32; c has room for them.
static inline void multiply_pairs(int64_t rows, int64_t columns, int64_t steps, const bf16* a, int64_t a_stride,
                                  Pairs b, float* c, int64_t c_stride, bool add) {
  const bf16* const first = b.p;
  for (int64_t i = 0; i < rows; i += 16, a += 16 * a_stride, c += 16 * c_stride) {
    for (int64_t j = 0; j < columns; j += 64) {
      b.p = first + j / 16 * b.group;
      columns - j > 32 ? multiply_tiles<4>(a, a_stride, b, steps, c + j, c_stride, add)
                       : multiply_tiles<2>(a, a_stride, b, steps, c + j, c_stride, add);
    }
  }
}

// Interleave 32 columns of two rows into words, and store the words of 16 columns at each of the two places.
static inline void store_interleaved(__m512i even, __m512i odd, void* first, void* second) {
  alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, high, odd));
}

// Interleaves each tile of the cache into scratch before it is multiplied.
class AmxProduct {
 public:
  using Operand = bf16;
  explicit AmxProduct(float* scratch) : pairs_(reinterpret_cast<bf16*>(scratch)) {}

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
