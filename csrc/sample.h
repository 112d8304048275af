// sample for a CPU thread and for a block of CUDA threads: how a token is sampled from a row of logits.
//
// Every filter keeps a prefix of the row's total order (larger logits first, then smaller ids): all logits above a
// threshold and, of those equal to it, the ones with an id below a limit. A threshold is found without sorting, by
// narrowing an interval of floats, read as integers of the same order, until only the searched one remains. The passes
// over the logits are functions of the Row; it sums weights 2^((x - top) unit) in chunks of the vocabulary.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLASHPO_TEAM __device__
#else
#define FLASHPO_TEAM
#endif

namespace flashpo::sampling {

struct Problem {
  int64_t rows, vocab, stride;             // stride: of the logits, in elements
  const float* temperature;                // (rows), like all that follow
  const int64_t* top_k;                    // nullptr: 0, which keeps all
  const float *top_p, *min_p;              // nullptr: 1 and 0
  const int64_t *seed, *offset;
  int64_t* token;
  float* numbers;                          // (3, rows): logprob, logprob_full, kept_mass
};

// Each instruction set must have its own copy, so this is not shared between them.
namespace {

constexpr float LOG2E_OF_1 = 1.44269504088896341f;
constexpr float LOWEST_BITS = -127.0f;  // weights below 2^-126 are 0

struct Weight {
  double mass;  // of some logits; if they are counted, this is their count as well
  int64_t count;
};
struct All {};
struct Kept {
  float threshold;
  int64_t limit;
};
struct Ties {
  float value;
};
struct Drawn {
  int64_t token;
  float logprob, logprob_full, kept_mass;
};

constexpr const char* TEMPERATURE = "temperature must be 0 or a normal positive number";
constexpr const char* TOP_K = "top_k must not be negative";
constexpr const char* TOP_P = "top_p must be in [0, 1]";
constexpr const char* MIN_P = "min_p must be in [0, 1]";

FLASHPO_TEAM inline bool fine_temperature(float x) { return x == 0 || (x >= FLT_MIN && x <= FLT_MAX); }
FLASHPO_TEAM inline bool is_share(float x) { return x >= 0 && x <= 1; }

FLASHPO_TEAM inline Kept both(Kept a, Kept b) {
  if (a.threshold != b.threshold) return a.threshold > b.threshold ? a : b;
  return a.limit < b.limit ? a : b;
}

// Floats as integers of the same order. Bits that a 16-bit format does not have are shifted out.
FLASHPO_TEAM inline int64_t ordered(float x, int shift) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits >> 31 ? ~bits : bits | 0x80000000u) >> shift;
}
FLASHPO_TEAM inline float unordered(int64_t key, int shift) {
  const uint32_t high = static_cast<uint32_t>(key) << shift, low = (1u << shift) - 1;
  const uint32_t bits = high >> 31 ? high & 0x7fffffffu : ~(high | low);
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A number in [0, 1) from 53 bits of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
FLASHPO_TEAM inline double uniform(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c0} << 32 | c1) >> 11) * 0x1p-53;
}

// The shortest prefix of the total order that weighs at least `wanted`. COUNTED: each logit weighs 1, otherwise its
// probability. Everything is kept if the last logit of that prefix would be below `lowest`.
template <bool COUNTED, typename Row>
FLASHPO_TEAM Kept first(Row& row, double wanted, float lowest) {
  const Kept everything{-INFINITY, row.size};
  const int shift = Row::SHIFT;
  int64_t low = ordered(lowest < -FLT_MAX ? -FLT_MAX : lowest, shift) - 1, high = ordered(row.top, shift) + 1;
  Weight at_low{0, row.size}, at_high{0, 0};  // of all logits >= low, which weigh at least `wanted`, and of all >= high
  bool found = false;                         // whether `low` was found by a pass
  row.unfocus();
  for (int pass = 0; high - low > 1 && at_low.count - at_high.count > 1; ++pass) {
    // Evenly spaced between the two values, which suits logits, or the two keys, which bounds the number of passes.
    const float from = unordered(low, shift), to = unordered(high, shift);
    constexpr int N = Row::PIVOTS;  // pivots per pass over the logits
    int64_t keys[N];
    float pivots[N];
    for (int i = 0; i < N; ++i) {
      const float share = static_cast<float>(i + 1) / (N + 1);
      const int64_t by_value = ordered(from * (1 - share) + to * share, shift);
      const int64_t by_key = low + (high - low) * (i + 1) / (N + 1);
      keys[i] = pass % 2 ? by_key : by_value;
      keys[i] = keys[i] <= low ? low + 1 : keys[i] >= high ? high - 1 : keys[i];
      pivots[i] = unordered(keys[i], shift);
    }
    Weight weights[N];
    row.template weigh<COUNTED>(pivots, weights);
    for (int i = 0; i < N; ++i) {
      if (weights[i].mass < wanted) {
        high = keys[i], at_high = weights[i];
        break;
      }
      low = keys[i], at_low = weights[i], found = true;
    }
    row.focus(unordered(low, shift), unordered(high, shift), at_high, at_low.count - at_high.count);
  }
  if (!found) return everything;
  const float threshold = unordered(low, shift);
  const int64_t inside = at_low.count - at_high.count;
  const double ties = ceil((wanted - at_high.mass) / (COUNTED ? 1.0 : static_cast<double>(row.weight(threshold))));
  if (high - low > 1 || ties >= inside) return {threshold, row.size};
  row.sums(Ties{threshold});
  return {threshold, row.locate(Ties{threshold}, (ties < 1 ? 1 : ties) - 0.5) + 1};
}

template <typename Row>
FLASHPO_TEAM Drawn draw(Row& row, const Problem& p, int64_t r) {
  const bool greedy = p.temperature[r] == 0;
  const float temperature = greedy ? 1 : p.temperature[r];
  const int64_t top_k = p.top_k != nullptr && p.top_k[r] < row.size ? p.top_k[r] : 0;
  const double top_p = p.top_p != nullptr ? p.top_p[r] : 1;
  const float min_p = p.min_p != nullptr ? p.min_p[r] : 0;
  row.unit = LOG2E_OF_1 / temperature;
  const double all = row.begin();
  if (!(all > 0)) return {0, NAN, NAN, NAN};
  double mass = all;
  Kept kept{-INFINITY, row.size};
  if (greedy) {
    row.sums(Ties{row.top});
    kept = {row.top, row.locate(Ties{row.top}, 0.5) + 1};
  } else {
    if (top_k > 0) kept = first<true>(row, static_cast<double>(top_k), row.top + LOWEST_BITS / row.unit);
    if (top_p < 1) {
      if (top_k > 0) mass = row.sums(kept);
      // Logits that each weigh less than mass (1 - top_p) / count can be ignored together; half of it is on the safe
      // side.
      const double count = static_cast<double>(top_k > 0 ? top_k : row.size);
      const float bits = log2f(static_cast<float>(mass * (1 - top_p) / count)) - 1;
      const float lowest = row.top + (bits > LOWEST_BITS ? bits : LOWEST_BITS) / row.unit;
      kept = both(kept, first<false>(row, top_p * mass, lowest > kept.threshold ? lowest : kept.threshold));
    }
    if (min_p > 0) kept = both(kept, {row.top + log2f(min_p) / row.unit, row.size});
  }
  if (kept.threshold > -INFINITY) mass = row.sums(kept);
  const int64_t token = row.locate(kept, greedy ? 0 : uniform(p.seed[r], p.offset[r]) * mass);
  // Each from its own sum: then the log-prob of the only kept logit is 0, even if its probability is one in a million.
  const float z = (row.at(token) - row.top) / temperature;
  const float logprob = greedy ? 0 : z - logf(static_cast<float>(mass));
  return {token, logprob, z - logf(static_cast<float>(all)), static_cast<float>(mass / all)};
}

}  // namespace
}  // namespace flashpo::sampling
