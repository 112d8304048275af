// policy_loss on the CPU. Each sequence takes as many passes as its spec needs. The sums of sequences are joined in
// their order, so that no result depends on the number of threads.
#include <memory>

#include "../ops.h"
#include "parallel.h"
#include "policy_passes.h"

namespace flashpo::FLASHPO_ISA {
namespace {

using namespace stat;

// Compute one sequence: write its gradients and return its statistics.
struct Partial {
  double stats[STATS];
};
Partial run_sequence(const Batch& b, int64_t sequence, Sequence q) {
  const Spec& s = b.spec;
  const Tokens t = b.at(sequence);
  const int64_t length = b.length(sequence);
  if (b.advantage_of_sequence) q.advantage = b.advantage_of_sequence[sequence];
  q.weighted = s.importance != Importance::none || t.in[IMPORTANCE_RATIO] || b.importance_ratio_of_sequence;
  if (b.importance_ratio_of_sequence) q.rho = b.importance_ratio_of_sequence[sequence];
  for (float* out : t.out)
    if (out) std::fill(out + q.end, out + length, 0.0f);
  if (needs_sums(b)) sum_tokens(b, t, q.end, q);

  double share = 1 / b.items;
  if (s.aggregation == Aggregation::sequence_mean) share /= std::max<int64_t>(q.tokens, 1);
  if (s.aggregation == Aggregation::fixed_length) share /= s.max_length;
  const double of_bonus = s.entropy_mean == EntropyMean::tokens ? 1 / b.bonus_tokens : share;
  const double factor = share * b.scale;
  Sums sums;
  Counts counts;
  Bins bins;
  terms_of(s.surrogate)(b, q, t, q.end, static_cast<float>(factor),
                        static_cast<float>(-s.entropy_coef * of_bonus * b.scale), sums, counts, bins);
  if (!s.chain_of_tokens()) {
    const int64_t divisor = s.surrogate == Surrogate::gmpo ? q.kept : s.ratio == Ratio::sequence ? q.tokens : 1;
    add_chain(b, q, t, q.end, static_cast<float>(total(sums.chain) * factor / std::max<int64_t>(divisor, 1)));
  }

  Partial p;
  double* out = p.stats;
  const bool live = q.tokens > 0, of_sequences = b.samples_of_sequences();
  out[POLICY_LOSS] = total(sums.x) * share;
  if (s.empty_sequences == Empty::surrogate && b.advantage_of_sequence && !live)
    out[POLICY_LOSS] -= q.advantage / b.items;
  out[HIGH_ENTROPY] = total(sums.high_entropy);
  out[stat::ENTROPY] = total(sums.entropy);
  const double bonus = s.entropy_mean == EntropyMean::tokens ? out[HIGH_ENTROPY] : out[stat::ENTROPY];
  out[LOSS] = b.scale * (out[POLICY_LOSS] - (s.entropy_coef != 0 ? s.entropy_coef * of_bonus * bonus : 0));
  out[TOKENS] = static_cast<double>(q.tokens);
  out[SEQUENCES] = 1;
  out[LIVE_SEQUENCES] = live;
  out[KL] = total(sums.kl);
  out[APPROX_KL] = -total(sums.approx_kl);
  out[RATIOS] = of_sequences ? 1 : out[TOKENS];
  out[RATIO] = total(sums.ratio);
  out[RATIO_SQUARED] = total(sums.ratio_squared);
  bins.finish(s.of_tokens() ? out[RATIOS] : 0, out + LOG_RATIO_BINS);
  if (!s.of_tokens()) out[LOG_RATIO_BINS + bin_of(q.log_w)] = out[RATIOS];
  out[BELOW] = count(counts.below);
  out[ABOVE] = count(counts.above);
  const bool dppo = s.surrogate == Surrogate::dppo_tv || s.surrogate == Surrogate::dppo_kl;
  const bool loses = q.advantage < 0 || (dppo && q.advantage == 0);
  out[CLIP_LOW] = t.in[ADVANTAGE] ? count(counts.clip_low) : loses ? out[BELOW] : 0;
  out[CLIP_HIGH] = t.in[ADVANTAGE] ? count(counts.clip_high) : q.advantage > 0 ? out[ABOVE] : 0;
  out[CAPPED] = count(counts.capped);
  out[SATURATED] = count(counts.saturated);
  out[OFF_POLICY_SEQUENCES] = count(counts.off_policy);
  out[HIGH_ENTROPY_TOKENS] = static_cast<double>(q.kept);
  out[RATIO_MIN] = smallest(counts.ratio_min);
  out[RATIO_MAX] = out[RATIOS] > 0 ? largest(counts.ratio_max) : -INFINITY;
  out[CLIP_LOW_MIN] = out[RATIOS] > 0 ? out[CLIP_LOW] / out[RATIOS] : INFINITY;
  out[CLIP_HIGH_MAX] = out[RATIOS] > 0 ? out[CLIP_HIGH] / out[RATIOS] : -INFINITY;
  const bool one_weight = q.weighted && live && !b.weights_of_tokens();
  out[WEIGHTS] = b.weights_of_tokens() ? out[TOKENS] : one_weight;
  out[WEIGHT] = one_weight ? q.rho : total(sums.weight);
  out[WEIGHT_SQUARED] = one_weight ? double(q.rho) * q.rho : total(sums.weight_squared);
  out[WEIGHT_MIN] = one_weight ? q.rho : smallest(counts.weight_min);
  out[WEIGHT_MAX] = one_weight ? q.rho : largest(counts.weight_max);
  const bool vespo = s.surrogate == Surrogate::vespo, one_phi = vespo && b.advantage_of_sequence;
  out[PHIS] = one_phi ? 1 : vespo ? out[TOKENS] : 0;
  out[PHI] = one_phi ? q.phi[q.advantage >= 0 ? 0 : 1] : total(sums.phi);
  return p;
}

// Call body(sequence) for all sequences, in contiguous parts that have about the same number of tokens.
template <typename Body>
void over_sequences(const Batch& b, int threads, Body body) {
  const int64_t tokens = b.starts[b.sequences];
  const auto place = [&](int64_t sequence) { return b.starts[sequence] + sequence; };  // strictly increasing
  parallel_for(tokens + b.sequences, tokens < 8192 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < b.sequences; ++i)
      if (place(i) >= begin && place(i) < end) body(i);
  });
}

}  // namespace

void policy_loss_fwd(const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantage, const Tensor& mask,
                     const Tensor& cu_seqlens, const Tensor& ref_logprob, const Tensor& rollout_logprob,
                     const Tensor& importance_ratio, const Tensor& entropy, const Tensor& entropy_threshold,
                     const Tensor& num_items, double scale, const Tensor& spec, const Tensor& stats,
                     const Tensor& grads, const Tensor& factors, int threads) {
  const int64_t n = logprob.dim() == 1 ? logprob.size(0) : -1;
  const int64_t sequences = cu_seqlens.dim() == 1 ? cu_seqlens.size(0) - 1 : -1;
  expect(n >= 0 && sequences >= 0, "logprob must be (N,) and cu_seqlens (S + 1,)");
  static float nothing;  // address of the tensors of a batch without tokens, because a null pointer means None
  const auto flat = [&](const char* name, const Tensor& x, bool optional) -> const float* {
    expect_dense(name, x, DType::f32, {n}, optional);
    return x.defined() && n == 0 ? &nothing : x.data<const float>();
  };
  const auto of_sequences = [](const Tensor& x) { return x.defined() && x.dim() == 2; };
  const auto either = [&](const char* name, const Tensor& x, bool optional) -> const float* {
    if (!of_sequences(x)) return flat(name, x, optional);
    expect_dense(name, x, DType::f32, {sequences, 1});
    return nullptr;
  };
  expect_dense("spec", spec, DType::f64, {NUMBERS});
  expect_dense("cu_seqlens", cu_seqlens, DType::i64, {sequences + 1});
  expect_dense("entropy_threshold", entropy_threshold, DType::f32, {1}, true);
  expect_dense("num_items", num_items, DType::f32, {1}, true);
  expect_dense("stats", stats, DType::f32, {STATS});
  expect_dense("mask", mask, mask.dtype(), {n});
  Batch b(spec.data<const double>());
  const bool has_d_entropy = b.spec.entropy_coef != 0;
  expect_dense("grads", grads, DType::f32, {has_d_entropy ? 2 : 1, n});
  expect_dense("factors", factors, DType::f32, {grads.size(0)});
  for (int64_t row = 0; row < grads.size(0); ++row) factors.data<float>()[row] = 1;
  b.tokens.in[LOGPROB] = flat("logprob", logprob, false);
  b.tokens.in[OLD] = flat("old_logprob", old_logprob, true);
  b.tokens.in[ADVANTAGE] = either("advantage", advantage, false);
  b.tokens.in[REF] = flat("ref_logprob", ref_logprob, b.spec.kl_coef == 0);
  b.tokens.in[ROLLOUT] = flat("rollout_logprob", rollout_logprob, b.spec.importance == Importance::none);
  b.tokens.in[IMPORTANCE_RATIO] = either("importance_ratio", importance_ratio, true);
  b.tokens.in[ENTROPY] = flat("entropy", entropy, !has_d_entropy && !entropy_threshold.defined());
  b.tokens.mask = n == 0 ? reinterpret_cast<const char*>(&nothing) : mask.data<const char>();
  b.tokens.mask_bytes = mask.dtype() == DType::boolean ? 1 : mask.dtype() == DType::i32 ? 4 : 8;
  expect(mask.dtype() == DType::boolean || mask.dtype() == DType::i32 || mask.dtype() == DType::i64,
         "mask must be bool, int32 or int64");
  float* const out = n == 0 ? &nothing : grads.data<float>();
  b.tokens.out[D_LOGPROB] = out;
  b.tokens.out[D_ENTROPY] = has_d_entropy ? out + n : nullptr;
  b.advantage_of_sequence = of_sequences(advantage) ? advantage.data<const float>() : nullptr;
  b.importance_ratio_of_sequence = of_sequences(importance_ratio) ? importance_ratio.data<const float>() : nullptr;
  b.starts = cu_seqlens.data<const int64_t>();
  b.sequences = sequences;
  if (entropy_threshold.defined()) b.entropy_threshold = *entropy_threshold.data<const float>();
  if (num_items.defined()) b.num_items = *num_items.data<const float>();
  b.scale = scale;
  bool rises = b.starts[0] == 0 && b.starts[sequences] == n;
  for (int64_t i = 0; i < sequences; ++i) rises &= b.starts[i] <= b.starts[i + 1];
  expect(rises, "cu_seqlens must rise from 0 to the number of tokens");

  const bool totals = b.needs_totals();
  const std::unique_ptr<Sequence[]> counted(totals ? new Sequence[sequences] : nullptr);
  int64_t tokens = 0, kept = 0, live_sequences = 0;
  if (totals) {
    over_sequences(b, threads, [&](int64_t i) { count_tokens(b, b.at(i), b.length(i), counted[i]); });
    for (int64_t i = 0; i < sequences; ++i) {
      tokens += counted[i].tokens;
      kept += counted[i].kept;
      live_sequences += counted[i].tokens > 0;
    }
  }
  b.set_items(tokens, kept, live_sequences);

  const std::unique_ptr<Partial[]> partials(new Partial[sequences]);
  over_sequences(b, threads, [&](int64_t i) {
    Sequence q;
    if (totals)
      q = counted[i];
    else
      count_tokens(b, b.at(i), b.length(i), q);
    partials[i] = run_sequence(b, i, q);
  });
  const auto reduce = [&](int stat, double x, auto join) {
    for (int64_t i = 0; i < sequences; ++i) x = join(x, partials[i].stats[stat]);
    stats.data<float>()[stat] = static_cast<float>(x);
  };
  for (int stat = 0; stat < RATIO_MIN; ++stat) reduce(stat, 0, [](double a, double b) { return a + b; });
  for (const int stat : {RATIO_MIN, CLIP_LOW_MIN, WEIGHT_MIN})
    reduce(stat, INFINITY, [](double a, double b) { return std::min(a, b); });
  for (const int stat : {RATIO_MAX, CLIP_HIGH_MAX, WEIGHT_MAX})
    reduce(stat, -INFINITY, [](double a, double b) { return std::max(a, b); });
}

void policy_loss_bwd(const Tensor& grads, const Tensor& factors, const Tensor& d_loss, const Tensor& out, int threads) {
  const int64_t rows = grads.dim() == 2 ? grads.size(0) : -1, n = rows < 0 ? 0 : grads.size(1);
  expect_dense("grads", grads, DType::f32, {rows, n});
  expect_dense("factors", factors, DType::f32, {rows});
  expect_dense("d_loss", d_loss, DType::f32, {});
  expect_dense("out", out, DType::f32, {rows, n});
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = factors.data<const float>()[row] * *d_loss.data<const float>();
    const float* in = grads.data<const float>() + row * n;
    float* scaled = out.data<float>() + row * n;
    parallel_for(n, n < 32768 ? 1 : threads, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) scaled[i] = in[i] * factor;
    });
  }
}

}  // namespace flashpo::FLASHPO_ISA
