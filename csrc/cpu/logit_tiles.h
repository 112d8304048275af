// Tiles of logits (J, N) on the CPU, with a row per vocabulary entry and a column per token: how kernels go over them
// in blocks of BLOCK rows and W columns, and what they keep between tiles.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../tensor.h"
#include "online.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {

template <typename T, typename Lanes>
static inline vf load_lanes(const T* p, Lanes lanes) {
  return lanes == W ? load(p) : load_part(p, lanes, 0.0f);
}
template <typename T, typename Lanes>
static inline void store_lanes(T* p, vf x, Lanes lanes) {
  lanes == W ? store(p, x) : store_part(p, x, lanes);
}

// `lanes` is either the constant W or, in the last columns, their number.
using AllLanes = std::integral_constant<int, W>;

// Each token's target as a row of the tile that begins with vocabulary entry `start`. A target in another tile is
// negative or at least the width.
static inline vi target_rows(const int64_t* target, int64_t start, int lanes) {
  if (lanes == W) return load_int(target) - static_cast<int32_t>(start);
  vi rows = splat_int(-1);
  for (int i = 0; i < lanes; ++i) rows[i] = static_cast<int32_t>(target[i] - start);
  return rows;
}

// Which columns have their target in one of the block's rows.
static inline vi in_block(vi target, int64_t row, int rows) {
  const vi of_block = target - static_cast<int32_t>(row);
  return (of_block >= 0) & (of_block < rows);
}

// The running sums that are kept between tiles: the rows of a partial, as values instead of bits, and the compensations
// of its sums, for one column or W columns. `tokens` is the length of a row.
constexpr int state_rows(bool side) { return side ? ROWS + 4 : 4 + 2; }

template <bool SIDE, typename Lanes>
struct StateColumns {
  float* state;
  int64_t tokens;
  Lanes lanes;
  static constexpr int LOW = SIDE ? ROWS : 4;

  float* at(int row) const { return state + row * tokens; }
  Sum load_sum(int row, int low) const { return {load_lanes(at(row), lanes), load_lanes(at(low), lanes)}; }
  void store_sum(int row, int low, const Sum& sum) const {
    store_lanes(at(row), sum.value, lanes);
    store_lanes(at(low), sum.low, lanes);
  }
  // `first`: the state is still empty.
  Online<SIDE> load(bool first) const {
    Online<SIDE> online;
    if (first) {
      store_lanes(at(TARGET), splat(-INFINITY), lanes);
      return online;
    }
    online.ref = load_lanes(at(REF), lanes);
    online.sum = load_sum(SUM, LOW);
    online.wsum = load_sum(WSUM, LOW + 1);
    if constexpr (SIDE) {
      online.sqsum = load_sum(SQSUM, LOW + 2);
      online.ysum = load_sum(YSUM, LOW + 3);
      online.before = load_lanes(at(BEFORE), lanes);
      online.top = load_lanes(at(MAX), lanes);
    }
    return online;
  }
  void store(const Online<SIDE>& online) const {
    store_lanes(at(REF), online.ref, lanes);
    store_sum(SUM, LOW, online.sum);
    store_sum(WSUM, LOW + 1, online.wsum);
    if constexpr (SIDE) {
      store_sum(SQSUM, LOW + 2, online.sqsum);
      store_sum(YSUM, LOW + 3, online.ysum);
      store_lanes(at(BEFORE), online.before, lanes);
      store_lanes(at(MAX), online.top, lanes);
    }
  }
  // x is a block of rows from `row`; target is given as rows.
  void store_target(const vf* x, int64_t row, int rows, vi target) const {
    const vi hit = in_block(target, row, rows);
    if (!any(hit)) return;
    for (int i = 0; i < lanes; ++i)
      if (hit[i]) at(TARGET)[i] = x[target[i] - row][i];
  }
};

// Compute token i's partial, in bits, from its state. What the reference loses when it is rounded to bits is moved to
// the other rows; this loss is returned.
static inline float finish_partial(const float* state, int64_t i, int64_t tokens, float unit, bool side, float* partial) {
  const auto in = [&](Row r) { return state[r * tokens + i]; };
  const auto out = [&](Row r) -> float& { return partial[r * tokens + i]; };
  const float ref = in(REF), lost = rounding_of(ref, unit), scale = std::exp2(lost);
  const auto relative = [&](Row r) { return in(r) == -INFINITY ? -INFINITY : (in(r) - ref) * unit + lost; };
  out(REF) = ref * unit;
  out(SUM) = in(SUM) * scale;
  out(WSUM) = (in(WSUM) + lost * in(SUM)) * scale;
  out(TARGET) = relative(TARGET);
  if (!side) return lost;
  out(SQSUM) = in(SQSUM) * scale * scale;
  out(YSUM) = in(YSUM) * unit;
  out(BEFORE) = relative(BEFORE);
  out(MAX) = relative(MAX);
  return lost;
}

// Call f(row, rows, column, lanes) for every block in each thread's share of the columns.
template <typename F>
static inline void for_blocks(int64_t width, int64_t tokens, int threads, F&& f) {
  const int64_t groups = (tokens + W - 1) / W;
  parallel_for(groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < width; row += BLOCK) {
      const int rows = static_cast<int>(std::min<int64_t>(BLOCK, width - row));
      for (int64_t column = begin * W; column < std::min(end * W, tokens); column += W) {
        if (column + W <= tokens)
          f(row, rows, column, AllLanes{});
        else
          f(row, rows, column, static_cast<int>(tokens - column));
      }
    }
  });
}

static inline void expect_transposed(const Tensor& rows_out, const Tensor& tile) {
  expect(!rows_out.defined() || (rows_out.dim() == 2 && rows_out.dtype() == tile.dtype() && rows_out.stride(1) == 1 &&
                                 rows_out.size(0) == tile.size(1) && rows_out.size(1) == tile.size(0)),
         "rows_out must be the transposed shape of tile, in its dtype");
}

// Write column c of `bits` (rows of 16-bit values, a lane per column) into row c of `out`. Two rows are joined to a
// vector of 32-bit numbers. A square of W such vectors, transposed, has 2 W consecutive values of one column in each
// vector.
template <typename T, typename Lanes>
static inline void store_transposed(const vu (&bits)[BLOCK], int rows, Lanes lanes, T* out, int64_t stride) {
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

}  // namespace flashpo::FLASHPO_ISA
