// The running sums of one token's softmax, W tokens (or W interleaved parts of one token) to a vector: the fold of
// the forward pass and the gradient of the backward pass. Names and layout as in python/flashpo/ops/token_stats.py.
#pragma once
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

enum Row { REF, SUM, WSUM, TARGET, SQSUM, YSUM, BEFORE, MAX, ROWS };  // of a partial; the first 4 without side outputs
enum Result { LOGPROB, ENTROPY, LOG_Z, LOG_Z_REST, LOG_SUM_SQ_PROBS, MEAN_LOGIT, IS_TOP1, RESULTS };

constexpr int BLOCK = 32;  // vectors folded at a time

// A sum of many terms: each block's own sum is added with Kahan's compensation, so that the error does not grow with
// the vocabulary.
struct Sum {
  vf value{}, low{};
  void add(vf x) {
    const vf y = x + low;
    const vf next = value + y;
    low = next - next == 0.0f ? y - (next - value) : vf{};  // an infinite sum, of -inf logits, leaves nothing over
    value = next;
  }
  void scale(vf by) {
    value *= by;
    low *= by;
  }
};

// Logits are kept as values x, of which y = x unit is in bits; ref, before, top and ysum are values too.
template <bool SIDE>
struct Online {
  // The reference follows the maximum only when it lags by more than LAG bits: any reference near it will do.
  static constexpr float LAG = 8.0f;
  vf ref = splat(-INFINITY);
  Sum sum, wsum;
  Sum sqsum, ysum;  // these only with SIDE
  vf before = splat(-INFINITY), top = splat(-INFINITY);

  // position(i) is the place of x[i] in the vocabulary, to be compared with the target's; `upcoming` holds what will
  // be folded next, fetched a line a step so that memory works while the arithmetic does.
  template <typename Position>
  void fold(const vf* x, int count, vf unit, vi target, Position position, const char* upcoming = nullptr,
            int bytes = 0) {
    add(x, count, follow(x, count, unit), unit, target, position, [](int, vf, vf) {}, upcoming, bytes);
  }

  // The highest of x; the reference is near it then, and the sums count from there.
  vf follow(const vf* x, int count, vf unit) {
    vf highest = x[0];
    for (int i = 1; i < count; ++i) highest = max(highest, x[i]);
    const vi lags = (highest - at_least(ref, LOWEST)) * unit > LAG;
    if (any(lags)) raise(lags ? highest : ref, unit);
    return highest;
  }

  // x that the reference has followed. visit(i, 2^y, y), with y = (x[i] - ref) unit in bits.
  template <typename Position, typename Visit>
  void add(const vf* x, int count, vf highest, vf unit, vi target, Position position, Visit visit,
           const char* upcoming = nullptr, int bytes = 0) {
    // -inf (masked vocabulary) must not meet itself in a difference
    const vf base = at_least(ref, LOWEST);
    vf e_sum{}, we_sum{}, sq_sum{}, x_sum{};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(upcoming + i * bytes);
      // what is impossible counts as 2^SMALLEST, which no sum of at least 2^-LAG notices
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

// What the value of a reference, in bits, loses when it is rounded.
static inline float rounding_of(float ref, float unit) {
  return ref == -INFINITY ? 0.0f : std::fma(ref, unit, -(ref * unit));
}

// d loss / d x of one logit from its log-probability in bits, (x unit - log_z) - log_z_rest: p (a + b log2 p), a and
// b constant per token.
struct Gradient {
  vf a, b;  // -(d_logprob + d_entropy entropy) and -d_entropy ln 2, times what of dz/dx is constant
  vf unit, log_z, log_z_rest;
  vf operator()(vf x) const {
    const vf log2p = at_least((x * unit - log_z) - log_z_rest, NOTHING);
    return exp2(log2p) * (a + b * log2p);
  }
};

}  // namespace flashpo::FLASHPO_ISA
