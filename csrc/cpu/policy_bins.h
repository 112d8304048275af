// How many log-ratios are in each bin of policy_stats.py. A token's becomes a byte, its rank among half octaves, so
// that a block of tokens is a few vectors, which are compared with one edge after the other.
#pragma once
#include "../policy_table.h"
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

constexpr int64_t BLOCK = 60;  // vectors of tokens: 15 of bytes, whose counts fit into 4 bits

using vb = int8_t __attribute__((vector_size(4 * W)));
using vub = uint8_t __attribute__((vector_size(4 * W)));

// A float's exponent and first bit of mantissa, less those of the first edge: 1 there, and 0 or less below.
constexpr int HALF_OCTAVE = 22, BELOW_EDGES = (__builtin_bit_cast(int32_t, EDGES[0]) >> HALF_OCTAVE) - 1;
constexpr int8_t rank_of(float edge) {
  return static_cast<int8_t>((__builtin_bit_cast(int32_t, edge) >> HALF_OCTAVE) - BELOW_EDGES);
}
// With the sign of x; |x| is at most SATURATION.
static inline void store_ranks(int8_t* p, vf x) {
  const vi bits = (vi)x, sign = bits >> 31, rank = ((bits & 0x7fffffff) >> HALF_OCTAVE) - BELOW_EDGES;
  const vi signed_rank = ((rank > 0 ? rank : vi{}) ^ sign) - sign;
  const vi8 bytes = __builtin_convertvector(__builtin_convertvector(signed_rank, vi16), vi8);
  std::memcpy(p, &bytes, sizeof bytes);
}

static inline int bin_of(float log_w) {
  int beyond = 0;
  for (const float edge : EDGES) beyond += std::abs(log_w) >= edge;
  return EDGES_A_SIDE + (log_w < 0 ? -beyond : beyond);
}

class Bins {
 public:
  void add(const int8_t* ranks, int64_t vectors) {  // of a block; 0 behind the last, up to a vector of bytes
    vb magnitude[BLOCK / 4];
    vub one[BLOCK / 4];  // of the upper half byte where the rank is negative
    const int64_t n = (vectors + 3) / 4;
    for (int64_t i = 0; i < n; ++i) {
      vb rank;
      std::memcpy(&rank, ranks + i * sizeof rank, sizeof rank);
      const auto negative = rank < 0;
      magnitude[i] = negative ? -rank : rank;
      one[i] = negative ? vub{} + 16 : vub{} + 1;
    }
    for (int e = 0; e < EDGES_A_SIDE; ++e) {
      vub both{};
      for (int64_t i = 0; i < n; ++i) both = magnitude[i] >= rank_of(EDGES[e]) ? both + one[i] : both;
      above_[e] += both & 15;
      below_[e] += (vub)((vu)both >> 4) & 15;
    }
    if (++blocks_ == 255 / 15) flush();
  }

  // The bins of `ratios` log-ratios, of which those that were not added are in the middle.
  void finish(double ratios, double* bins) {
    flush();
    bins[EDGES_A_SIDE] = ratios - beyond_[0][0] - beyond_[1][0];
    for (int e = 0; e < EDGES_A_SIDE; ++e)
      for (int side = 0; side < 2; ++side)
        bins[EDGES_A_SIDE + (side == 0 ? -1 - e : 1 + e)] = beyond_[side][e] - beyond_[side][e + 1];
  }

 private:
  void flush() {
    for (int e = 0; e < EDGES_A_SIDE; ++e) {
      beyond_[0][e] += sum(below_[e]);
      beyond_[1][e] += sum(above_[e]);
      below_[e] = above_[e] = vub{};
    }
    blocks_ = 0;
  }
  static int32_t sum(vub bytes) {
    const vi pairs = ((vi)bytes & 0x00ff00ff) + (((vi)bytes >> 8) & 0x00ff00ff);
    const vi fours = (pairs & 0xffff) + (pairs >> 16);
    int32_t sum = 0;
    for (int i = 0; i < W; ++i) sum += fours[i];
    return sum;
  }

  vub below_[EDGES_A_SIDE] = {}, above_[EDGES_A_SIDE] = {};  // of the blocks since the last flush
  int blocks_ = 0;
  double beyond_[2][EDGES_A_SIDE + 1] = {};  // log w <= -edge, log w >= edge
};

}  // namespace flashpo::FLASHPO_ISA
