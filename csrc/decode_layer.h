// Decoder layers, one behind the other, for the rows of a decode step in one call. The weights that stream by leave no
// Python in the caches: between kernels an operator's twenty lines of it take tens of microseconds.
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

// What belongs to each layer, layer by layer.
struct LayerStack {
  enum Norm { BEFORE, BETWEEN, QUERY, KEY, NORMS };  // the last two may be None
  enum Linear { Q, K, V, O, GATE, UP, DOWN, LINEARS };
  static constexpr size_t EPS = 3;  // of BEFORE, of BETWEEN, of QUERY and KEY
  std::vector<Tensor> norms, linears, biases, k_caches, v_caches;
  std::vector<double> eps;
  std::vector<const decode::Plan*> plans;
};

// x, residual (None before the first layer of a model), out, total: (rows, hidden). work: of x's dtype, a row's 3 hidden
// states, queries and keys twice, gate and up. lse, scratch: as decode_attention takes them, for every plan.
void decode_layers(const LayerKernels& kernels, const LayerStack& stack, const Tensor& x, const Tensor& residual,
                   const Tensor& cos, const Tensor& sin, const Tensor& slot, double scale, int activation,
                   const Tensor& out, const Tensor& total, const Tensor& work, const Tensor& lse,
                   const Tensor& scratch, int threads);

}  // namespace flashpo
