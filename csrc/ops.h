// Every kernel entry point. The CPU kernels exist once per instruction set, each in a separate namespace.
#pragma once
#include <vector>

#include "tensor.h"

namespace flashpo::sampling {
struct Problem;
}
namespace flashpo::decode {
class Plan;
}

#define FLASHPO_DECLARE_CPU(ISA)                                                                                      \
  namespace flashpo::ISA {                                                                                            \
  void selective_log_softmax_fwd(const Tensor& logits, const Tensor& index, float temperature, int64_t ignore_index,  \
                                 const Tensor& out, int threads);                                                     \
  void selective_log_softmax_bwd(const Tensor& logits, const Tensor& index, float temperature, int64_t ignore_index,  \
                                 const Tensor& rows, const Tensor& d_logprob, const Tensor& d_entropy,                \
                                 const Tensor& out, int threads);                                                     \
  void linear_divergence_fold(const Tensor& s_tile, const Tensor& s_bias, double s_scale, double s_softcap,           \
                              const Tensor& t_tile, const Tensor& t_bias, double t_scale, double t_softcap,           \
                              double inv_temperature, double beta, const Tensor& target, int64_t start,               \
                              const Tensor& state, bool first, int threads);                                          \
  void linear_divergence_finish(const Tensor& state, double s_unit_of_all, double t_unit_of_all, double beta,         \
                                const Tensor& partial);                                                               \
  void linear_divergence_mixture(const Tensor& s_tile, const Tensor& s_bias, double s_scale, double s_softcap,        \
                                 const Tensor& t_tile, const Tensor& t_bias, double t_scale, double t_softcap,        \
                                 double inv_temperature, double beta, const Tensor& s_rows, const Tensor& t_rows,     \
                                 const Tensor& state, bool first, int threads);                                       \
  void linear_divergence_grad(const Tensor& s_tile, const Tensor& s_bias, double s_scale, double s_softcap,           \
                              const Tensor& t_tile, const Tensor& t_bias, double t_scale, double t_softcap,           \
                              double inv_temperature, double beta, const Tensor& target, int64_t start,               \
                              const Tensor& s_rows, const Tensor& t_rows, const Tensor& kl,                           \
                              const Tensor& d_divergence, const Tensor& d_entropy, const Tensor& d_logprob,           \
                              const Tensor& rows_out, int threads);                                                   \
  void linear_logprob_fold(const Tensor& tile, const Tensor& target, int64_t start, const Tensor& bias,               \
                           const Tensor& inv_temperature, double inv_temperature_of_all, double logit_scale,          \
                           double softcap, const Tensor& state, bool first, int threads);                             \
  void linear_logprob_finish(const Tensor& state, const Tensor& bias, const Tensor& inv_temperature,                  \
                             double inv_temperature_of_all, double logit_scale, double softcap,                       \
                             const Tensor& partial);                                                                  \
  void linear_logprob_grad(const Tensor& tile, const Tensor& target, int64_t start, const Tensor& bias,               \
                           const Tensor& inv_temperature, double inv_temperature_of_all, double logit_scale,          \
                           double softcap, const Tensor& results, const Tensor& d_logprob, const Tensor& d_entropy,   \
                           const Tensor& rows_out, int threads);                                                      \
  void gae_fwd(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,             \
               double gamma, double lam, const Tensor& advantages, const Tensor& returns, const Tensor& moments,      \
               int threads);                                                                                          \
  void gae_whiten(const Tensor& advantages, const Tensor& mask, const Tensor& moments, double eps, int threads);      \
  void policy_loss_fwd(const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantage, const Tensor& mask, \
                       const Tensor& cu_seqlens, const Tensor& ref_logprob, const Tensor& rollout_logprob,            \
                       const Tensor& importance_ratio, const Tensor& entropy, const Tensor& entropy_threshold,        \
                       const Tensor& num_items, double scale, const Tensor& spec, const Tensor& stats,                \
                       const Tensor& grads, const Tensor& factors, int threads);                                      \
  void policy_loss_bwd(const Tensor& grads, const Tensor& factors, const Tensor& d_loss, const Tensor& out,           \
                       int threads);                                                                                  \
  void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool unit_offset,      \
                    const Tensor& out, const Tensor& total, int threads);                                             \
  void rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,           \
                   const Tensor& q_weight, const Tensor& k_weight, double eps, bool unit_offset,                      \
                   const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot, const Tensor& out, int threads); \
  void gated_activation(const Tensor& gate, const Tensor& up, int activation, const Tensor& out, int threads);        \
  void pack_linear(const Tensor& weight, const Tensor& packed, int threads);                                          \
  void packed_linear(const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& out, int threads);      \
  void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,              \
              const Tensor& min_p, const Tensor& seed, const Tensor& offset, const Tensor& token,                     \
              const Tensor& numbers, int threads);                                                                    \
  void tree_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sinks, const Tensor& end,  \
                          const Tensor& position, double scale, int64_t window, double softcap, const Tensor& out,    \
                          const Tensor& lse, const Tensor& scratch, int threads);                                     \
  void tree_attention_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end,                       \
                          const Tensor& position, double scale, int64_t window, double softcap, const Tensor& lse,    \
                          const Tensor& delta, const Tensor& d_out, const Tensor& dq, const Tensor& dk,               \
                          const Tensor& dv, const Tensor& scratch, int threads);                                      \
  int64_t tree_attention_scratch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end,                \
                                 const Tensor& position, int64_t window, bool backward, int threads);                 \
  void tree_recurrence_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,                    \
                           const Tensor& beta, const Tensor& token, const Tensor& before, const Tensor& last,         \
                           const std::vector<int64_t>& sizes, double scale, const Tensor& out, const Tensor& states,  \
                           const Tensor& ends, const Tensor& scratch, int threads);                                   \
  void tree_recurrence_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,                    \
                           const Tensor& beta, const Tensor& token, const Tensor& before, const Tensor& last,         \
                           const std::vector<int64_t>& sizes, double scale, const Tensor& states,                     \
                           const Tensor& d_out, const Tensor& d_ends, const Tensor& dq, const Tensor& dk,             \
                           const Tensor& dv, const Tensor& d_decay, const Tensor& d_beta, const Tensor& scratch,      \
                           int threads);                                                                              \
  int64_t tree_recurrence_scratch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,             \
                                  const Tensor& beta, const Tensor& token, const Tensor& before, const Tensor& last,  \
                                  const std::vector<int64_t>& sizes, bool backward, bool with_states, int threads);   \
  void tree_conv_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& ancestors,              \
                     const Tensor& out, int threads);                                                                 \
  void tree_conv_bwd(const Tensor& x, const Tensor& weight, const Tensor& ancestors, const Tensor& d_out,             \
                     const Tensor& dx, const Tensor& d_weight, const Tensor& d_bias, int threads);                    \
  void recurrence_step(const Tensor& state, bool by_value, const Tensor& q, const Tensor& k, const Tensor& v,         \
                       const Tensor& keep, const Tensor& beta, double scale, const Tensor& out, int threads);         \
  int64_t decode_attention_scratch(const decode::Plan& plan, const Tensor& k_cache, const Tensor& v_cache);           \
  void decode_attention(const decode::Plan& plan, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,      \
                        float scale, float softcap, const Tensor& sinks, const Tensor& out, const Tensor& lse,        \
                        const Tensor& scratch);                                                                       \
  }

FLASHPO_DECLARE_CPU(baseline)
FLASHPO_DECLARE_CPU(avx2)
FLASHPO_DECLARE_CPU(avx512)
// Only kernels with matrix products of bfloat16: decode_attention, packed_linear, tree_attention
FLASHPO_DECLARE_CPU(avx512bf16)
FLASHPO_DECLARE_CPU(amx)

namespace flashpo {

void kv_append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot,
               int threads);
void merge_partials(const Tensor& partials, int64_t vocab, const Tensor& out);

int64_t group_advantages_scratch(int64_t rows, int64_t columns);  // in words of 8 bytes
void group_advantages(const Tensor& rewards, const Tensor& group, const Tensor& lengths,
                      const std::vector<double>& reward_weights, int baseline, int scale, bool normalize_first,
                      double eps, bool raw_singletons, const Tensor& advantage, const Tensor& mean, const Tensor& std,
                      const Tensor& degenerate, const Tensor& scratch, int64_t stream);
namespace advantages {
struct Problem;
}
void group_advantages_cuda(const advantages::Problem& problem, bool normalize_first, int64_t stream);
// Check the arguments of gae_fwd, on the CPU and on CUDA; return the number of sequences.
int64_t expect_gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,
                   const Tensor& advantages, const Tensor& returns, const Tensor& moments, DLDeviceType device);
void gae_fwd_cuda(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,
                  double gamma, double lam, const Tensor& advantages, const Tensor& returns, const Tensor& moments,
                  int64_t stream);
void gae_whiten_cuda(const Tensor& advantages, const Tensor& mask, const Tensor& moments, double eps, int64_t stream);

// Check the arguments of `sample`, on the CPU and on CUDA, and return them as a Problem.
sampling::Problem expect_sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& offset,
                                const Tensor& token, const Tensor& numbers, DLDeviceType device);
void sample_cuda(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                 const Tensor& min_p, const Tensor& seed, const Tensor& offset, const Tensor& token,
                 const Tensor& numbers, int64_t stream);

}  // namespace flashpo
