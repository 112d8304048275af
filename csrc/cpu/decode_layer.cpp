// The operations between the matrix products of a decoder layer, on the CPU: each goes over the rows of tokens in one
// pass. Every intermediate result is rounded to T where transformers' modules round it.
#include <algorithm>

#include "../ops.h"
#include "for_dtype.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

constexpr int64_t SMALL = 32768;  // with fewer numbers than this, a second thread costs more than it saves
constexpr int MAX_FEATURES = 512;  // of one head

template <typename T>
vf rounded(vf x) {
  alignas(64) T lanes[W];
  store(lanes, x);
  return load(lanes);
}
template <>
vf rounded<float>(vf x) {
  return x;
}
template <>
vf rounded<bf16>(vf x) {
  return (vf)(to_bits(x, static_cast<bf16*>(nullptr)) << 16);
}

// Call f(j, count) for every W of n numbers; the last time with fewer.
template <typename F>
void each_vector(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + W <= n; j += W) f(j, W);
  if (j < n) f(j, static_cast<int>(n - j));
}
template <typename T>
vf load_some(const T* p, int count) {
  return count == W ? load(p) : load_part(p, count, 0);
}
template <typename T>
void store_some(T* p, vf x, int count) {
  count == W ? store(p, x) : store_part(p, x, count);
}

float sum_of(vf x) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

// Numbers of the norm. H is the type of h; P is the type to which the product with the weight is rounded.
template <typename H, typename P>
vf scaled(vf x, float inverse, vf weight, bool unit_offset) {
  return unit_offset ? rounded<H>(x * inverse * (1.0f + weight)) : rounded<P>(rounded<H>(x * inverse) * weight);
}

// H, the type of `total`, and P, the type of the weight, are T or float.
template <typename T, typename H, typename P>
void norm_row(const T* x, const H* residual, const P* weight, int64_t n, float eps, bool unit_offset, T* out,
              H* total) {
  vf squares{};
  each_vector(n, [&](int64_t j, int count) {
    vf h = load_some(x + j, count);
    if (residual) h = rounded<H>(h + load_some(residual + j, count));
    store_some(total + j, h, count);
    squares += h * h;
  });
  const float inverse = 1 / std::sqrt(sum_of(squares) / n + eps);
  each_vector(n, [&](int64_t j, int count) {
    const vf h = load_some(total + j, count);  // the result is rounded to T once more when it is stored
    store_some(out + j, scaled<H, float>(h, inverse, load_some(weight + j, count), unit_offset), count);
  });
}

// T is the type of the heads, N that of a head after its norm, and R the one to which the rotation is rounded.
template <typename T, typename N, typename R>
struct Rope {
  const float *cos, *sin;  // of one token
  int64_t turned, features;
  float eps;
  bool unit_offset;

  // Process one head from x to out; both hold `features` numbers and room for W more.
  void operator()(const T* x, const float* weight, float* out) const {
    alignas(64) float head[MAX_FEATURES + W];
    vf squares{};
    each_vector(features, [&](int64_t j, int count) {
      const vf h = load_some(x + j, count);
      store(head + j, h);
      squares += h * h;
    });
    if (weight) {
      const float inverse = 1 / std::sqrt(sum_of(squares) / features + eps);
      each_vector(features, [&](int64_t j, int count) {
        store(head + j, scaled<T, N>(load(head + j), inverse, load_some(weight + j, count), unit_offset));
      });
    }
    std::copy(head + turned, head + features, out + turned);
    const int64_t half = turned / 2;
    each_vector(half, [&](int64_t j, int count) {
      const vf first = load(head + j), second = load_some(head + half + j, count);
      const auto turn = [&](vf a, vf b, int64_t at) {
        return rounded<R>(rounded<R>(a * load_some(cos + at, count)) + rounded<R>(b * load_some(sin + at, count)));
      };
      store_some(out + j, turn(first, -second, j), count);
      store_some(out + half + j, turn(second, first, half + j), count);
    });
  }
};

template <typename T, typename N, typename R>
void rope_row(const T* q, const T* k, const T* v, const Rope<T, N, R>& rope, const float* q_weight,
              const float* k_weight, int64_t q_heads, int64_t kv_heads, int64_t slot, T* out, T* k_cache,
              T* v_cache) {
  alignas(64) float head[MAX_FEATURES + W];
  const int64_t n = rope.features, block = slot / 64, offset = slot % 64;
  // A key is a column, with a cache line for each feature; prefetched, the lines arrive while the queries are computed
  if (slot >= 0)
    for (int64_t j = 0; j < kv_heads * n; ++j) __builtin_prefetch(k_cache + (block * kv_heads * n + j) * 64 + offset, 1);
  for (int64_t h = 0; h < q_heads; ++h) {
    rope(q + h * n, q_weight, head);
    each_vector(n, [&](int64_t j, int count) { store_some(out + h * n + j, load(head + j), count); });
  }
  if (slot < 0) return;
  for (int64_t h = 0; h < kv_heads; ++h) {
    rope(k + h * n, k_weight, head);
    alignas(64) T key[MAX_FEATURES + W];
    each_vector(n, [&](int64_t j, int) { store(key + j, load(head + j)); });
    T* column = k_cache + (block * kv_heads + h) * n * 64 + offset;
    for (int64_t j = 0; j < n; ++j) column[j * 64] = key[j];
    std::copy_n(v + h * n, n, v_cache + ((block * kv_heads + h) * 64 + offset) * n);
  }
}

vf silu(vf x) { return x / (1.0f + exp(-x)); }
vf gelu_tanh(vf x) { return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

template <typename T>
void gated_row(const T* gate, const T* up, int64_t n, int activation, T* out) {
  each_vector(n, [&](int64_t j, int count) {
    const vf x = load_some(gate + j, count);
    const vf active = rounded<T>(activation == 0 ? silu(x) : gelu_tanh(x));
    store_some(out + j, active * load_some(up + j, count), count);
  });
}

void expect_rows(const char* name, const Tensor& x, DType dtype, int64_t rows, int64_t columns) {
  expect(x.dim() == 2 && x.dtype() == dtype && x.size(0) == rows && x.size(1) == columns &&
             (x.stride(1) == 1 || columns == 1), name);
}
template <typename T>
const T* row_of(const Tensor& x, int64_t i) {
  return x.data<const T>() + i * x.stride(0);
}

// Call run with numbers of the types of two tensors, each of which is x's type T or float.
template <typename T, typename F>
void for_wider(bool first_wide, bool second_wide, F&& run) {
  if (first_wide)
    second_wide ? run(float{}, float{}) : run(float{}, T{});
  else
    second_wide ? run(T{}, float{}) : run(T{}, T{});
}

bool is_wide(const Tensor& x) { return x.defined() && x.dtype() == DType::f32; }

// n numbers from `at` as floats: those in memory if they are floats, otherwise a copy in `copy`.
const float* as_floats(const Tensor& x, int64_t at, int64_t n, float* copy) {
  if (!x.defined()) return nullptr;
  if (x.dtype() == DType::f32) return x.data<const float>() + at;
  for_dtype("cos, sin and weights", x, [&](auto element) {
    const auto* from = x.data<const decltype(element)>() + at;
    each_vector(n, [&](int64_t j, int count) { store_some(copy + j, load_some(from + j, count), count); });
  });
  return copy;
}

}  // namespace

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool unit_offset,
                  const Tensor& out, const Tensor& total, int threads) {
  const int64_t rows = x.size(0), n = x.size(1);
  expect_dense("x", x, x.dtype(), {rows, n});
  const DType sum = is_wide(residual) ? DType::f32 : x.dtype();
  expect_dense("residual", residual, sum, {rows, n}, true);
  expect_dense("weight", weight, is_wide(weight) ? DType::f32 : x.dtype(), {n});
  expect_dense("out", out, x.dtype(), {rows, n});
  expect_dense("total", total, sum, {rows, n});
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    for_wider<T>(is_wide(residual), is_wide(weight), [&](auto of_sum, auto of_weight) {
      using H = decltype(of_sum);
      using P = decltype(of_weight);
      const H* from = residual.data<const H>();
      parallel_for(rows, rows * n < SMALL ? 1 : threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          norm_row(x.data<const T>() + i * n, from ? from + i * n : nullptr, weight.data<const P>(), n,
                   static_cast<float>(eps), unit_offset, out.data<T>() + i * n, total.data<H>() + i * n);
      });
    });
  });
}

void rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 const Tensor& q_weight, const Tensor& k_weight, double eps, bool unit_offset, const Tensor& k_cache,
                 const Tensor& v_cache, const Tensor& slot, const Tensor& out, int threads) {
  const DType dtype = q.dtype();
  const int64_t rows = q.size(0), q_heads = out.size(1), n = out.size(2), kv_heads = k_cache.size(1);
  const int64_t blocks = k_cache.size(0), turned = cos.size(1);
  expect(n <= MAX_FEATURES, "a head has at most 512 features");
  expect(turned <= n && turned % 2 == 0, "cos must have an even number of features, at most the head's");
  expect_rows("q", q, dtype, rows, q_heads * n);
  expect_rows("k", k, dtype, rows, kv_heads * n);
  expect_rows("v", v, dtype, rows, kv_heads * n);
  const DType of_angle = is_wide(cos) ? DType::f32 : dtype, of_weight = is_wide(q_weight) ? DType::f32 : dtype;
  expect_dense("cos", cos, of_angle, {rows, turned});
  expect_dense("sin", sin, of_angle, {rows, turned});
  expect_dense("q_weight", q_weight, of_weight, {n}, true);
  expect_dense("k_weight", k_weight, of_weight, {n}, true);
  expect_dense("k_cache", k_cache, dtype, {blocks, kv_heads, n, 64});
  expect_dense("v_cache", v_cache, dtype, {blocks, kv_heads, 64, n});
  expect_dense("slot", slot, DType::i64, {rows});
  expect_dense("out", out, dtype, {rows, q_heads, n});
  const int64_t* slots = slot.data<const int64_t>();
  expect(std::all_of(slots, slots + rows, [&](int64_t s) { return s < blocks * 64; }),
         "slot holds values beyond the cache");
  alignas(64) float q_floats[MAX_FEATURES], k_floats[MAX_FEATURES];
  const float *const of_q = as_floats(q_weight, 0, n, q_floats), *const of_k = as_floats(k_weight, 0, n, k_floats);
  const bool wide_heads = is_wide(q_weight) && !unit_offset;
  for_dtype("q", q, [&](auto element) {
    using T = decltype(element);
    for_wider<T>(wide_heads, wide_heads || is_wide(cos), [&](auto of_head, auto of_turned) {
      using R = Rope<T, decltype(of_head), decltype(of_turned)>;
      // writing a key costs more, since each of its numbers goes into a different cache line
      const int64_t numbers = rows * (q_heads + 2 * kv_heads) * n;
      parallel_for(rows, numbers < SMALL / 4 ? 1 : threads, [&](int64_t begin, int64_t end) {
        alignas(64) float cos_floats[MAX_FEATURES], sin_floats[MAX_FEATURES];
        for (int64_t i = begin; i < end; ++i) {
          const R rope{as_floats(cos, i * turned, turned, cos_floats), as_floats(sin, i * turned, turned, sin_floats),
                       turned, n, static_cast<float>(eps), unit_offset};
          rope_row(row_of<T>(q, i), row_of<T>(k, i), row_of<T>(v, i), rope, of_q, of_k, q_heads, kv_heads, slots[i],
                   out.data<T>() + i * q_heads * n, k_cache.data<T>(), v_cache.data<T>());
        }
      });
    });
  });
}

void gated_activation(const Tensor& gate, const Tensor& up, int activation, const Tensor& out, int threads) {
  const int64_t rows = gate.size(0), n = gate.size(1);
  expect_rows("gate", gate, gate.dtype(), rows, n);
  expect_rows("up", up, gate.dtype(), rows, n);
  expect_dense("out", out, gate.dtype(), {rows, n});
  for_dtype("gate", gate, [&](auto element) {
    using T = decltype(element);
    parallel_for(rows, rows * n < SMALL / 2 ? 1 : threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        gated_row(row_of<T>(gate, i), row_of<T>(up, i), n, activation, out.data<T>() + i * n);
    });
  });
}

}  // namespace flashpo::FLASHPO_ISA
