// The elementwise half of linear_logprob on the CPU, on tiles (J, N) of logits. A row is a vocabulary entry and a
// column a token, so that W tokens fill a vector and their sums never cross lanes. The GEMMs are torch's.
#include "../ops.h"
#include "for_dtype.h"
#include "logit_tiles.h"

namespace flashpo::FLASHPO_ISA {
namespace {

struct Tile {  // all of a tile except its values
  int64_t width, tokens, stride, start;  // start: the vocabulary entry of the first row
  const int64_t* target;                 // (N,), as entries of the whole vocabulary
  const float* bias;                     // (J,) or null
  const float* inv_temperature;          // (N,) or null
  float inv_temperature_of_all;
  Transform transform;

  template <typename Lanes>
  vf inv_t(int64_t column, Lanes lanes) const {
    return inv_temperature ? load_lanes(inv_temperature + column, lanes) : splat(inv_temperature_of_all);
  }
  float bias_of(int64_t row) const { return bias ? bias[row] : 0.0f; }
  vi local_target(int64_t column, int lanes) const { return target_rows(target + column, start, lanes); }
};

// Fold columns [column, column + lanes) of `rows` rows into `state` (state_rows, N); `first`: the state is still empty.
template <typename T, bool CAPPED, bool SIDE, typename Lanes>
void fold_columns(const T* tile, const Tile& t, int64_t row, int rows, int64_t column, Lanes lanes, float* state,
                  bool first) {
  vf x[BLOCK];
  for (int i = 0; i < rows; ++i)
    x[i] = t.transform.value<CAPPED>(load_lanes(tile + (row + i) * t.stride + column, lanes), t.bias_of(row + i));
  const StateColumns<SIDE, Lanes> columns{state + column, t.tokens, lanes};
  Online<SIDE> online = columns.load(first);
  const vi target = t.local_target(column, lanes);
  const vf unit = t.transform.unit<CAPPED>(t.inv_t(column, lanes));
  online.fold(x, rows, unit, target, [&](int i) { return splat_int(static_cast<int32_t>(row + i)); });
  columns.store(online);
  columns.store_target(x, row, rows, target);
}

// Constants per token for the backward pass.
struct Upstream {
  const float *results, *d_logprob, *d_entropy;
};

// Turn a block of logits into its gradient, in place and, if `rows_out` (N, J) is given, transposed there too.
template <typename T, bool CAPPED, typename Lanes>
void grad_columns(T* tile, const Tile& t, const Upstream& up, int64_t row, int rows, int64_t column, Lanes lanes,
                  T* rows_out, int64_t out_stride) {
  const vf inv_t = t.inv_t(column, lanes), slope = inv_t * t.transform.logit_scale;
  const auto result = [&](Result r) { return load_lanes(up.results + r * t.tokens + column, lanes); };
  const vf dl = (up.d_logprob ? load_lanes(up.d_logprob + column, lanes) : vf{}) * slope;
  const vf dh = (up.d_entropy ? load_lanes(up.d_entropy + column, lanes) : vf{}) * slope;
  const Gradient g{-(dl + dh * result(ENTROPY)), dh * -LN2, t.transform.unit<CAPPED>(inv_t), result(LOG_Z),
                   result(LOG_Z_REST)};
  const vi target = t.local_target(column, lanes);
  const vi hit = in_block(target, row, rows);

  if (rows_out != nullptr)  // each token has a line on another page, which no hardware prefetcher finds
    for (int lane = 0; lane < lanes; ++lane) __builtin_prefetch(rows_out + (column + lane) * out_stride + row, 1);

  vu bits[BLOCK] = {};
  T* const at = tile + row * t.stride + column;
  const auto differentiate = [&](auto with_target) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const vf x = load_lanes(at + i * t.stride, lanes);
      const float bias = t.bias_of(row + i);
      vf d = g(t.transform.value<CAPPED>(x, bias));
      if constexpr (with_target) d = target == static_cast<int32_t>(row + i) ? d + dl : d;
      if constexpr (CAPPED) d *= t.transform.cap_slope<CAPPED>(x, bias);
      bits[i] = to_bits(d, at);
      if (lanes == W)
        store_bits(at + i * t.stride, bits[i]);
      else
        store_part(at + i * t.stride, d, lanes);
    }
  };
  any(hit) ? differentiate(std::true_type{}) : differentiate(std::false_type{});
  if constexpr (sizeof(T) == 2)
    if (rows_out != nullptr) store_transposed(bits, rows, lanes, rows_out + column * out_stride + row, out_stride);
}

// Whether the logits differ from what the GEMM gave; this is CAPPED in the kernels above.
bool is_capped(const Tensor& bias, double softcap) { return bias.defined() || softcap != 0; }

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
                         double softcap, const Tensor& state, bool first, int threads) {
  const Tile t = describe(tile, target, start, bias, inv_temperature, inv_temperature_of_all, logit_scale, softcap);
  const bool side = state.size(0) == state_rows(true), capped = is_capped(bias, softcap);
  expect_dense("state", state, DType::f32, {state_rows(side), t.tokens});
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto fold = [&](auto with_cap, auto with_side) {
      for_blocks(t.width, t.tokens, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
        fold_columns<T, with_cap, with_side>(tile.data<const T>(), t, row, rows, column, lanes, state.data<float>(),
                                              first && row == 0);
      });
    };
    const auto with_cap = [&](auto cap) { side ? fold(cap, std::true_type{}) : fold(cap, std::false_type{}); };
    capped ? with_cap(std::true_type{}) : with_cap(std::false_type{});
  };
  for_dtype("tile", tile, run);
}

void linear_logprob_finish(const Tensor& state, const Tensor& bias, const Tensor& inv_temperature,
                           double inv_temperature_of_all, double logit_scale, double softcap, const Tensor& partial) {
  const int64_t n = state.size(1);
  const bool side = state.size(0) == state_rows(true);
  expect_dense("state", state, DType::f32, {state_rows(side), n});
  expect_dense("partial", partial, DType::f32, {side ? ROWS : 4, n});
  expect_dense("inv_temperature", inv_temperature, DType::f32, {n}, true);
  const double unit_of_all = inv_temperature_of_all * (is_capped(bias, softcap) ? 1.0 : logit_scale);
  for (int64_t i = 0; i < n; ++i) {
    const float unit = static_cast<float>(unit_of_all) * LOG2E *
                       (inv_temperature.defined() ? inv_temperature.data<float>()[i] : 1.0f);
    finish_partial(state.data<const float>(), i, n, unit, side, partial.data<float>());
  }
}

void linear_logprob_grad(const Tensor& tile, const Tensor& target, int64_t start, const Tensor& bias,
                         const Tensor& inv_temperature, double inv_temperature_of_all, double logit_scale,
                         double softcap, const Tensor& results, const Tensor& d_logprob, const Tensor& d_entropy,
                         const Tensor& rows_out, int threads) {
  const Tile t = describe(tile, target, start, bias, inv_temperature, inv_temperature_of_all, logit_scale, softcap);
  expect_dense("results", results, DType::f32, {results.size(0) == RESULTS ? RESULTS : 4, t.tokens});
  expect_dense("d_logprob", d_logprob, DType::f32, {t.tokens}, true);
  expect_dense("d_entropy", d_entropy, DType::f32, {t.tokens}, true);
  expect_transposed(rows_out, tile);
  const Upstream up{results.data<float>(), d_logprob.data<float>(), d_entropy.data<float>()};
  const int64_t out_stride = rows_out.defined() ? rows_out.stride(0) : 0;
  const bool capped = is_capped(bias, softcap);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto grad = [&](auto with_cap) {
      for_blocks(t.width, t.tokens, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
        grad_columns<T, with_cap>(tile.data<T>(), t, up, row, rows, column, lanes, rows_out.data<T>(), out_stride);
      });
    };
    capped ? grad(std::true_type{}) : grad(std::false_type{});
  };
  for_dtype("tile", tile, run);
}

}  // namespace flashpo::FLASHPO_ISA
