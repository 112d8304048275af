// The elementwise half of linear_logprob on the CPU: tiles (J, N) of logits, a row per vocabulary entry and a column
// per token, so that W tokens fill a vector and their sums never cross lanes. The GEMMs are torch's.
#include <algorithm>

#include "../ops.h"
#include "online.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

struct Tile {  // what a tile is made of, besides its values
  int64_t width, tokens, stride, start;  // start: the vocabulary entry of its first row
  const int64_t* target;                 // (N,), in the whole vocabulary
  const float* bias;                     // (J,) or null
  const float* inv_temperature;          // (N,) or null
  float inv_temperature_of_all;
  Transform transform;

  vf inv_t(int64_t column, int lanes) const {
    if (inv_temperature == nullptr) return splat(inv_temperature_of_all);
    return lanes == W ? load(inv_temperature + column) : load_part(inv_temperature + column, lanes, 1.0f);
  }
  float bias_of(int64_t row) const { return bias ? bias[row] : 0.0f; }
  // Each token's target as a row of this tile; one before or after it stays outside, ordered.
  vi local_target(int64_t column, int lanes) const {
    vi local = splat_int(0);
    for (int i = 0; i < lanes; ++i)
      local[i] = static_cast<int32_t>(std::clamp<int64_t>(target[column + i] - start, -1, width));
    return local;
  }
};

template <typename T>
vf load_lanes(const T* p, int lanes) {
  return lanes == W ? load(p) : load_part(p, lanes, 0.0f);
}
template <typename T>
void store_lanes(T* p, vf x, int lanes) {
  lanes == W ? store(p, x) : store_part(p, x, lanes);
}

// The running sums between tiles: a partial's rows, and below them the compensations of SUM and WSUM.
constexpr int state_rows(bool side) { return (side ? ROWS : 4) + 2; }

// Columns [column, column + lanes) of `rows` rows into `state` (state_rows, N).
template <typename T, bool CAPPED, bool SIDE>
void fold_columns(const T* tile, const Tile& t, int64_t row, int rows, int64_t column, int lanes, float* state) {
  float* s = state + column;
  const auto at = [&](int r) { return s + r * t.tokens; };
  constexpr int SUM_LOW = state_rows(SIDE) - 2, WSUM_LOW = SUM_LOW + 1;
  const vf inv_t = t.inv_t(column, lanes);
  vf y[BLOCK];
  for (int i = 0; i < rows; ++i)
    y[i] = t.transform.bits<CAPPED>(load_lanes(tile + (row + i) * t.stride + column, lanes), t.bias_of(row + i), inv_t);

  Online<SIDE> online;
  online.ref = load_lanes(at(REF), lanes);
  online.sum = {load_lanes(at(SUM), lanes), load_lanes(at(SUM_LOW), lanes)};
  online.wsum = {load_lanes(at(WSUM), lanes), load_lanes(at(WSUM_LOW), lanes)};
  const vi target = t.local_target(column, lanes);
  if constexpr (SIDE) {
    online.sqsum = load_lanes(at(SQSUM), lanes);
    online.ysum = load_lanes(at(YSUM), lanes);
    online.before = load_lanes(at(BEFORE), lanes);
    online.top = load_lanes(at(MAX), lanes);
  }
  online.fold(y, rows, target, [&](int i) { return splat_int(static_cast<int32_t>(row + i)); });
  store_lanes(at(REF), online.ref, lanes);
  store_lanes(at(SUM), online.sum.value, lanes);
  store_lanes(at(SUM_LOW), online.sum.low, lanes);
  store_lanes(at(WSUM), online.wsum.value, lanes);
  store_lanes(at(WSUM_LOW), online.wsum.low, lanes);
  if constexpr (SIDE) {
    store_lanes(at(SQSUM), online.sqsum, lanes);
    store_lanes(at(YSUM), online.ysum, lanes);
    store_lanes(at(BEFORE), online.before, lanes);
    store_lanes(at(MAX), online.top, lanes);
  }
  for (int i = 0; i < lanes; ++i) {
    const int64_t of_block = target[i] - row;
    if (of_block >= 0 && of_block < rows) at(TARGET)[i] = y[of_block][i];
  }
}

// Calls f(row, rows, column, lanes) for every block of a thread's share of the columns.
template <typename F>
void for_blocks(const Tile& t, int threads, F&& f) {
  const int64_t groups = (t.tokens + W - 1) / W;
  parallel_for(groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < t.width; row += BLOCK)
      for (int64_t group = begin; group < end; ++group) {
        const int64_t column = group * W;
        f(row, static_cast<int>(std::min<int64_t>(BLOCK, t.width - row)), column,
          static_cast<int>(std::min<int64_t>(W, t.tokens - column)));
      }
  });
}

// Per-token constants of the backward pass.
struct Upstream {
  const float *lse, *entropy, *d_logprob, *d_entropy;
};

// A block of logits becomes its gradient in place, and, where `rows_out` (N, J) is given, transposed there too.
template <typename T, bool CAPPED>
void grad_columns(T* tile, const Tile& t, const Upstream& up, int64_t row, int rows, int64_t column, int lanes,
                  T* rows_out, int64_t out_stride) {
  const vf inv_t = t.inv_t(column, lanes);
  const vf lse_bits = load_lanes(up.lse + column, lanes) * LOG2E;
  const vf entropy = load_lanes(up.entropy + column, lanes);
  const vf dl = up.d_logprob ? load_lanes(up.d_logprob + column, lanes) : vf{};
  const vf dh = up.d_entropy ? load_lanes(up.d_entropy + column, lanes) : vf{};
  const Gradient g{-(dl + dh * entropy), dh * -LN2};
  const vi target = t.local_target(column, lanes);
  alignas(64) T block[BLOCK][W];
  for (int i = 0; i < rows; ++i) {
    const vf x = load_lanes(tile + (row + i) * t.stride + column, lanes);
    const float bias = t.bias_of(row + i);
    vf d = g(t.transform.bits<CAPPED>(x, bias, inv_t), lse_bits);
    d = splat_int(static_cast<int32_t>(row + i)) == target ? d + dl : d;
    store(block[i], d * t.transform.slope<CAPPED>(x, bias, inv_t));
    std::memcpy(tile + (row + i) * t.stride + column, block[i], lanes * sizeof(T));
  }
  if (rows_out == nullptr) return;
  for (int lane = 0; lane < lanes; ++lane) {
    T* out = rows_out + (column + lane) * out_stride + row;
    for (int i = 0; i < rows; ++i) out[i] = block[i][lane];
  }
}

Tile describe(const Tensor& tile, const Tensor& target, int64_t start, const Tensor& bias,
              const Tensor& inv_temperature, double inv_temperature_of_all, double logit_scale, double softcap) {
  expect(tile.dim() == 2 && tile.stride(1) == 1, "tile must be (J, N), dense along N");
  const int64_t width = tile.size(0), tokens = tile.size(1);
  expect_dense("target", target, DType::i64, {tokens});
  expect_dense("bias", bias, DType::f32, {width}, true);
  expect_dense("inv_temperature", inv_temperature, DType::f32, {tokens}, true);
  return {width,
          tokens,
          tile.stride(0),
          start,
          target.data<int64_t>(),
          bias.data<float>(),
          inv_temperature.data<float>(),
          static_cast<float>(inv_temperature_of_all),
          {static_cast<float>(logit_scale), static_cast<float>(softcap)}};
}

}  // namespace

void linear_logprob_fold(const Tensor& tile, const Tensor& target, int64_t start, const Tensor& bias,
                         const Tensor& inv_temperature, double inv_temperature_of_all, double logit_scale,
                         double softcap, const Tensor& state, int threads) {
  const Tile t = describe(tile, target, start, bias, inv_temperature, inv_temperature_of_all, logit_scale, softcap);
  const bool side = state.size(0) == state_rows(true), capped = bias.defined() || softcap != 0;
  expect_dense("state", state, DType::f32, {state_rows(side), t.tokens});
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto fold = capped ? (side ? fold_columns<T, true, true> : fold_columns<T, true, false>)
                             : (side ? fold_columns<T, false, true> : fold_columns<T, false, false>);
    for_blocks(t, threads, [&](int64_t row, int rows, int64_t column, int lanes) {
      fold(tile.data<const T>(), t, row, rows, column, lanes, state.data<float>());
    });
  };
  switch (tile.dtype()) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(bf16{});
    case DType::f16: return run(f16{});
    default: expect(false, "tile must be float32, bfloat16 or float16");
  }
}

void linear_logprob_grad(const Tensor& tile, const Tensor& target, int64_t start, const Tensor& bias,
                         const Tensor& inv_temperature, double inv_temperature_of_all, double logit_scale,
                         double softcap, const Tensor& lse, const Tensor& entropy, const Tensor& d_logprob,
                         const Tensor& d_entropy, const Tensor& rows_out, int threads) {
  const Tile t = describe(tile, target, start, bias, inv_temperature, inv_temperature_of_all, logit_scale, softcap);
  expect_dense("lse", lse, DType::f32, {t.tokens});
  expect_dense("entropy", entropy, DType::f32, {t.tokens});
  expect_dense("d_logprob", d_logprob, DType::f32, {t.tokens}, true);
  expect_dense("d_entropy", d_entropy, DType::f32, {t.tokens}, true);
  expect(!rows_out.defined() || (rows_out.dim() == 2 && rows_out.dtype() == tile.dtype() && rows_out.stride(1) == 1 &&
                                 rows_out.size(0) == t.tokens && rows_out.size(1) == t.width),
         "rows_out must be the transposed shape of tile, in its dtype");
  const Upstream up{lse.data<float>(), entropy.data<float>(), d_logprob.data<float>(), d_entropy.data<float>()};
  const int64_t out_stride = rows_out.defined() ? rows_out.stride(0) : 0;
  const bool capped = bias.defined() || softcap != 0;
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto grad = capped ? grad_columns<T, true> : grad_columns<T, false>;
    for_blocks(t, threads, [&](int64_t row, int rows, int64_t column, int lanes) {
      grad(tile.data<T>(), t, up, row, rows, column, lanes, rows_out.data<T>(), out_stride);
    });
  };
  switch (tile.dtype()) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(bf16{});
    case DType::f16: return run(f16{});
    default: expect(false, "tile must be float32, bfloat16 or float16");
  }
}

}  // namespace flashpo::FLASHPO_ISA
