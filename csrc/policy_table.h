// The names of a LossSpec's choices, of its numbers and of its statistics in C++. Their order is that of the numbers in
// a spec and in its statistics. Python compares them with its own when it loads the extension
// (flashpo/ops/policy_loss.py).
#pragma once
#include <iterator>

namespace flashpo {

#define FLASHPO_NAMES(Type, ...)  \
  enum class Type { __VA_ARGS__ }; \
  constexpr const char* names_of(Type) { return #__VA_ARGS__; }

FLASHPO_NAMES(Ratio, token, sequence, sequence_token, sequence_sum)
FLASHPO_NAMES(Surrogate, clip, cispo, sapo, vespo, gmpo, dppo_tv, dppo_kl, reinforce)
FLASHPO_NAMES(Kl, k1, abs, k2, k3, k1_plus, abs_plus, k3_plus)
FLASHPO_NAMES(Importance, none, token_truncate, token_mask, sequence_truncate, sequence_mask, geometric_mask)
FLASHPO_NAMES(Aggregation, token_mean, token_sum, sequence_mean, sequence_sum, fixed_length, local_token_mean)
FLASHPO_NAMES(Empty, zero, excluded, surrogate)
FLASHPO_NAMES(EntropyMean, tokens, loss)

// The numbers of a spec: choices as their numbers, None as NaN, tuples one element after the other.
FLASHPO_NAMES(Number, ratio, surrogate, clip_low, clip_high, ratio_cap, dual_clip, log_ratio_min, log_ratio_max,
              sapo_temperatures_0, sapo_temperatures_1, vespo_gamma_0_0, vespo_gamma_0_1, vespo_gamma_1_0,
              vespo_gamma_1_1, kl_coef, kl, kl_ratio_correction, kl_log_clamp, kl_clamp, importance, importance_min,
              importance_max, off_policy_threshold, top_entropy, aggregation, max_length, empty_sequences,
              entropy_coef, entropy_mean)
constexpr int NUMBERS = static_cast<int>(Number::entropy_mean) + 1;

// The edges of the bins in which log-ratios are counted; their negatives are edges, too.
constexpr float EDGES[] = {1 / 1024.f, 1 / 256.f, 1 / 64.f, 1 / 32.f,  1.5f / 32, 1 / 16.f,
                           1.5f / 16,  1 / 8.f,   1.5f / 8, 1 / 4.f,   1 / 2.f,   2};
constexpr int EDGES_A_SIDE = std::size(EDGES), BINS = 2 * EDGES_A_SIDE + 1;

#undef FLASHPO_NAMES
#define FLASHPO_SUMS                                                                                              \
  LOSS, POLICY_LOSS, TOKENS, SEQUENCES, LIVE_SEQUENCES, ENTROPY, KL, APPROX_KL, RATIOS, RATIO, RATIO_SQUARED,     \
      CLIP_LOW, CLIP_HIGH, BELOW, ABOVE, CAPPED, SATURATED, WEIGHTS, WEIGHT, WEIGHT_SQUARED, OFF_POLICY_SEQUENCES, \
      HIGH_ENTROPY_TOKENS, HIGH_ENTROPY, PHIS, PHI
#define FLASHPO_EXTREMES RATIO_MIN, RATIO_MAX, CLIP_LOW_MIN, CLIP_HIGH_MAX, WEIGHT_MIN, WEIGHT_MAX
#define FLASHPO_TEXT(...) #__VA_ARGS__
#define FLASHPO_TEXT_OF(...) FLASHPO_TEXT(__VA_ARGS__)
namespace stat {  // the statistics: sums, of which the bins' counts are the last, then extremes
enum { FLASHPO_SUMS, LOG_RATIO_BINS, BEHIND_BINS = LOG_RATIO_BINS + BINS - 1, FLASHPO_EXTREMES, STATS };
constexpr const char *SUM_NAMES = FLASHPO_TEXT_OF(FLASHPO_SUMS), *EXTREME_NAMES = FLASHPO_TEXT_OF(FLASHPO_EXTREMES);
}  // namespace stat
#undef FLASHPO_SUMS
#undef FLASHPO_EXTREMES
#undef FLASHPO_TEXT
#undef FLASHPO_TEXT_OF

}  // namespace flashpo
