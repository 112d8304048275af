// The terms of `policy_loss` for W tokens of one sequence. Names and formulas are those of
// python/flashpo/ops/_policy_loss_reference.py.
#pragma once
#include <algorithm>
#include <limits>

#include "../ops.h"
#include "../policy_table.h"
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

constexpr float SATURATION = 64.0f;
const double VESPO_LOG_MIN = std::log(1e-8), VESPO_LOG_MAX = 20.0;

// A LossSpec, read from numbers.
struct Spec {
  Ratio ratio;
  Surrogate surrogate;
  float lowest, highest, clip_low, clip_high, ratio_cap, dual_clip, log_ratio_min, log_ratio_max;
  float sapo_positive, sapo_other;
  double vespo_gamma[2][2];  // k and lambda, for A >= 0 and for A < 0
  float kl_coef;
  Kl kl;
  bool kl_ratio_correction;
  float kl_log_clamp, kl_clamp;
  Importance importance;
  float importance_min, importance_max;
  bool off_policy;
  double off_policy_threshold;
  Aggregation aggregation;
  double max_length;
  Empty empty_sequences;
  double entropy_coef;
  EntropyMean entropy_mean;

  explicit Spec(const double* numbers) {
    const auto at = [&](Number name) { return numbers[static_cast<int>(name)]; };
    const auto choice = [&](Number name, auto& field) { field = static_cast<std::decay_t<decltype(field)>>(at(name)); };
    const auto number = [&](Number name, auto& field, double none = 0) {
      field = static_cast<std::decay_t<decltype(field)>>(std::isnan(at(name)) ? none : at(name));
    };
    const double inf = std::numeric_limits<double>::infinity();
    choice(Number::ratio, ratio);
    choice(Number::surrogate, surrogate);
    const double low = at(Number::clip_low), high = at(Number::clip_high);
    lowest = static_cast<float>(std::isnan(low) ? -inf : 1 - low);
    highest = static_cast<float>(std::isnan(high) ? inf : 1 + high);
    number(Number::clip_low, clip_low, inf);
    number(Number::clip_high, clip_high, inf);
    number(Number::ratio_cap, ratio_cap, inf);
    number(Number::dual_clip, dual_clip, inf);
    number(Number::log_ratio_min, log_ratio_min, -inf);
    number(Number::log_ratio_max, log_ratio_max, inf);
    number(Number::sapo_temperatures_0, sapo_positive);
    number(Number::sapo_temperatures_1, sapo_other);
    number(Number::vespo_gamma_0_0, vespo_gamma[0][0]);
    number(Number::vespo_gamma_0_1, vespo_gamma[0][1]);
    number(Number::vespo_gamma_1_0, vespo_gamma[1][0]);
    number(Number::vespo_gamma_1_1, vespo_gamma[1][1]);
    number(Number::kl_coef, kl_coef);
    choice(Number::kl, kl);
    choice(Number::kl_ratio_correction, kl_ratio_correction);
    number(Number::kl_log_clamp, kl_log_clamp, inf);
    number(Number::kl_clamp, kl_clamp, inf);
    choice(Number::importance, importance);
    number(Number::importance_min, importance_min, -inf);
    number(Number::importance_max, importance_max, inf);
    off_policy = !std::isnan(at(Number::off_policy_threshold));
    number(Number::off_policy_threshold, off_policy_threshold);
    choice(Number::aggregation, aggregation);  // the threshold for top_entropy is an argument
    number(Number::max_length, max_length);
    choice(Number::empty_sequences, empty_sequences);
    number(Number::entropy_coef, entropy_coef);
    choice(Number::entropy_mean, entropy_mean);
  }

  bool of_tokens() const { return ratio == Ratio::token; }
  // Whether d loss / d log w goes only to the token itself, not to all tokens of its sequence.
  bool chain_of_tokens() const { return of_tokens() || ratio == Ratio::sequence_token; }
  bool weight_of_sequences() const {
    return importance == Importance::sequence_truncate || importance == Importance::sequence_mask;
  }
};

enum Input { LOGPROB, OLD, ADVANTAGE, REF, ROLLOUT, IMPORTANCE_RATIO, ENTROPY, INPUTS };
enum Output { D_LOGPROB, D_ENTROPY, OUTPUTS };

// The tokens of one sequence. What is not given is nullptr.
struct Tokens {
  const float* in[INPUTS];
  const char* mask;
  int mask_bytes;  // bytes of an element
  float* out[OUTPUTS];

  vi live(int64_t i) const {
    switch (mask_bytes) {
      case 1: return load_int(reinterpret_cast<const int8_t*>(mask) + i) != 0;
      case 4: return load_int(reinterpret_cast<const int32_t*>(mask) + i) != 0;
      default: return load_int(reinterpret_cast<const int64_t*>(mask) + i) != 0;
    }
  }
  // A masked token may hold anything, so it is replaced by 0.
  vf load_live(Input input, int64_t i, vi m) const { return m ? load(in[input] + i) : vf{}; }
};

// What is known about a sequence before its tokens' terms are computed.
struct Sequence {
  int64_t tokens = 0, kept = 0;  // numbers of live tokens, and of those with high entropy
  int64_t end = 0;               // from here on there is only padding
  float advantage = 0;           // if it is one for the sequence
  float log_w = 0, w = 1;        // if the ratio is one for the sequence; clamped
  bool free = true, saturated = false;  // whether no clamp holds log w; whether it is beyond SATURATION
  bool weighted = false;         // by importance
  float rho = 1;                 // if it is one for the sequence
  bool within = true;            // whether the geometric mean is within the bounds
  bool off_policy = false;       // whether the sequence is dropped if A < 0
  float phi[2] = {};             // for vespo: for A >= 0 and for A < 0
};

static inline vf clamp(vf x, float low, float high) {
  x = at_least(x, low);
  return splat(high) < x ? splat(high) : x;
}
static inline vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
static inline vf finite_or_0(vf x) {  // torch.nan_to_num(x, nan=0)
  constexpr float largest = std::numeric_limits<float>::max();
  return x == x ? clamp(x, -largest, largest) : vf{};
}

// e^x - x - 1. For small x a polynomial is used, because the plain form would cancel. The exponential takes x <=
// SATURATION.
static inline vf exp_beyond_linear(vf x) {
  vf p = splat(2.7557319e-6f) * x + 2.4801587e-5f;
  p = p * x + 1.9841270e-4f;
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x + 0.5f;
  return abs(x) < splat(0.5f) ? p * x * x : exp_normal(clamp(x, -87.0f, SATURATION)) - x - 1.0f;
}

// The logarithm of each token's importance weight before bounds, and the weight.
static inline vf log_rho(const Tokens& t, int64_t i, vi m, vf old) {
  return finite_or_0(old - t.load_live(ROLLOUT, i, m));
}
static inline vf rho(const Spec& s, const Sequence& q, const Tokens& t, int64_t i, vi m, vf old) {
  if (t.in[IMPORTANCE_RATIO]) return t.load_live(IMPORTANCE_RATIO, i, m);
  if (s.importance == Importance::none || s.weight_of_sequences()) return splat(q.rho);
  const vf r = exp(log_rho(t, i, m, old));
  if (s.importance == Importance::geometric_mask) return q.within ? r : vf{};
  if (s.importance == Importance::token_truncate) return clamp(r, s.importance_min, s.importance_max);
  return (r >= s.importance_min) & (r <= s.importance_max) ? r : vf{};
}

// gmpo: d, clamped on the side on which A gains.
static inline vf gain(const Spec& s, vf d, vf adv) {
  return adv > 0.0f ? min(d, splat(s.clip_high)) : at_least(d, -s.clip_low);
}

struct Loss {
  vf x{}, by_log_w{}, by_logp{};  // of a token; its derivative by log w, and apart from that by log pi
  vi below{}, above{}, capped{};
};

// adv decides between cases. `a` is adv times the token's weight, and 0 for a token without a loss.
template <Surrogate S>
static inline Loss loss_of(const Spec& s, const Sequence& q, vf logp, vf old, vf d, vf w, vf adv, vf a) {
  Loss loss;
  if constexpr (S == Surrogate::clip) {
    const vf w_clipped = clamp(w, s.lowest, s.highest);
    const vf two = w_clipped * -a;
    if (s.ratio_cap == INFINITY) {
      const vf one = w * -a;
      loss.x = max(one, two);
      loss.by_log_w = one >= two ? one : vf{};
      loss.below = w < s.lowest;
      loss.above = w > s.highest;
    } else {
      const vf w_capped = min(w, splat(s.ratio_cap)), one = w_capped * -a;
      loss.capped = w > s.ratio_cap;
      loss.below = w_capped < s.lowest;
      loss.above = w_capped > s.highest;
      loss.x = max(one, two);
      loss.by_log_w = (one >= two ? ~loss.capped : w == w_clipped) ? w * -a : vf{};
    }
    if (s.dual_clip < INFINITY) {
      const vi dual = (adv < 0.0f) & (max(min(w, splat(s.ratio_cap)), w_clipped) > s.dual_clip);
      loss.x = dual ? -s.dual_clip * a : loss.x;
      loss.by_log_w = dual ? vf{} : loss.by_log_w;
      loss.capped |= dual;
    }
  } else if constexpr (S == Surrogate::sapo) {
    const vf t = adv > 0.0f ? splat(s.sapo_positive) : splat(s.sapo_other);
    const vf e = exp(min(t - t * w, splat(80.0f)));
    const vf gate = 1.0f / (1.0f + e);
    const vf steepest = -4.0f * gate * a;
    loss.x = steepest / t;
    loss.by_log_w = steepest * (e * gate) * w;
  } else if constexpr (S == Surrogate::gmpo) {
    loss.x = loss.by_log_w = w * -a;
    loss.below = d < -s.clip_low;
    loss.above = d > s.clip_high;
  } else {
    if constexpr (S == Surrogate::cispo) {
      loss.by_logp = clamp(w, s.lowest, s.highest) * -a;
      loss.below = w < s.lowest;
      loss.above = w > s.highest;
    } else if constexpr (S == Surrogate::vespo) {
      loss.by_logp = (adv >= 0.0f ? splat(q.phi[0]) : splat(q.phi[1])) * -a;
    } else if constexpr (S == Surrogate::reinforce) {
      loss.by_logp = -a;
    } else {
      const vf p = exp(logp), q_old = exp(old);
      if constexpr (S == Surrogate::dppo_tv) {
        loss.above = p - q_old > s.clip_high;
        loss.below = p - q_old < -s.clip_low;
      } else {
        const vf kl =
            q_old * (old - logp) + (1.0f - q_old) * log((1.0f - q_old + 1e-8f) / (1.0f - p + 1e-8f));
        loss.above = (kl > s.clip_high) & (p > q_old);
        loss.below = (kl > s.clip_low) & (p < q_old);
      }
      const vi keep = ~(adv > 0.0f ? loss.above : loss.below);
      loss.capped = (w > s.ratio_cap) & keep;
      loss.by_logp = keep ? min(w, splat(s.ratio_cap)) * -a : vf{};
    }
    loss.x = loss.by_logp * logp;
  }
  return loss;
}

struct KlTerm {
  vf value, slope;  // slope: the derivative by log pi
};
static inline KlTerm kl_of(const Spec& s, vf delta) {  // delta: log ref - log pi
  KlTerm kl;
  switch (s.kl) {
    case Kl::k1:
    case Kl::k1_plus: kl = {-delta, splat(1.0f)}; break;
    case Kl::abs:
    case Kl::abs_plus:
      kl = {abs(delta), delta > 0.0f ? splat(-1.0f) : delta < 0.0f ? splat(1.0f) : vf{}};
      break;
    case Kl::k2: kl = {delta * delta * 0.5f, -delta}; break;
    default: {
      const vf held = clamp(delta, -s.kl_log_clamp, s.kl_log_clamp);
      const vf value = exp_beyond_linear(held);
      kl = {value, held == delta ? -(value + held) : vf{}};
    }
  }
  if (s.kl_clamp < INFINITY) {
    kl.slope = abs(kl.value) <= s.kl_clamp ? kl.slope : vf{};
    kl.value = clamp(kl.value, -s.kl_clamp, s.kl_clamp);
  }
  if (s.kl >= Kl::k1_plus) kl.slope = -delta;
  return kl;
}

}  // namespace flashpo::FLASHPO_ISA
