// The running sums of a token's softmax, with W tokens (or W interleaved parts of one token) per vector: the fold of
// the forward pass and the gradient of the backward pass. Names and layout are those of
// python/flashpo/ops/token_stats.py.
#pragma once
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

enum Row { REF, SUM, WSUM, TARGET, SQSUM, YSUM, BEFORE, MAX, ROWS };  // of a partial; only 4 without side outputs
enum Result { LOGPROB, ENTROPY, LOG_Z, LOG_Z_REST, LOG_SUM_SQ_PROBS, MEAN_LOGIT, IS_TOP1, RESULTS };

constexpr int BLOCK = 32;  // vectors that are folded at a time

// A sum of many terms. The sum of each block is added with Kahan's compensation, so that the error does not grow with
// the vocabulary.
struct Sum {
  vf value{}, low{};
  void add(vf x) {
    const vf y = x + low;
    const vf next = value + y;
    low = next - next == 0.0f ? y - (next - value) : vf{};  // an infinite sum (of -inf logits) has no remainder
    value = next;
  }
  void scale(vf by) {
    value *= by;
    low *= by;
  }
};

// Logits are kept as values x; y = x unit is in bits. ref, before, top and ysum are values too.
template <bool SIDE>
struct Online {
  // The reference follows the maximum only when it lags by more than LAG bits. Any reference near the maximum will do.
  static constexpr float LAG = 8.0f;
  vf ref = splat(-INFINITY);
  Sum sum, wsum;
  Sum sqsum, ysum;  // these only with SIDE
  vf before = splat(-INFINITY), top = splat(-INFINITY);

  // position(i) is the index of x[i] in the vocabulary, to be compared with the target. `upcoming` points to what is
  // folded next; one line of it is prefetched per step, so that memory works while the arithmetic does.
  template <typename Position>
  void fold(const vf* x, int count, vf unit, vi target, Position position, const char* upcoming = nullptr,
            int bytes = 0) {
    add(x, count, follow(x, count, unit), unit, target, position, [](int, vf, vf) {}, upcoming, bytes);
  }

  // Return the largest x, after moving the reference and the sums near it if necessary.
  vf follow(const vf* x, int count, vf unit) {
    vf highest = x[0];
    for (int i = 1; i < count; ++i) highest = max(highest, x[i]);
    const vi lags = (highest - at_least(ref, LOWEST)) * unit > LAG;
    if (any(lags)) raise(lags ? highest : ref, unit);
    return highest;
  }

  // Add x, which the reference has followed. Calls visit(i, 2^y, y) with y = (x[i] - ref) unit, in bits.
  template <typename Position, typename Visit>
  void add(const vf* x, int count, vf highest, vf unit, vi target, Position position, Visit visit,
           const char* upcoming = nullptr, int bytes = 0) {
    // a lower bound, because -inf (masked vocabulary) minus -inf is NaN
    const vf base = at_least(ref, LOWEST);
    vf e_sum{}, we_sum{}, sq_sum{}, x_sum{};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(upcoming + i * bytes);
      // an impossible token counts as 2^SMALLEST, which does not change a sum of at least 2^-LAG
      const vf y = (x[i] - base) * unit, shifted = at_least(y, SMALLEST);
      const vf e = exp2_normal(shifted);
      visit(i, e, y);
      e_sum += e;
      we_sum += e * shifted;
      if constexpr (SIDE) {
        sq_sum += e * e;
        x_sum += x[i];
        before = position(i) < target ? max(before, x[i]) : before;
      }
    }
    sum.add(e_sum);
    wsum.add(we_sum);
    if constexpr (SIDE) {
      sqsum.add(sq_sum);
      ysum.add(x_sum);
      top = max(top, highest);
    }
  }

  void raise(vf raised, vf unit) {
    const vf shift = at_least((at_least(ref, LOWEST) - at_least(raised, LOWEST)) * unit, NOTHING);
    const vf scale = exp2(shift);
    wsum = {(wsum.value + shift * sum.value) * scale, (wsum.low + shift * sum.low) * scale};
    sum.scale(scale);
    if constexpr (SIDE) sqsum.scale(scale * scale);
    ref = raised;
  }
};

// What a reference loses when its value in bits is rounded.
static inline float rounding_of(float ref, float unit) {
  return ref == -INFINITY ? 0.0f : std::fma(ref, unit, -(ref * unit));
}

// d loss / d x of a logit from its log-probability in bits, log2 p = (x unit - log_z) - log_z_rest: p (a + b log2 p),
// where a and b are constant per token.
struct Gradient {
  vf a, b;  // -(d_logprob + d_entropy entropy) and -d_entropy ln 2, times the constant part of dz/dx
  vf unit, log_z, log_z_rest;
  vf operator()(vf x) const {
    const vf log2p = at_least((x * unit - log_z) - log_z_rest, NOTHING);
    return exp2(log2p) * (a + b * log2p);
  }
};

}  // namespace flashpo::FLASHPO_ISA
