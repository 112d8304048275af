// The products of product_pairs.h with AMX. One instruction computes 16 x 16 sums of 32 products each.
#pragma once
#include "pairs.h"

namespace flashpo::FLASHPO_ISA {

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

}  // namespace flashpo::FLASHPO_ISA
