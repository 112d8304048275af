// What the attention kernels share: the scores, and the end of a softmax.
//
// A running result is (o, m, l): o = sum p v, l = sum p, p = 2^((x - m) unit), where m is the largest x. x is q . k, or
// the score itself if there is a softcap. Differences of x are exact, while those of x unit would not be.
#pragma once
#include <cmath>

#include "isa.h"

namespace flashpo::FLASHPO_ISA {

struct Scores {
  float scale, softcap;  // softcap 0: none

  template <bool CAPPED>
  vf value(vf product) const {
    return CAPPED ? tanh(product * (scale / softcap)) * softcap : product;
  }
  float score_of(float x) const { return softcap != 0 ? x : x * scale; }
  float unit() const { return softcap != 0 ? LOG2E : scale * LOG2E; }
};

struct SoftmaxEnd {
  float lse, factor;  // factor: of o
};

// A sink takes part in the softmax but has no value; -inf means no sink.
static inline SoftmaxEnd softmax_end(const Scores& scores, float m, float l, float sink) {
  if (l == 0) return {sink, 0};  // there are no keys; a NaN does not stop here
  const float score = scores.score_of(m), top = sink > score ? sink : score;
  const float kept = exp2(splat((score - top) * LOG2E))[0];
  const float sum = l * kept + exp2(splat((sink - top) * LOG2E))[0];
  return {top + std::log(sum), kept / sum};
}

}  // namespace flashpo::FLASHPO_ISA
