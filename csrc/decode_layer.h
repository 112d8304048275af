// The decoder layers of a decode step in one call. Reading the weights evicts Python from the caches, so the twenty
// lines of Python of one operator would take tens of microseconds between two kernels.
#pragma once
#include <vector>

#include "decode_plan.h"
#include "ops.h"

namespace flashpo {

// The kernels of the instruction set in use.
struct LayerKernels {
  decltype(&baseline::add_rms_norm) add_rms_norm;
  decltype(&baseline::packed_linear) packed_linear;
  decltype(&baseline::rope_append) rope_append;
  decltype(&baseline::decode_attention) decode_attention;
  decltype(&baseline::gated_activation) gated_activation;
};

// What belongs to each layer, one layer after the other.
struct LayerStack {
  enum Norm { BEFORE, BETWEEN, QUERY, KEY, NORMS };  // the last two may be undefined
  enum Linear { Q, K, V, O, GATE, UP, DOWN, LINEARS };
  static constexpr size_t EPS = 3;  // for BEFORE, for BETWEEN, for QUERY and KEY
  std::vector<Tensor> norms, linears, biases, k_caches, v_caches;
  std::vector<double> eps;
  std::vector<const decode::Plan*> plans;
};

// x, residual (undefined before the first layer of a model), out and total are (rows, hidden). work has x's dtype and
// room for each row's 3 hidden states, 2 times queries, 2 times keys, gate and up. lse and scratch are as
// decode_attention takes them, large enough for every plan.
void decode_layers(const LayerKernels& kernels, const LayerStack& stack, const Tensor& x, const Tensor& residual,
                   const Tensor& cos, const Tensor& sin, const Tensor& slot, double scale, int activation,
                   const Tensor& out, const Tensor& total, const Tensor& work, const Tensor& lse,
                   const Tensor& scratch, int threads);

}  // namespace flashpo
