// A decoder layer for the rows of a decode step in one call. The weights that stream by leave no Python in the caches:
// between kernels an operator's twenty lines of it take tens of microseconds.
#pragma once
#include <vector>

#include "decode_plan.h"
#include "ops.h"

namespace flashpo {

// Of the instruction set at hand.
struct LayerKernels {
  decltype(&baseline::add_rms_norm) add_rms_norm;
  decltype(&baseline::packed_linear) packed_linear;
  decltype(&baseline::rope_append) rope_append;
  decltype(&baseline::decode_attention) decode_attention;
  decltype(&baseline::gated_activation) gated_activation;
};

struct LayerWeights {
  enum Norm { BEFORE, BETWEEN, QUERY, KEY, NORMS };  // the last two may be None
  enum Linear { Q, K, V, O, GATE, UP, DOWN, LINEARS };
  std::vector<Tensor> norms, linears, biases;
  std::vector<double> eps;  // BEFORE, BETWEEN, and one for QUERY and KEY
};

// x, residual (None in the first layer), out, total: (rows, hidden). work: of x's dtype, a row's 3 hidden states, queries
// and keys twice, gate and up.
void decode_layer(const LayerKernels& kernels, const Tensor& x, const Tensor& residual, const LayerWeights& weights,
                  const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& slot, const decode::Plan& plan, double scale, int activation, const Tensor& out,
                  const Tensor& total, const Tensor& work, const Tensor& lse, const Tensor& scratch, int threads);

}  // namespace flashpo
