// recurrence_step on the CPU, in fp32. The formula is that of python/flashpo/ops/recurrence_step.py.
//
// The bound is reading and writing the states. The state of a head is a few kilobytes, so it is read from memory once,
// although it is needed for u and again for the result.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

struct Head {
  const float *q, *k;     // (features)
  const float *v, *keep;  // (values); (features) or one number: exp(decay)
  const float* beta;      // one number, or null
  float scale;
  float *state, *out;  // (features, values) or (values, features); (values)
  int64_t features, values;
  bool keep_of_features;

  float kept(int64_t i) const { return keep[keep_of_features ? i : 0]; }
};

// The state is (features, values). V vectors of values from column `at` on, of which `left` numbers exist.
template <int V>
void columns(const Head& h, int64_t at, int64_t left) {
  vf u[V], out[V] = {};
  for (int v = 0; v < V; ++v) u[v] = load_some(h.v + at + v * W, left - v * W);
  if (h.beta != nullptr) {
    vf held[V] = {};
    for (int64_t i = 0; i < h.features; ++i) {
      const vf k = splat(h.kept(i) * h.k[i]);
      for (int v = 0; v < V; ++v) held[v] += k * load_some(h.state + i * h.values + at + v * W, left - v * W);
    }
    for (int v = 0; v < V; ++v) u[v] = *h.beta * (u[v] - held[v]);
  }
  for (int64_t i = 0; i < h.features; ++i) {
    const vf keep = splat(h.kept(i)), k = splat(h.k[i]), q = splat(h.q[i]);
    for (int v = 0; v < V; ++v) {
      float* const to = h.state + i * h.values + at + v * W;
      const vf s = keep * load_some(to, left - v * W) + k * u[v];
      store_some(to, s, left - v * W);
      out[v] += q * s;
    }
  }
  for (int v = 0; v < V; ++v) store_some(h.out + at + v * W, h.scale * out[v], left - v * W);
}

void by_columns(const Head& h) {
  int64_t at = 0;
  for (; at + 4 * W <= h.values; at += 4 * W) columns<4>(h, at, 4 * W);
  for (; at < h.values; at += W) columns<1>(h, at, h.values - at);
}

// The state is (values, features).
void by_rows(const Head& h) {
  const auto add = [](vf a, vf b) { return a + b; };
  const auto keep = [&](int64_t i) {
    return h.keep_of_features ? load_some(h.keep + i, h.features - i) : splat(*h.keep);
  };
  for (int64_t j = 0; j < h.values; ++j) {
    float* const row = h.state + j * h.features;
    float u = h.v[j];
    if (h.beta != nullptr) {
      vf held = {};
      for (int64_t i = 0; i < h.features; i += W)
        held += keep(i) * load_some(h.k + i, h.features - i) * load_some(row + i, h.features - i);
      u = *h.beta * (u - reduce(held, add));
    }
    vf out = {};
    for (int64_t i = 0; i < h.features; i += W) {
      const int64_t left = h.features - i;
      const vf s = keep(i) * load_some(row + i, left) + splat(u) * load_some(h.k + i, left);
      store_some(row + i, s, left);
      out += s * load_some(h.q + i, left);
    }
    h.out[j] = h.scale * reduce(out, add);
  }
}

}  // namespace

void recurrence_step(const Tensor& state, bool by_value, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& keep, const Tensor& beta, double scale, const Tensor& out, int threads) {
  expect(state.dim() == 4 && q.dim() == 3, "state must have 4 dimensions, and q 3");
  const int64_t rows = state.size(0), heads = state.size(1), key_heads = q.size(1);
  const int64_t features = state.size(by_value ? 2 : 3), values = state.size(by_value ? 3 : 2);
  expect_dense("state", state, DType::f32, {rows, heads, state.size(2), state.size(3)});
  expect(key_heads > 0 && heads % key_heads == 0, "the heads of q must divide those of the state");
  expect_dense("q", q, DType::f32, {rows, key_heads, features});
  expect_dense("k", k, DType::f32, {rows, key_heads, features});
  expect_dense("v", v, DType::f32, {rows, heads, values});
  const bool keep_of_features = keep.dim() == 3;
  if (keep_of_features)
    expect_dense("keep", keep, DType::f32, {rows, heads, features});
  else
    expect_dense("keep", keep, DType::f32, {rows, heads});
  expect_dense("beta", beta, DType::f32, {rows, heads}, true);
  expect_dense("out", out, DType::f32, {rows, heads, values});
  const int64_t group = heads / key_heads;
  parallel_for(rows * heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t key = n / group * features;
      const Head head{q.data<const float>() + key,
                      k.data<const float>() + key,
                      v.data<const float>() + n * values,
                      keep.data<const float>() + n * (keep_of_features ? features : 1),
                      beta.data<const float>() ? beta.data<const float>() + n : nullptr,
                      static_cast<float>(scale),
                      state.data<float>() + n * features * values,
                      out.data<float>() + n * values,
                      features,
                      values,
                      keep_of_features};
      by_value ? by_columns(head) : by_rows(head);
    }
  });
}

}  // namespace flashpo::FLASHPO_ISA
