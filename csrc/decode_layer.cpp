#include "decode_layer.h"

#include <algorithm>
#include <initializer_list>

#include "cpu/parallel.h"

namespace flashpo {
namespace {

// Dense tensors in `work`, one after the other. They point into themselves, so they must not be moved.
class Part : public Tensor {
 public:
  Part(const Tensor& work, int64_t& used, std::initializer_list<int64_t> shape) : Part(work, shape) {
    dl.byte_offset += used * (dl.dtype.bits / 8);
    used += shape_[0] * strides_[0];
  }
  // The memory of another part in another shape, or of `memory` from its beginning.
  Part(const Tensor& memory, std::initializer_list<int64_t> shape) : Tensor(memory) {
    dl.ndim = static_cast<int>(shape.size());
    dl.shape = shape_;
    dl.strides = strides_;
    std::copy(shape.begin(), shape.end(), shape_);
    int64_t numbers = 1;
    for (int i = dl.ndim - 1; i >= 0; numbers *= shape_[i--]) strides_[i] = numbers;
  }
  Part(const Part&) = delete;

 private:
  int64_t shape_[3], strides_[3];
};

// Compute layer `i` of the stack. total may be residual, and out may be x: each is read before the other is written.
void decode_layer(const LayerKernels& kernels, const LayerStack& stack, size_t i, const Tensor& x,
                  const Tensor& residual, const Tensor& cos, const Tensor& sin, const Tensor& slot, double scale,
                  int activation, const Tensor& out, const Tensor& total, const Tensor& work, const Tensor& lse,
                  const Tensor& scratch, int threads) {
  using S = LayerStack;
  const Tensor *norms = &stack.norms[i * S::NORMS], *linears = &stack.linears[i * S::LINEARS];
  const Tensor *biases = &stack.biases[i * S::LINEARS], &k_cache = stack.k_caches[i], &v_cache = stack.v_caches[i];
  const double* eps = &stack.eps[i * S::EPS];
  const decode::Plan& plan = *stack.plans[i];
  const Tensor& down = linears[S::DOWN];
  expect(k_cache.dim() == 4, "decode_layers: k_caches must have 4 dimensions");
  expect(down.dim() == 3 || down.dim() == 6, "decode_layers: linears must be packed");
  const int64_t rows = x.size(0), hidden = x.size(1), heads = k_cache.size(1), features = k_cache.size(2);
  const int64_t query_heads = plan.heads * plan.rep, queries = query_heads * features, keys = heads * features;
  const int64_t inner = down.size(1) * (down.dim() == 6 ? 32 : 1);
  expect_dense("work", work, x.dtype(), {rows * (3 * hidden + 2 * queries + 2 * keys + 2 * inner)});

  int64_t used = 0;
  const Part normed(work, used, {rows, hidden}), middle(work, used, {rows, hidden}), mixed(work, used, {rows, hidden});
  const Part q(work, used, {rows, queries}), k(work, used, {rows, keys}), v(work, used, {rows, keys});
  const Part turned(work, used, {rows, query_heads, features}), attended(q, {rows, query_heads, features});
  const Part gate(work, used, {rows, inner}), up(work, used, {rows, inner});
  const auto linear = [&](S::Linear name, const Tensor& from, const Tensor& to) {
    kernels.packed_linear(from, linears[name], biases[name], to, threads);
  };

  kernels.add_rms_norm(x, residual, norms[S::BEFORE], eps[0], false, normed, middle, threads);
  linear(S::Q, normed, q);
  linear(S::K, normed, k);
  linear(S::V, normed, v);
  kernels.rope_append(q, k, v, cos, sin, norms[S::QUERY], norms[S::KEY], eps[2], false, k_cache, v_cache, slot, turned,
                      threads);
  kernels.decode_attention(plan, turned, k_cache, v_cache, static_cast<float>(scale), 0, Tensor(), attended, lse,
                           scratch);
  linear(S::O, q, mixed);
  kernels.add_rms_norm(mixed, middle, norms[S::BETWEEN], eps[1], false, normed, total, threads);
  linear(S::GATE, normed, gate);
  linear(S::UP, normed, up);
  kernels.gated_activation(gate, up, activation, gate, threads);
  linear(S::DOWN, gate, out);
}

}  // namespace

void decode_layers(const LayerKernels& kernels, const LayerStack& stack, const Tensor& x, const Tensor& residual,
                   const Tensor& cos, const Tensor& sin, const Tensor& slot, double scale, int activation,
                   const Tensor& out, const Tensor& total, const Tensor& work, const Tensor& lse,
                   const Tensor& scratch, int threads) {
  using S = LayerStack;
  const size_t layers = stack.k_caches.size();
  expect(stack.norms.size() == S::NORMS * layers && stack.linears.size() == S::LINEARS * layers &&
             stack.biases.size() == S::LINEARS * layers && stack.eps.size() == S::EPS * layers &&
             stack.v_caches.size() == layers && stack.plans.size() == layers,
         "decode_layers: a layer has 4 norms, 3 eps, 7 linears and biases, 2 caches and a plan");
  expect(layers > 0 && x.dim() == 2, "decode_layers: there must be a layer, and x must be (rows, hidden)");
  together(threads, [&] {
    for (size_t i = 0; i < layers; ++i)
      decode_layer(kernels, stack, i, i ? out : x, i ? total : residual, cos, sin, slot, scale, activation, out, total,
                   work, lse, scratch, threads);
  });
}

}  // namespace flashpo
