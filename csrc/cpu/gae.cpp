// gae on the CPU: a sequence is scanned from its end, W tokens at a time, in one pass over memory.
//
// A vector starts at a multiple of W tokens of its sequence, and masked tokens leave value and advantage exactly as
// they are. So the padding of a sequence, or a flat layout, changes no bit of its result.
#include <algorithm>
#include <cstring>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

using vi8 = int8_t __attribute__((vector_size(W)));
using vd = double __attribute__((vector_size(8 * W)));

static inline vd wide(vf x) { return __builtin_convertvector(x, vd); }

static inline vi load_mask(const uint8_t* p, int count) {
  vi8 x{};
  std::memcpy(&x, p, count);
  return __builtin_convertvector(x, vi) != 0;
}

// The lanes of (x, after), joined end to end, starting at lane `by`.
static inline vf shift(vf x, vf after, int by) { return __builtin_shuffle(x, after, iota() + splat_int(by)); }
static inline vi shift(vi x, vi after, int by) { return __builtin_shuffle(x, after, iota() + splat_int(by)); }

struct Moments {  // of the live advantages, relative to the first one found, so that equal ones give exactly 0
  bool begun = false;
  float centre = 0;
  vd sum{}, squares{};
  vi count{};

  void add(vf x, vi live) {
    if (!begun && any(live)) {
      for (int i = 0; i < W; ++i)
        if (live[i]) centre = x[i];
      begun = true;
    }
    const vd deviation = wide(live ? x : splat(centre)) - static_cast<double>(centre);
    sum += deviation;
    squares += deviation * deviation;
    count -= live;
  }
  void store(double* out) const {
    double total = 0, square = 0, n = 0;
    for (int i = 0; i < W; ++i) total += sum[i], square += squares[i], n += count[i];
    const double mean = n > 0 ? total / n : 0;
    out[0] = n;
    out[1] = centre + mean;
    out[2] = std::max(square - total * mean, 0.0);
  }
};

struct Sequence {
  const float *rewards, *values;
  const uint8_t* mask;
  float *advantages, *returns;
};

template <bool MOMENTS>
void scan(const Sequence& s, int64_t tokens, float gamma, float decay, double* out) {
  Moments moments;
  float value_after = 0, advantage_after = 0;
  for (int64_t t = (tokens + W - 1) / W * W - W; t >= 0; t -= W) {
    const int count = static_cast<int>(std::min<int64_t>(W, tokens - t));
    const bool whole = count == W;
    const vi live = load_mask(s.mask + t, count);
    const vf r = live ? (whole ? load(s.rewards + t) : load_part(s.rewards + t, count, 0)) : vf{};
    const vf v = live ? (whole ? load(s.values + t) : load_part(s.values + t, count, 0)) : vf{};

    vf first = v;  // the first live value at or after each lane
    vi found = live;
    if (any(~live))
      for (int by = 1; by < W; by *= 2) {
        first = found ? first : shift(first, vf{}, by);
        found |= shift(found, vi{}, by);
      }
    first = found ? first : splat(value_after);
    vf a = live ? splat(decay) : splat(1.0f);
    vf b = live ? r + gamma * shift(first, splat(value_after), 1) - v : vf{};
    for (int by = 1; by < W; by *= 2) {
      b += a * shift(b, vf{}, by);
      a *= shift(a, splat(1.0f), by);
    }
    const vf advantage = b + a * advantage_after;
    value_after = first[0];
    advantage_after = advantage[0];

    const vf shown = live ? advantage : vf{};
    if (whole) {
      store(s.advantages + t, shown);
      store(s.returns + t, shown + v);
    } else {
      store_part(s.advantages + t, shown, count);
      store_part(s.returns + t, shown + v, count);
    }
    if constexpr (MOMENTS) moments.add(advantage, live);
  }
  if constexpr (MOMENTS) moments.store(out);
}

}  // namespace

void gae_fwd(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens, double gamma,
             double lam, const Tensor& advantages, const Tensor& returns, const Tensor& moments, int threads) {
  const bool flat = cu_seqlens.defined();
  const int64_t sequences = expect_gae(rewards, values, mask, cu_seqlens, advantages, returns, moments, kDLCPU);
  const int64_t batch = rewards.size(0), length = rewards.size(1);
  const int64_t* starts = cu_seqlens.data<const int64_t>();
  if (flat)
    expect(starts[0] == 0 && starts[sequences] == length && std::is_sorted(starts, starts + sequences + 1),
           "cu_seqlens must rise from 0 to the number of tokens");

  const auto run = [&](int64_t i) {
    const int64_t row = flat ? 0 : i, start = flat ? starts[i] : 0, tokens = flat ? starts[i + 1] - start : length;
    const Sequence s{rewards.data<const float>() + row * rewards.stride(0) + start,
                     values.data<const float>() + row * values.stride(0) + start,
                     mask.data<const uint8_t>() + row * mask.stride(0) + start,
                     advantages.data<float>() + row * length + start, returns.data<float>() + row * length + start};
    const float decay = static_cast<float>(gamma * lam);
    if (moments.defined())
      scan<true>(s, tokens, static_cast<float>(gamma), decay, moments.data<double>() + 3 * i);
    else
      scan<false>(s, tokens, static_cast<float>(gamma), decay, nullptr);
  };
  // Each thread gets the same number of tokens, and takes the sequences that begin among them, including empty ones.
  const auto first_from = [&](int64_t token) {
    return flat ? std::lower_bound(starts, starts + sequences, token) - starts : (token + length - 1) / length;
  };
  const int64_t total = batch * length;
  if (total == 0) {
    for (int64_t i = 0; i < sequences; ++i) run(i);
    return;
  }
  parallel_for(total, total < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = first_from(begin), stop = end == total ? sequences : first_from(end); i < stop; ++i) run(i);
  });
}

void gae_whiten(const Tensor& advantages, const Tensor& mask, const Tensor& moments, double eps, int threads) {
  const int64_t tokens = advantages.size(0), parts = moments.size(0);
  expect_dense("advantages", advantages, DType::f32, {tokens});
  expect_dense("mask", mask, DType::boolean, {tokens});
  expect_dense("moments", moments, DType::f64, {parts, 3});
  const double* m = moments.data<const double>();
  double n = 0, mean = 0, squares = 0;
  for (int64_t i = 0; i < parts; ++i, m += 3) {
    if (m[0] == 0) continue;
    const double difference = m[1] - mean, before = n;
    n += m[0];
    mean += before == 0 ? difference : difference * (m[0] / n);
    squares += m[2] + (before == 0 ? 0 : difference * difference * before * (m[0] / n));
  }
  const double scale = 1 / std::sqrt(squares / std::max(n - 1, 1.0) + eps);
  parallel_for(tokens, tokens < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    float* x = advantages.data<float>();
    const uint8_t* live = mask.data<const uint8_t>();
    int64_t t = begin;
    for (; t + W <= end; t += W) {
      const vf white = __builtin_convertvector((wide(load(x + t)) - mean) * scale, vf);
      store(x + t, load_mask(live + t, W) ? white : vf{});
    }
    for (; t < end; ++t) x[t] = live[t] ? static_cast<float>((x[t] - mean) * scale) : 0;
  });
}

}  // namespace flashpo::FLASHPO_ISA
