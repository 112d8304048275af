// The AMX and AVX-512 instructions used for products of bfloat16, in plain C++ and with their own names, so that the
// same kernels run and are tested on any processor. Only builds with FLASHPO_EMULATE use it.
//
// They follow Intel's manual (Software Developer's Manual, volume 2). Products of bfloat16 read subnormal numbers as 0,
// are summed in two chains of fp32 (one for the even and one for the odd elements of the pairs), round to nearest even,
// and flush subnormal results to 0. Using a tile that is not configured or does not fit ends the process, as on the
// processor.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace flashpo::FLASHPO_ISA {

struct EmulatedTiles {
  struct Tile {
    int rows = 0, bytes = 0;  // as configured; 0 means not usable
    uint8_t data[16][64] = {};
  };
  Tile tiles[8];

  Tile& operator[](int i) {
    if (tiles[i].rows == 0) fault("a tile is used that is not configured");
    return tiles[i];
  }
  [[noreturn]] static void fault(const char* what) {
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
  }
};
static inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

static inline void _tile_release() { emulated_tiles() = {}; }

static inline void _tile_loadconfig(const void* config) {
  const auto* const bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1 || bytes[1] != 0) EmulatedTiles::fault("palette 1 and row 0 are the only ones here");
  EmulatedTiles& to = emulated_tiles() = {};
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0)) EmulatedTiles::fault("no such tile");
    to.tiles[i].rows = rows;
    to.tiles[i].bytes = row_bytes;
  }
}

static inline void _tile_zero(int i) { std::memset(emulated_tiles()[i].data, 0, sizeof(EmulatedTiles::Tile::data)); }

static inline void _tile_loadd(int i, const void* from, int64_t stride) {
  auto& tile = emulated_tiles()[i];
  std::memset(tile.data, 0, sizeof tile.data);
  const char* row = static_cast<const char*>(from);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(tile.data[r], row + r * stride, tile.bytes);
}

static inline void _tile_stored(int i, void* to, int64_t stride) {
  const auto& tile = emulated_tiles()[i];
  for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], tile.bytes);
}

static inline float without_subnormals(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

static inline float number_of_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return without_subnormals(x);
}

static inline void _tile_dpbf16ps(int c, int a, int b) {
  auto &to = emulated_tiles()[c], &left = emulated_tiles()[a], &right = emulated_tiles()[b];
  if (left.rows < to.rows || right.bytes < to.bytes || right.rows < left.bytes / 4)
    EmulatedTiles::fault("the tiles of a product do not fit");
  const int columns = to.bytes / 4, pairs = left.bytes / 4;
  const auto number = [](const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    return number_of_bf16(half);
  };
  float wide[16][32];  // the right tile as floats, with both elements of a pair next to each other
  for (int k = 0; k < pairs; ++k)
    for (int j = 0; j < 2 * columns; ++j) wide[k][j] = number(right.data[k] + 2 * j);
  for (int r = 0; r < to.rows; ++r) {
    float sums[32] = {};
    for (int k = 0; k < pairs; ++k) {
      const float x[2] = {number(left.data[r] + 4 * k), number(left.data[r] + 4 * k + 2)};
      for (int j = 0; j < 2 * columns; ++j) sums[j] = without_subnormals(sums[j] + x[j % 2] * wide[k][j]);
    }
    for (int j = 0; j < columns; ++j) {
      float total;
      std::memcpy(&total, to.data[r] + 4 * j, sizeof total);
      total = without_subnormals(without_subnormals(total) + without_subnormals(sums[2 * j] + sums[2 * j + 1]));
      std::memcpy(to.data[r] + 4 * j, &total, sizeof total);
    }
  }
}

// The AVX-512 instructions that are used along with them, or in their place.
using __m512i = uint16_t __attribute__((vector_size(64)));
using __m512 = vf;
using __mmask32 = uint32_t;

static inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline __m512i _mm512_load_si512(const void* p) { return _mm512_loadu_si512(p); }
static inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
static inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  __m512i x{};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      uint16_t lane;
      std::memcpy(&lane, static_cast<const char*>(p) + 2 * i, sizeof lane);
      x[i] = lane;
    }
  return x;
}
static inline __m512i _mm512_set1_epi16(int16_t x) { return static_cast<uint16_t>(x) - __m512i{}; }
static inline __m512i _mm512_add_epi16(__m512i a, __m512i b) { return a + b; }
static inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i order, __m512i b) {
  return __builtin_shuffle(a, b, order);
}
static inline __m512i _mm512_permutexvar_epi16(__m512i order, __m512i x) { return __builtin_shuffle(x, order); }

static inline __m512i _mm512_set1_epi32(int32_t x) {
  __m512i y;
  for (int i = 0; i < 16; ++i) std::memcpy(reinterpret_cast<char*>(&y) + 4 * i, &x, sizeof x);
  return y;
}
// Unlike in AMX, the odd element of a pair is added to the sum first, and then the even one.
using __m512bh = __m512i;
static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i)
    for (int j = 1; j >= 0; --j)
      sum[i] = without_subnormals(without_subnormals(sum[i]) +
                                  number_of_bf16(a[2 * i + j]) * number_of_bf16(b[2 * i + j]));
  return sum;
}

static inline uint16_t rounded_to_bf16(float x) {
  x = without_subnormals(x);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline vu16 _mm512_cvtneps_pbh(__m512 x) {
  vu16 y;
  for (int i = 0; i < 16; ++i) y[i] = rounded_to_bf16(x[i]);
  return y;
}
static inline __m512i _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
  __m512i y;
  for (int i = 0; i < 16; ++i) {
    y[i] = rounded_to_bf16(lower[i]);
    y[16 + i] = rounded_to_bf16(upper[i]);
  }
  return y;
}
using __m256i = vu16;
static inline void _mm256_storeu_si256(__m256i* p, __m256i x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }

}  // namespace flashpo::FLASHPO_ISA
