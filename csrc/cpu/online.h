// The running sums of one token's softmax, W tokens (or W interleaved parts of one token) to a vector: the fold of
// the forward pass and the gradient of the backward pass. Names and layout as in python/flashpo/ops/token_stats.py.
#pragma once
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

enum Row { REF, SUM, WSUM, TARGET, SQSUM, YSUM, BEFORE, MAX, ROWS };

constexpr int BLOCK = 32;  // vectors folded at a time

// A sum of many terms: each block's own sum is added with Kahan's compensation, so that the error does not grow with
// the vocabulary.
struct Sum {
  vf value{}, low{};
  void add(vf x) {
    const vf y = x + low;
    const vf next = value + y;
    low = y - (next - value);
    value = next;
  }
};

template <bool SIDE>
struct Online {
  // The reference follows the maximum only when it lags by more than LAG bits: any reference near it will do.
  static constexpr float LAG = 8.0f;
  vf ref = splat(-INFINITY);
  Sum sum, wsum;
  vf sqsum{}, ysum{}, before = splat(-INFINITY), top = splat(-INFINITY);  // with SIDE

  // y[i] in bits; position[i] is its place in the vocabulary, to be compared with the target's.
  template <typename Position>
  void fold(const vf* y, int count, vi target, Position position) {
    vf highest = y[0];
    for (int i = 1; i < count; ++i) highest = max(highest, y[i]);
    if (any(highest > ref + LAG)) raise(highest);
    // -inf (masked vocabulary) must not meet itself in a difference
    const vf base = at_least(ref, LOWEST);
    vf e_sum{}, we_sum{}, sq_sum{}, y_sum{};
    for (int i = 0; i < count; ++i) {
      const vf shifted = at_least(y[i] - base, NOTHING);
      const vf e = exp2(shifted);
      e_sum += e;
      we_sum += e * shifted;
      if constexpr (SIDE) {
        sq_sum += e * e;
        y_sum += y[i];
        before = position(i) < target ? max(before, y[i]) : before;
      }
    }
    sum.add(e_sum);
    wsum.add(we_sum);
    if constexpr (SIDE) {
      sqsum += sq_sum;
      ysum += y_sum;
      top = max(top, highest);
    }
  }

  void raise(vf highest) {
    const vf raised = highest > ref + LAG ? highest : ref;
    const vf shift = at_least(at_least(ref, LOWEST) - at_least(raised, LOWEST), NOTHING);
    const vf scale = exp2(shift);
    wsum.value = (wsum.value + shift * sum.value) * scale;
    wsum.low = (wsum.low + shift * sum.low) * scale;
    sum.value *= scale;
    sum.low *= scale;
    if constexpr (SIDE) sqsum *= scale * scale;
    ref = raised;
  }
};

// d loss / d x of one logit from its log-probability in bits, y - lse: p (a + b log2 p), a and b constant per token.
struct Gradient {
  vf a, b;  // -(d_logprob + d_entropy entropy) and -d_entropy ln 2
  vf operator()(vf y, vf lse_bits) const {
    const vf log2p = at_least(y - lse_bits, NOTHING);
    return exp2(log2p) * (a + b * log2p);
  }
};

}  // namespace flashpo::FLASHPO_ISA
