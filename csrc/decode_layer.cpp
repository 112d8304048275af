#include "decode_layer.h"

#include <algorithm>
#include <initializer_list>

#include "cpu/parallel.h"

namespace flashpo {
namespace {

// Dense tensors out of `work`, one behind the other. They point into themselves and stay where they are.
class Part : public Tensor {
 public:
  Part(const Tensor& work, int64_t& used, std::initializer_list<int64_t> shape) : Part(work, shape) {
    dl.byte_offset += used * (dl.dtype.bits / 8);
    used += shape_[0] * strides_[0];
  }
  // The numbers of another part in another shape, or of `memory` from its beginning.
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

}  // namespace

void decode_layer(const LayerKernels& kernels, const Tensor& x, const Tensor& residual, const LayerWeights& weights,
                  const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& slot, const decode::Plan& plan, double scale, int activation, const Tensor& out,
                  const Tensor& total, const Tensor& work, const Tensor& lse, const Tensor& scratch, int threads) {
  using W = LayerWeights;
  expect(weights.norms.size() == W::NORMS && weights.linears.size() == W::LINEARS &&
             weights.biases.size() == W::LINEARS && weights.eps.size() == 3,
         "decode_layer: a layer has 4 norms, 3 eps, 7 linears and biases");
  expect(x.dim() == 2 && k_cache.dim() == 4, "decode_layer: x must be (rows, hidden), k_cache have 4 dimensions");
  const int64_t rows = x.size(0), hidden = x.size(1), heads = k_cache.size(1), features = k_cache.size(2);
  const int64_t query_heads = plan.heads * plan.rep, queries = query_heads * features, keys = heads * features;
  const Tensor& down = weights.linears[W::DOWN];
  expect(down.dim() == 3 || down.dim() == 6, "decode_layer: linears must be packed");
  const int64_t inner = down.size(1) * (down.dim() == 6 ? 32 : 1);
  expect_dense("work", work, x.dtype(), {rows * (3 * hidden + 2 * queries + 2 * keys + 2 * inner)});

  int64_t used = 0;
  const Part normed(work, used, {rows, hidden}), middle(work, used, {rows, hidden}), mixed(work, used, {rows, hidden});
  const Part q(work, used, {rows, queries}), k(work, used, {rows, keys}), v(work, used, {rows, keys});
  const Part turned(work, used, {rows, query_heads, features}), attended(q, {rows, query_heads, features});
  const Part gate(work, used, {rows, inner}), up(work, used, {rows, inner});
  const auto linear = [&](W::Linear name, const Tensor& from, const Tensor& to) {
    kernels.packed_linear(from, weights.linears[name], weights.biases[name], to, threads);
  };

  together(threads, [&] {
    kernels.add_rms_norm(x, residual, weights.norms[W::BEFORE], weights.eps[0], false, normed, middle, threads);
    linear(W::Q, normed, q);
    linear(W::K, normed, k);
    linear(W::V, normed, v);
    kernels.rope_append(q, k, v, cos, sin, weights.norms[W::QUERY], weights.norms[W::KEY], weights.eps[2], false,
                        k_cache, v_cache, slot, turned, threads);
    kernels.decode_attention(plan, turned, k_cache, v_cache, static_cast<float>(scale), 0, Tensor(), attended, lse,
                             scratch);
    linear(W::O, q, mixed);
    kernels.add_rms_norm(mixed, middle, weights.norms[W::BETWEEN], weights.eps[1], false, normed, total, threads);
    linear(W::GATE, normed, gate);
    linear(W::UP, normed, up);
    kernels.gated_activation(gate, up, activation, gate, threads);
    linear(W::DOWN, gate, out);
  });
}

}  // namespace flashpo
