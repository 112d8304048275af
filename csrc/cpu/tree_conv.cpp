// tree_conv on the CPU, in fp32. The formula is that of python/flashpo/ops/tree_conv.py.
//
// In backward, each block of features belongs to one thread. No other thread adds to the gradients of its inputs and
// weights, so these are summed token by token, whatever the number of threads.
#include <algorithm>

#include "../ops.h"
#include "for_dtype.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

constexpr int64_t BLOCK = 64;    // features in one piece of work
// Weight gradients are first summed over so many tokens, because small terms would vanish in a large sum
constexpr int64_t TOKENS = 64;
constexpr int64_t MOST = 8;      // the largest width of a convolution

struct Convolution {
  int64_t tokens, features, width;
  const float* weight;       // (width, features); the newest token's row is first
  const int64_t* ancestors;  // (width - 1, tokens)

  Convolution(const Tensor& x, const Tensor& weight, const Tensor& ancestors)
      : tokens(x.size(0)),
        features(x.size(-1)),
        width(weight.size(0)),
        weight(weight.data<const float>()),
        ancestors(ancestors.data<const int64_t>()) {
    expect(x.dim() == 2 && (x.stride(1) == 1 || features <= 1), "x must have 2 dimensions and be dense along features");
    expect(width >= 1 && width <= MOST, "weight must have 1 to 8 rows");
    expect_dense("weight", weight, DType::f32, {width, features});
    expect_dense("ancestors", ancestors, DType::i64, {width - 1, tokens});
    for (int64_t i = 0; i < (width - 1) * tokens; ++i)
      expect(this->ancestors[i] == tokens || (this->ancestors[i] >= 0 && this->ancestors[i] < i % tokens),
             "ancestors must be earlier tokens");
  }
  // Find the token itself and its ancestors; return their number.
  int64_t window(int64_t t, int64_t (&found)[MOST]) const {
    found[0] = t;
    int64_t count = 1;
    while (count < width && ancestors[(count - 1) * tokens + t] < tokens) {
      found[count] = ancestors[(count - 1) * tokens + t];
      ++count;
    }
    return count;
  }
};

// The gradients of the features [begin, stop), which are at most BLOCK.
template <typename T>
void backward(const Convolution& conv, const Tensor& x, const T* d_out, int64_t begin, int64_t stop, float* dx,
              float* d_weight, float* d_bias) {
  const int64_t features = conv.features, count = stop - begin;
  const T* from = x.data<const T>() + begin;
  float sums[MOST + 1][BLOCK] = {}, totals[MOST + 1][BLOCK] = {};  // the last row is for the bias
  const auto add_up = [&] {
    for (int64_t j = 0; j <= MOST; ++j) {
      for (int64_t c = 0; c < BLOCK; c += W) {
        store(totals[j] + c, load(totals[j] + c) + load(sums[j] + c));
        store(sums[j] + c, vf{});
      }
    }
  };
  for (int64_t t = 0; t < conv.tokens; ++t) {
    int64_t found[MOST];
    const int64_t window = conv.window(t, found);
    for (int64_t c = 0; c < count; c += W) {
      const int64_t left = count - c;
      const vf d = load_some(d_out + t * features + begin + c, left);
      store(sums[MOST] + c, load(sums[MOST] + c) + d);
      for (int64_t j = 0; j < window; ++j) {
        float* const to = dx + found[j] * features + begin + c;
        const vf part = d * load_some(conv.weight + j * features + begin + c, left);
        store_some(to, j == 0 ? part : load_some(to, left) + part, left);
        store(sums[j] + c, load(sums[j] + c) + d * load_some(from + found[j] * x.stride(0) + c, left));
      }
    }
    if ((t + 1) % TOKENS == 0) add_up();
  }
  add_up();
  for (int64_t j = 0; j < conv.width; ++j) write_row(totals[j], 1.0f, count, d_weight + j * features + begin);
  write_row(totals[MOST], 1.0f, count, d_bias + begin);
}

}  // namespace

void tree_conv_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& ancestors,
                   const Tensor& out, int threads) {
  const Convolution conv(x, weight, ancestors);
  expect_dense("bias", bias, DType::f32, {conv.features}, true);
  expect_dense("out", out, x.dtype(), {conv.tokens, conv.features});
  const float* const offset = bias.data<const float>();
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    parallel_for(conv.tokens, threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        int64_t found[MOST];
        const int64_t window = conv.window(t, found);
        T* const to = out.data<T>() + t * conv.features;
        for (int64_t c = 0; c < conv.features; c += W) {
          const int64_t left = conv.features - c;
          vf sum = offset != nullptr ? load_some(offset + c, left) : vf{};
          for (int64_t j = 0; j < window; ++j)
            sum += load_some(conv.weight + j * conv.features + c, left) *
                   load_some(x.data<const T>() + found[j] * x.stride(0) + c, left);
          store_some(to + c, sum, left);
        }
      }
    });
  });
}

// dx, d_weight (width, features) and d_bias are fp32.
void tree_conv_bwd(const Tensor& x, const Tensor& weight, const Tensor& ancestors, const Tensor& d_out,
                   const Tensor& dx, const Tensor& d_weight, const Tensor& d_bias, int threads) {
  const Convolution conv(x, weight, ancestors);
  expect_dense("d_out", d_out, x.dtype(), {conv.tokens, conv.features});
  expect_dense("dx", dx, DType::f32, {conv.tokens, conv.features});
  expect_dense("d_weight", d_weight, DType::f32, {conv.width, conv.features});
  expect_dense("d_bias", d_bias, DType::f32, {conv.features});
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    parallel_for((conv.features + BLOCK - 1) / BLOCK, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        backward<T>(conv, x, d_out.data<const T>(), i * BLOCK, std::min((i + 1) * BLOCK, conv.features),
                    dx.data<float>(), d_weight.data<float>(), d_bias.data<float>());
    });
  });
}

}  // namespace flashpo::FLASHPO_ISA
