// What attention kernels share: scores, and the end of a softmax.
//
// A running result is (o, m, l): o = sum p v, l = sum p, p = 2^((x - m) unit), m the largest x. Here x is q . k, or with
// a softcap the score itself: differences of x are exact where those of x unit are not.
#pragma once
#include <cmath>

#include "isa.h"

namespace flashpo::FLASHPO_ISA {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Scores {
  float scale, softcap;  // 0: none

  template <bool CAPPED>
  vf value(vf product) const {
    return CAPPED ? tanh(product * (scale / softcap)) * softcap : product;
  }
  float score_of(float x) const { return softcap != 0 ? x : x * scale; }
  float unit() const { return softcap != 0 ? LOG2E : scale * LOG2E; }
};

// One number of all lanes, by halves.
template <typename F>
static inline float reduce(vf x, F&& f) {
  for (int half = W / 2; half > 0; half /= 2) x = f(x, __builtin_shuffle(x, iota() ^ half));
  return x[0];
}

struct SoftmaxEnd {
  float lse, factor;  // of o
};

// A sink takes its share of the softmax and adds nothing; -inf: none.
static inline SoftmaxEnd softmax_end(const Scores& scores, float m, float l, float sink) {
  if (l == 0) return {sink, 0};  // no keys; a NaN goes on
  const float score = scores.score_of(m), top = sink > score ? sink : score;
  const float kept = exp2(splat((score - top) * LOG2E))[0];
  const float sum = l * kept + exp2(splat((sink - top) * LOG2E))[0];
  return {top + std::log(sum), kept / sum};
}

template <typename T>
static inline void write_row(const float* row, float factor, int64_t count, T* out) {
  int64_t j = 0;
  for (; j + W <= count; j += W) store(out + j, load(row + j) * factor);
  if (j < count) store_part(out + j, load(row + j) * factor, static_cast<int>(count - j));
}

}  // namespace flashpo::FLASHPO_ISA
