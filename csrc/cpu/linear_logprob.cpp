// The elementwise half of linear_logprob on the CPU: tiles (J, N) of logits, a row per vocabulary entry and a column
// per token, so that W tokens fill a vector and their sums never cross lanes. The GEMMs are torch's.
#include <algorithm>
#include <type_traits>

#include "../ops.h"
#include "for_dtype.h"
#include "online.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

template <typename T, typename Lanes>
vf load_lanes(const T* p, Lanes lanes) {
  return lanes == W ? load(p) : load_part(p, lanes, 0.0f);
}
template <typename T, typename Lanes>
void store_lanes(T* p, vf x, Lanes lanes) {
  lanes == W ? store(p, x) : store_part(p, x, lanes);
}

struct Tile {  // what a tile is made of, besides its values
  int64_t width, tokens, stride, start;  // start: the vocabulary entry of its first row
  const int64_t* target;                 // (N,), in the whole vocabulary
  const float* bias;                     // (J,) or null
  const float* inv_temperature;          // (N,) or null
  float inv_temperature_of_all;
  Transform transform;

  template <typename Lanes>
  vf inv_t(int64_t column, Lanes lanes) const {
    return inv_temperature ? load_lanes(inv_temperature + column, lanes) : splat(inv_temperature_of_all);
  }
  float bias_of(int64_t row) const { return bias ? bias[row] : 0.0f; }
  // Each token's target as a row of this tile (of another tile: negative, or beyond the width).
  vi local_target(int64_t column, int lanes) const {
    if (lanes == W) return load_int(target + column) - static_cast<int32_t>(start);
    vi local = splat_int(-1);
    for (int i = 0; i < lanes; ++i) local[i] = static_cast<int32_t>(target[column + i] - start);
    return local;
  }
};

// `lanes` is either the constant W or, in the last columns, how many there are.
using AllLanes = std::integral_constant<int, W>;

vi in_block(vi target, int64_t row, int rows) {
  const vi of_block = target - static_cast<int32_t>(row);
  return (of_block >= 0) & (of_block < rows);
}

// The running sums between tiles: a partial's rows, as values rather than bits, and the compensations of its sums.
constexpr int state_rows(bool side) { return side ? ROWS + 4 : 4 + 2; }

// Columns [column, column + lanes) of `rows` rows into `state` (state_rows, N); `first`: which holds nothing yet.
template <typename T, bool CAPPED, bool SIDE, typename Lanes>
void fold_columns(const T* tile, const Tile& t, int64_t row, int rows, int64_t column, Lanes lanes, float* state,
                  bool first) {
  const auto at = [&](int r) { return state + r * t.tokens + column; };
  const auto load_sum = [&](Row r, int low) { return Sum{load_lanes(at(r), lanes), load_lanes(at(low), lanes)}; };
  const auto store_sum = [&](Row r, int low, const Sum& sum) {
    store_lanes(at(r), sum.value, lanes);
    store_lanes(at(low), sum.low, lanes);
  };
  constexpr int LOW = SIDE ? ROWS : 4;
  vf x[BLOCK];
  for (int i = 0; i < rows; ++i)
    x[i] = t.transform.value<CAPPED>(load_lanes(tile + (row + i) * t.stride + column, lanes), t.bias_of(row + i));

  Online<SIDE> online;
  if (first) {
    store_lanes(at(TARGET), splat(-INFINITY), lanes);
  } else {
    online.ref = load_lanes(at(REF), lanes);
    online.sum = load_sum(SUM, LOW);
    online.wsum = load_sum(WSUM, LOW + 1);
    if constexpr (SIDE) {
      online.sqsum = load_sum(SQSUM, LOW + 2);
      online.ysum = load_sum(YSUM, LOW + 3);
      online.before = load_lanes(at(BEFORE), lanes);
      online.top = load_lanes(at(MAX), lanes);
    }
  }
  const vi target = t.local_target(column, lanes);
  const vf unit = t.transform.unit<CAPPED>(t.inv_t(column, lanes));
  online.fold(x, rows, unit, target, [&](int i) { return splat_int(static_cast<int32_t>(row + i)); });
  store_lanes(at(REF), online.ref, lanes);
  store_sum(SUM, LOW, online.sum);
  store_sum(WSUM, LOW + 1, online.wsum);
  if constexpr (SIDE) {
    store_sum(SQSUM, LOW + 2, online.sqsum);
    store_sum(YSUM, LOW + 3, online.ysum);
    store_lanes(at(BEFORE), online.before, lanes);
    store_lanes(at(MAX), online.top, lanes);
  }
  const vi hit = in_block(target, row, rows);
  if (!any(hit)) return;
  for (int i = 0; i < lanes; ++i)
    if (hit[i]) at(TARGET)[i] = x[target[i] - row][i];
}

// Calls f(row, rows, column, lanes) for every block of a thread's share of the columns.
template <typename F>
void for_blocks(const Tile& t, int threads, F&& f) {
  const int64_t groups = (t.tokens + W - 1) / W;
  parallel_for(groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < t.width; row += BLOCK) {
      const int rows = static_cast<int>(std::min<int64_t>(BLOCK, t.width - row));
      for (int64_t column = begin * W; column < std::min(end * W, t.tokens); column += W) {
        if (column + W <= t.tokens)
          f(row, rows, column, AllLanes{});
        else
          f(row, rows, column, static_cast<int>(t.tokens - column));
      }
    }
  });
}

// Per-token constants of the backward pass.
struct Upstream {
  const float *results, *d_logprob, *d_entropy;
};

// Column c of `bits` (rows of 16-bit values, a lane per column) into row c of `out`: two rows make a 32-bit vector,
// so that a square of W of them, transposed, has 2 W consecutive values of one column in each vector.
template <typename T, typename Lanes>
void store_transposed(const vu (&bits)[BLOCK], int rows, Lanes lanes, T* out, int64_t stride) {
  for (int first = 0; first < rows; first += 2 * W) {
    vu square[W];
    for (int i = 0; i < W; ++i) square[i] = bits[first + 2 * i] | bits[first + 2 * i + 1] << 16;
    transpose(square);
    if (lanes == W && rows - first >= 2 * W) {
      for (int lane = 0; lane < W; ++lane) std::memcpy(out + lane * stride + first, &square[lane], sizeof(vu));
    } else {
      const int bytes = std::min(2 * W, rows - first) * sizeof(T);
      for (int lane = 0; lane < lanes; ++lane) std::memcpy(out + lane * stride + first, &square[lane], bytes);
    }
  }
}

// A block of logits becomes its gradient in place, and, where `rows_out` (N, J) is given, transposed there too.
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

  if (rows_out != nullptr)  // a line on a page of its own per token: no hardware prefetch finds them
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

// Whether values are more than what the GEMM gave: CAPPED in the kernels above.
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
      for_blocks(t, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
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
  const auto in = [&](Row r, int64_t i) { return state.data<const float>()[r * n + i]; };
  const auto out = [&](Row r, int64_t i) -> float& { return partial.data<float>()[r * n + i]; };
  for (int64_t i = 0; i < n; ++i) {
    const float unit = static_cast<float>(unit_of_all) * LOG2E *
                       (inv_temperature.defined() ? inv_temperature.data<float>()[i] : 1.0f);
    const float ref = in(REF, i), lost = rounding_of(ref, unit), scale = std::exp2(lost);
    const auto relative = [&](Row r) { return in(r, i) == -INFINITY ? -INFINITY : (in(r, i) - ref) * unit + lost; };
    out(REF, i) = ref * unit;
    out(SUM, i) = in(SUM, i) * scale;
    out(WSUM, i) = (in(WSUM, i) + lost * in(SUM, i)) * scale;
    out(TARGET, i) = relative(TARGET);
    if (!side) continue;
    out(SQSUM, i) = in(SQSUM, i) * scale * scale;
    out(YSUM, i) = in(YSUM, i) * unit;
    out(BEFORE, i) = relative(BEFORE);
    out(MAX, i) = relative(MAX);
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
  expect(!rows_out.defined() || (rows_out.dim() == 2 && rows_out.dtype() == tile.dtype() && rows_out.stride(1) == 1 &&
                                 rows_out.size(0) == t.tokens && rows_out.size(1) == t.width),
         "rows_out must be the transposed shape of tile, in its dtype");
  const Upstream up{results.data<float>(), d_logprob.data<float>(), d_entropy.data<float>()};
  const int64_t out_stride = rows_out.defined() ? rows_out.stride(0) : 0;
  const bool capped = is_capped(bias, softcap);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto grad = [&](auto with_cap) {
      for_blocks(t, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
        grad_columns<T, with_cap>(tile.data<T>(), t, up, row, rows, column, lanes, rows_out.data<T>(), out_stride);
      });
    };
    capped ? grad(std::true_type{}) : grad(std::false_type{});
  };
  for_dtype("tile", tile, run);
}

}  // namespace flashpo::FLASHPO_ISA
