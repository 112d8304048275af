// Counts of the log-ratios in each bin of policy_stats.py. Each token becomes a byte, the rank of its log-ratio among
// half octaves. A block of tokens is then a few vectors, which are compared with one edge after the other.
#pragma once
#include "../policy_table.h"
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

constexpr int64_t BLOCK = 60;  // vectors of tokens; these are 15 vectors of bytes, whose counts fit into 4 bits

using vb = int8_t __attribute__((vector_size(4 * W)));
using vub = uint8_t __attribute__((vector_size(4 * W)));

// The rank is the float's exponent with the first bit of its mantissa, counted so that the first edge has rank 1.
constexpr int HALF_OCTAVE = 22, BELOW_EDGES = (__builtin_bit_cast(int32_t, EDGES[0]) >> HALF_OCTAVE) - 1;
constexpr int8_t rank_of(float edge) {
  return static_cast<int8_t>((__builtin_bit_cast(int32_t, edge) >> HALF_OCTAVE) - BELOW_EDGES);
}
// The rank with the sign of x, where |x| is at most SATURATION; 0 below the first edge.
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
  // Add a block; the ranks are followed by zeros up to a whole vector of bytes
  void add(const int8_t* ranks, int64_t vectors) {
    vb magnitude[BLOCK / 4];
    vub one[BLOCK / 4];  // in the upper half of the byte if the rank is negative
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

  // The bins of `ratios` log-ratios. Those that were not added are in the middle bin.
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
  double beyond_[2][EDGES_A_SIDE + 1] = {};  // for each edge, the number with log w <= -edge, and with log w >= edge
};

}  // namespace flashpo::FLASHPO_ISA
