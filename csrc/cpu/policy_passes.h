// The passes of `policy_loss` over one sequence, which stays in the cache after the first: (1) count the mask; (2) sums
// for ratios and weights of the whole sequence; (3) terms, statistics and gradient; (4) the gradient of the sequence's
// ratio, which goes to all of its tokens.
#pragma once
#include <algorithm>
#include <cfloat>

#include "policy_bins.h"
#include "policy_terms.h"

namespace flashpo::FLASHPO_ISA {

static inline double total(vd x) {
  double sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}
static inline double count(vi flags) {  // lanes count down from 0
  double sum = 0;
  for (int i = 0; i < W; ++i) sum -= flags[i];
  return sum;
}
static inline float largest(vf x) {
  float most = x[0];
  for (int i = 1; i < W; ++i) most = std::max(most, x[i]);
  return most;
}
static inline float smallest(vf x) {
  float least = x[0];
  for (int i = 1; i < W; ++i) least = std::min(least, x[i]);
  return least;
}

// Counts and extremes of a sequence's tokens or ratios, and sums, which are fp32 within a block and double across
// blocks.
struct Counts {
  vi clip_low{}, clip_high{}, below{}, above{}, capped{}, saturated{}, off_policy{};
  vf ratio_min = splat(INFINITY), ratio_max{};  // ratios are positive
  vf weight_min = splat(INFINITY), weight_max = splat(-INFINITY);
};
struct Sums {
  vd x{}, chain{}, entropy{}, high_entropy{}, kl{}, approx_kl{}, ratio{}, ratio_squared{}, weight{}, weight_squared{},
      phi{};
};
static inline void add(vd& sum, vf x) { sum += __builtin_convertvector(x, vd); }

// The arguments of one call, and what is the same for all of its tokens.
struct Batch {
  Spec spec;
  Tokens tokens{};  // of all sequences
  const float* advantage_of_sequence = nullptr;
  const float* importance_ratio_of_sequence = nullptr;
  const int64_t* starts = nullptr;
  int64_t sequences = 0;
  float entropy_threshold = -INFINITY;  // the default keeps all tokens
  double num_items = NAN;               // NAN: counted here
  double scale = 1;
  double items = 1, bonus_tokens = 1;   // the denominators of the loss and of the mean entropy

  explicit Batch(const double* spec_numbers) : spec(spec_numbers) {}
  int64_t length(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
  // Whether the statistics of ratios are per sequence, with the sequence's first token as the only sample.
  bool samples_of_sequences() const {
    return (spec.ratio == Ratio::sequence || spec.ratio == Ratio::sequence_sum) && advantage_of_sequence &&
           spec.surrogate != Surrogate::gmpo;
  }
  // Whether importance weights are per token and each counts in the statistics, instead of one weight per sequence.
  bool weights_of_tokens() const {
    return tokens.in[IMPORTANCE_RATIO] || (spec.importance != Importance::none && !spec.weight_of_sequences());
  }
  bool is_token_mean() const {
    return spec.aggregation == Aggregation::token_mean || spec.aggregation == Aggregation::local_token_mean;
  }
  // Whether gradients need counts over the whole batch first.
  bool needs_totals() const {
    const bool counts_live = spec.aggregation != Aggregation::token_sum && spec.empty_sequences == Empty::excluded;
    return (std::isnan(num_items) && (is_token_mean() || counts_live)) ||
           (spec.entropy_coef != 0 && spec.entropy_mean == EntropyMean::tokens);
  }
  // Set the denominators from these counts, which are 0 if they are not needed.
  void set_items(int64_t tokens, int64_t kept, int64_t live_sequences) {
    const int64_t counted = is_token_mean()                                ? tokens
                            : spec.aggregation == Aggregation::token_sum   ? 1
                            : spec.empty_sequences == Empty::excluded      ? live_sequences
                                                                           : sequences;
    items = std::isnan(num_items) ? std::max<int64_t>(counted, 1) : std::max<double>(num_items, FLT_MIN);
    bonus_tokens = std::max<int64_t>(kept, 1);
  }

  Tokens at(int64_t sequence) const {
    Tokens t = tokens;
    for (const float*& x : t.in)
      if (x) x += starts[sequence];
    for (float*& x : t.out)
      if (x) x += starts[sequence];
    t.mask += starts[sequence] * t.mask_bytes;
    return t;
  }
  vi kept(const Tokens& t, int64_t i, vi m) const {
    return entropy_threshold > -INFINITY ? m & (load(t.in[ENTROPY] + i) >= entropy_threshold) : m;
  }
  vf old(const Tokens& t, int64_t i, vi m, vf logp) const { return t.in[OLD] ? t.load_live(OLD, i, m) : logp; }
  vf advantage(const Sequence& q, const Tokens& t, int64_t i, vi m) const {
    return t.in[ADVANTAGE] ? t.load_live(ADVANTAGE, i, m) : splat(q.advantage);
  }
};

// Call pass(tokens, first, vectors) for blocks of whole vectors. The remaining tokens are passed in a padded copy. A
// sequence without tokens gets a copy of only padding; its first token stands for the sequence in statistics per
// sequence.
template <typename Pass>
static inline void over(const Tokens& t, int64_t length, Pass pass) {
  alignas(64) float in[INPUTS][W] = {}, out[OUTPUTS][W];
  alignas(64) char mask[8 * W] = {};
  Tokens part = t;
  int64_t vectors, first = 0;
  do {
    const int64_t left = length - first;
    vectors = left < W ? 1 : std::min(BLOCK, left / W);
    if (left < W) {
      for (int j = 0; j < INPUTS; ++j)
        if (t.in[j]) part.in[j] = static_cast<float*>(std::memcpy(in[j], t.in[j] + first, left * sizeof(float)));
      for (int j = 0; j < OUTPUTS; ++j)
        if (t.out[j]) part.out[j] = static_cast<float*>(std::memcpy(out[j], t.out[j] + first, left * sizeof(float)));
      part.mask = static_cast<char*>(std::memcpy(mask, t.mask + first * t.mask_bytes, left * t.mask_bytes));
    }
    pass(left < W ? part : t, left < W ? 0 : first, vectors);
    if (left < W)
      for (int j = 0; j < OUTPUTS; ++j)
        if (t.out[j]) std::memcpy(t.out[j] + first, out[j], left * sizeof(float));
    first += vectors * W;
  } while (first < length);
}

static inline void count_tokens(const Batch& b, const Tokens& t, int64_t length, Sequence& q) {
  q.end = length;
  while (q.end > W && !any(t.live(q.end - W))) q.end -= W;
  vi live{}, kept{};
  over(t, q.end, [&](const Tokens& t, int64_t first, int64_t vectors) {
    for (int64_t i = first; i < first + vectors * W; i += W) {
      const vi m = t.live(i);
      live += m;
      kept += b.kept(t, i, m);
    }
  });
  q.tokens = static_cast<int64_t>(count(live));
  q.kept = static_cast<int64_t>(count(kept));
}

static inline bool needs_sums(const Batch& b) {
  const Spec& s = b.spec;
  return !s.of_tokens() || s.surrogate == Surrogate::vespo || s.off_policy || s.weight_of_sequences() ||
         s.importance == Importance::geometric_mask;
}

// Compute what is the same for all tokens of a sequence but depends on all of them.
static inline void sum_tokens(const Batch& b, const Tokens& t, int64_t length, Sequence& q) {
  const Spec& s = b.spec;
  const bool has_log_rho = s.importance != Importance::none;
  vd log_ratio{}, log_weight{}, log_rhos{}, behind{};
  over(t, length, [&](const Tokens& t, int64_t first, int64_t vectors) {
    vf of_ratio{}, of_weight{}, of_rho{}, of_behind{};
    for (int64_t i = first; i < first + vectors * W; i += W) {
      const vi m = t.live(i);
      const vf logp = t.load_live(LOGPROB, i, m), old = b.old(t, i, m, logp), d = logp - old;
      if (s.surrogate == Surrogate::gmpo)
        of_ratio += b.kept(t, i, m) ? gain(s, d, b.advantage(q, t, i, m)) : vf{};
      else
        of_ratio += d;
      if (s.surrogate == Surrogate::vespo) {
        of_weight += clamp(d, -20.0f, 20.0f);
        const vf log_r = clamp(log(rho(s, q, t, i, m, old)), VESPO_LOG_MIN, VESPO_LOG_MAX);
        if (q.weighted) of_weight += m ? log_r : vf{};
      }
      if (has_log_rho) of_rho += log_rho(t, i, m, old);
      if (s.off_policy) of_behind += finite_or_0((t.in[ROLLOUT] ? t.load_live(ROLLOUT, i, m) : old) - logp);
    }
    add(log_ratio, of_ratio);
    add(log_weight, of_weight);
    add(log_rhos, of_rho);
    add(behind, of_behind);
  });
  const double tokens = std::max<int64_t>(q.tokens, 1);
  if (!s.of_tokens()) {
    const double divisor = s.surrogate == Surrogate::gmpo   ? std::max<int64_t>(q.kept, 1)
                           : s.ratio == Ratio::sequence_sum ? 1
                                                            : tokens;
    const float log_w = static_cast<float>(total(log_ratio) / divisor);
    q.free = log_w >= s.log_ratio_min && log_w <= s.log_ratio_max;
    q.log_w = std::min(std::max(log_w, s.log_ratio_min), s.log_ratio_max);
    q.saturated = std::abs(q.log_w) > SATURATION;
    q.w = static_cast<float>(std::exp(double(std::min(std::max(q.log_w, -SATURATION), SATURATION))));
  }
  if (has_log_rho) {
    const double sum = total(log_rhos);
    const double r = std::exp(s.importance == Importance::geometric_mask ? sum / tokens : sum);
    q.within = r >= s.importance_min && r <= s.importance_max;
    if (s.importance == Importance::sequence_truncate)
      q.rho = static_cast<float>(std::min<double>(std::max<double>(r, s.importance_min), s.importance_max));
    if (s.importance == Importance::sequence_mask) q.rho = q.within ? static_cast<float>(r) : 0;
  }
  q.off_policy = s.off_policy && total(behind) / tokens > s.off_policy_threshold;
  const double l = std::min(std::max(total(log_weight), VESPO_LOG_MIN), VESPO_LOG_MAX);
  for (int i = 0; i < 2; ++i) {
    const double k = s.vespo_gamma[i][0], lambda = s.vespo_gamma[i][1];
    q.phi[i] = static_cast<float>(std::exp(lambda + k * l - lambda * std::exp(l)));
  }
}

template <Surrogate S>
static void add_terms(const Batch& batch, const Sequence& sequence, const Tokens& t, int64_t length, float factor,
               float entropy_factor, Sums& sums, Counts& counts, Bins& bins) {
  bool start = true;  // of the sequence
  over(t, length, [&](const Tokens& tokens, int64_t first, int64_t vectors) {
    const Batch b = batch;  // copies, because otherwise all members would be read again after each store
    const Sequence q = sequence;
    const Tokens t = tokens;
    const Spec& s = b.spec;
    const bool of_sequences = b.samples_of_sequences(), chain_of_tokens = s.chain_of_tokens();
    const bool clamps = s.log_ratio_min > -INFINITY || s.log_ratio_max < INFINITY;
    vf x_sum{}, chain{}, entropy{}, high_entropy{}, kl_sum{}, approx_kl{}, ratio{}, ratio_squared{}, weight{},
        weight_squared{}, phi{};
    Counts local = counts;
    alignas(64) int8_t ranks[BLOCK * W];
    for (int64_t i = first; i < first + vectors * W; i += W) {
      const vi m = t.live(i);
      const vi first_token = iota() == (start ? 0 : -1);
      start = false;
      const vf logp = t.load_live(LOGPROB, i, m), old = b.old(t, i, m, logp), d = logp - old;
      const vf adv = b.advantage(q, t, i, m);
      vf a = m ? adv : vf{};
      vi kept = m;
      if (t.in[ENTROPY]) {
        const vf h = t.load_live(ENTROPY, i, m);
        kept = m & (h >= b.entropy_threshold);
        entropy += h;
        high_entropy += kept ? h : vf{};
        if (S != Surrogate::gmpo) a = kept ? adv : vf{};
      }
      if (q.off_policy) {
        const vi dropped = adv < 0.0f;
        a = dropped ? vf{} : a;
        local.off_policy += dropped & first_token;
      }
      if (q.weighted) {
        const vf r = rho(s, q, t, i, m, old);
        if (S != Surrogate::vespo) a *= r;
        if (b.weights_of_tokens()) {
          const vf r_live = m ? r : vf{};
          weight += r_live;
          weight_squared += r_live * r_live;
          local.weight_min = min(local.weight_min, m ? r : splat(INFINITY));
          local.weight_max = max(local.weight_max, m ? r : splat(-INFINITY));
        }
      }

      vf log_w = d, w;
      vi free = splat_int(-1);  // where no clamp holds log w
      if (s.of_tokens()) {
        if (clamps) {
          log_w = clamp(d, s.log_ratio_min, s.log_ratio_max);
          free = log_w == d;
          log_w = m ? log_w : vf{};
        }
        const vf bounded = clamp(log_w, -SATURATION, SATURATION);
        local.saturated += bounded != log_w;
        w = exp_normal(bounded);
        store_ranks(ranks + (i - first), bounded);
      } else {
        w = splat(q.w);
        free = splat_int(q.free ? -1 : 0);
        if (q.saturated) local.saturated += m;
      }
      approx_kl += log_w;
      Loss loss = loss_of<S>(s, q, logp, old, d, w, adv, a);
      if (clamps) loss.by_log_w = free ? loss.by_log_w : vf{};
      if (s.kl_coef != 0) {
        KlTerm kl = kl_of(s, t.load_live(REF, i, m) - logp);
        if (s.kl_ratio_correction) {
          kl.value *= w;
          kl.slope *= w;
          loss.by_log_w += m & free ? s.kl_coef * kl.value : vf{};
        }
        kl_sum += m ? kl.value : vf{};
        loss.x += m ? s.kl_coef * kl.value : vf{};
        loss.by_logp += m ? s.kl_coef * kl.slope : vf{};
      }

      x_sum += loss.x;
      if (chain_of_tokens) {
        store(t.out[D_LOGPROB] + i, factor * (loss.by_log_w + loss.by_logp));
      } else {
        store(t.out[D_LOGPROB] + i, factor * loss.by_logp);
        chain += loss.by_log_w;
      }
      if (t.out[D_ENTROPY])
        store(t.out[D_ENTROPY] + i, (s.entropy_mean == EntropyMean::tokens ? kept : m) ? splat(entropy_factor) : vf{});

      const vi sample = of_sequences ? first_token : m;
      const vf w_sampled = sample ? w : vf{};  // w is positive
      ratio += w_sampled;
      ratio_squared += w_sampled * w_sampled;
      local.ratio_min = min(local.ratio_min, sample ? w : splat(INFINITY));
      local.ratio_max = max(local.ratio_max, w_sampled);
      local.below += sample & loss.below;
      local.above += sample & loss.above;
      local.capped += sample & loss.capped;
      if (t.in[ADVANTAGE]) {
        const bool dppo = S == Surrogate::dppo_tv || S == Surrogate::dppo_kl;
        local.clip_low += sample & loss.below & (dppo ? adv <= 0.0f : adv < 0.0f);
        local.clip_high += sample & loss.above & (adv > 0.0f);
        if (S == Surrogate::vespo) phi += m ? (adv >= 0.0f ? splat(q.phi[0]) : splat(q.phi[1])) : vf{};
      }
    }
    counts = local;
    if (s.of_tokens()) {
      std::memset(ranks + vectors * W, 0, std::min<int64_t>(3, BLOCK - vectors) * W);
      bins.add(ranks, vectors);
    }
    add(sums.x, x_sum);
    add(sums.chain, chain);
    add(sums.approx_kl, approx_kl);
    add(sums.ratio, ratio);
    add(sums.ratio_squared, ratio_squared);
    add(sums.phi, phi);
    add(sums.entropy, entropy);
    add(sums.high_entropy, high_entropy);
    add(sums.kl, kl_sum);
    add(sums.weight, weight);
    add(sums.weight_squared, weight_squared);
  });
}

// Add the gradient of a sequence's ratio: `each` goes to every token that changes the ratio.
static inline void add_chain(const Batch& b, const Sequence& q, const Tokens& t, int64_t length, float each) {
  const bool gmpo = b.spec.surrogate == Surrogate::gmpo;
  over(t, length, [&](const Tokens& t, int64_t first, int64_t vectors) {
    for (int64_t i = first; i < first + vectors * W; i += W) {
      vi moves = t.live(i);
      if (gmpo) {
        const vf logp = t.load_live(LOGPROB, i, moves), d = logp - b.old(t, i, moves, logp);
        const vi unclipped = gain(b.spec, d, b.advantage(q, t, i, moves)) == d;
        moves = b.kept(t, i, moves) & unclipped;
      }
      store(t.out[D_LOGPROB] + i, load(t.out[D_LOGPROB] + i) + (moves ? splat(each) : vf{}));
    }
  });
}

using AddTerms = decltype(&add_terms<Surrogate::clip>);
static inline AddTerms terms_of(Surrogate surrogate) {
  switch (surrogate) {
    case Surrogate::clip: return add_terms<Surrogate::clip>;
    case Surrogate::cispo: return add_terms<Surrogate::cispo>;
    case Surrogate::sapo: return add_terms<Surrogate::sapo>;
    case Surrogate::vespo: return add_terms<Surrogate::vespo>;
    case Surrogate::gmpo: return add_terms<Surrogate::gmpo>;
    case Surrogate::dppo_tv: return add_terms<Surrogate::dppo_tv>;
    case Surrogate::dppo_kl: return add_terms<Surrogate::dppo_kl>;
    default: return add_terms<Surrogate::reinforce>;
  }
}

}  // namespace flashpo::FLASHPO_ISA
