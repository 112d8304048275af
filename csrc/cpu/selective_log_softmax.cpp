// selective_log_softmax on the CPU: one pass over each row of logits, with W interleaved parts of the row in a vector.
#include <algorithm>

#include "../ops.h"
#include "for_dtype.h"
#include "online.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

struct Rows {  // (B, T, V) logits with unit stride along V
  const Tensor& logits;
  int64_t count() const { return logits.size(0) * logits.size(1); }
  int64_t offset(int64_t row) const {
    const int64_t t = logits.size(1);
    return row / t * logits.stride(0) + row % t * logits.stride(1);
  }
};

// Join the W lanes of one row. x_target and the lanes are values; unit turns them into bits.
template <bool SIDE>
void finish(const Online<SIDE>& o, float x_target, float unit, int64_t vocab, float* out, int64_t stride) {
  float ref = LOWEST;
  for (int i = 0; i < W; ++i) ref = std::max(ref, o.ref[i]);
  float sum = 0, wsum = 0, sqsum = 0, ysum = 0, before = -INFINITY, top = -INFINITY;
  for (int i = 0; i < W; ++i) {
    const float shift = std::max((std::max(o.ref[i], LOWEST) - ref) * unit, NOTHING);
    const float scale = std::exp2(shift);
    sum += o.sum.value[i] * scale;
    wsum += (o.wsum.value[i] + shift * o.sum.value[i]) * scale;
    sqsum += o.sqsum.value[i] * scale * scale;
    ysum += o.ysum.value[i];
    before = std::max(before, o.before[i]);
    top = std::max(top, o.top[i]);
  }
  const float bits = std::log2(sum);
  out[LOGPROB * stride] = ((x_target - ref) * unit - bits) * LN2;
  out[ENTROPY * stride] = (bits - wsum / sum) * LN2;
  out[LOG_Z * stride] = ref * unit;
  out[LOG_Z_REST * stride] = bits + rounding_of(ref, unit);
  if (SIDE) {
    out[LOG_SUM_SQ_PROBS * stride] = (std::log2(sqsum) - 2 * bits) * LN2;
    out[MEAN_LOGIT * stride] = ysum * unit * (LN2 / vocab);
    out[IS_TOP1 * stride] = x_target >= top && x_target > before;
  }
}

// How many bytes ahead of the loads to prefetch, because the loads pause while a block is computed.
constexpr int AHEAD = 4096;

template <typename T, bool SIDE>
void forward_row(const T* row, int64_t vocab, int64_t index, float unit_of_all, float* out, int64_t stride) {
  Online<SIDE> online;
  const vi target = splat_int(static_cast<int32_t>(index));
  const vf unit = splat(unit_of_all);
  vf x[BLOCK];
  for (int64_t start = 0; start < vocab; start += BLOCK * W) {
    const auto position = [&](int i) { return splat_int(static_cast<int32_t>(start + i * W)) + iota(); };
    if (vocab - start >= BLOCK * W) {
      for (int i = 0; i < BLOCK; ++i) x[i] = load(row + start + i * W);
      online.fold(x, BLOCK, unit, target, position, reinterpret_cast<const char*>(row + start) + AHEAD, W * sizeof(T));
      continue;
    }
    const int left = static_cast<int>(vocab - start), whole = left / W, rest = left % W;
    for (int i = 0; i < whole; ++i) x[i] = load(row + start + i * W);
    if (whole > 0) online.fold(x, whole, unit, target, position);
    if (rest > 0) {
      x[whole] = load_part(row + start + whole * W, rest, -INFINITY);
      Sum ysum = online.ysum;  // the absent lanes must not enter this sum
      ysum.add(iota() < splat_int(rest) ? x[whole] : vf{});
      online.fold(x + whole, 1, unit, target, [&](int) { return position(whole); });
      online.ysum = ysum;
    }
  }
  finish<SIDE>(online, load_part(row + index, 1, 0)[0], unit_of_all, vocab, out, stride);
}

template <typename T>
void forward(const Tensor& logits, const int64_t* index, float unit, int64_t ignore_index, const Tensor& out,
             int threads) {
  const Rows rows{logits};
  const int64_t n = rows.count(), vocab = logits.size(2);
  const bool side = out.size(0) == RESULTS;
  parallel_for(n, n * vocab < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* o = out.data<float>() + row;
      if (index[row] == ignore_index) {
        for (int i = 0; i < out.size(0); ++i) o[i * n] = 0;
        continue;
      }
      const T* x = logits.data<const T>() + rows.offset(row);
      (side ? forward_row<T, true> : forward_row<T, false>)(x, vocab, index[row], unit, o, n);
    }
  });
}

template <typename T>
void backward_row(const T* x, T* out, int64_t vocab, int64_t index, const Gradient& g, float at_target) {
  const float x_target = load_part(x + index, 1, 0)[0];
  int64_t j = 0;
  for (; j + W <= vocab; j += W) store(out + j, g(load(x + j)));
  if (j < vocab) store_part(out + j, g(load_part(x + j, vocab - j, -INFINITY)), vocab - j);
  store_part(out + index, g(splat(x_target)) + at_target, 1);  // after the row is written; the sum is rounded only once
}

template <typename T>
void backward(const Tensor& logits, const int64_t* index, float inv_temperature, int64_t ignore_index,
              const Tensor& rows, const float* d_logprob, const float* d_entropy, const Tensor& out, int threads) {
  const Rows from{logits}, to{out};
  const int64_t n = from.count(), vocab = logits.size(2);
  const auto result = [&](Result r, int64_t row) { return rows.data<float>()[r * n + row]; };
  parallel_for(n, n * vocab < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* o = out.data<T>() + to.offset(row);
      if (index[row] == ignore_index) {
        std::memset(static_cast<void*>(o), 0, vocab * sizeof(T));
        continue;
      }
      const float dl = d_logprob ? d_logprob[row] : 0, dh = d_entropy ? d_entropy[row] : 0;
      const Gradient g{splat(-(dl + dh * result(ENTROPY, row)) * inv_temperature), splat(-dh * LN2 * inv_temperature),
                       splat(inv_temperature * LOG2E), splat(result(LOG_Z, row)), splat(result(LOG_Z_REST, row))};
      backward_row(logits.data<const T>() + from.offset(row), o, vocab, index[row], g, dl * inv_temperature);
    }
  });
}

void check(const Tensor& logits, const Tensor& index, int64_t ignore_index) {
  expect(logits.dim() == 3 && logits.size(2) > 0 && logits.stride(2) == 1, "logits must be (B, T, V), dense along V");
  const int64_t n = logits.size(0) * logits.size(1);
  expect_dense("index", index, DType::i64, {n});
  const int64_t* at = index.data<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    expect(at[i] == ignore_index || (at[i] >= 0 && at[i] < logits.size(2)),
           "index holds values outside [0, V) that are not ignore_index");
}

}  // namespace

void selective_log_softmax_fwd(const Tensor& logits, const Tensor& index, float temperature, int64_t ignore_index,
                               const Tensor& out, int threads) {
  check(logits, index, ignore_index);
  const int64_t n = index.size(0);
  expect_dense("out", out, DType::f32, {out.size(0) == RESULTS ? RESULTS : 4, n});
  const float unit = LOG2E / temperature;
  for_dtype("logits", logits, [&](auto element) {
    forward<decltype(element)>(logits, index.data<int64_t>(), unit, ignore_index, out, threads);
  });
}

void selective_log_softmax_bwd(const Tensor& logits, const Tensor& index, float temperature, int64_t ignore_index,
                               const Tensor& rows, const Tensor& d_logprob, const Tensor& d_entropy,
                               const Tensor& out, int threads) {
  check(logits, index, ignore_index);
  const int64_t n = index.size(0);
  expect_dense("rows", rows, DType::f32, {rows.size(0) == RESULTS ? RESULTS : 4, n});
  expect_dense("d_logprob", d_logprob, DType::f32, {n}, true);
  expect_dense("d_entropy", d_entropy, DType::f32, {n}, true);
  expect(out.dim() == 3 && out.dtype() == logits.dtype() && out.stride(2) == 1 && out.size(0) == logits.size(0) &&
             out.size(1) == logits.size(1) && out.size(2) == logits.size(2),
         "out must look like logits");
  for_dtype("logits", logits, [&](auto element) {
    backward<decltype(element)>(logits, index.data<int64_t>(), 1 / temperature, ignore_index, rows,
                                d_logprob.data<float>(), d_entropy.data<float>(), out, threads);
  });
}

}  // namespace flashpo::FLASHPO_ISA
