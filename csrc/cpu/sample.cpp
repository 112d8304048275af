// sample on the CPU: each thread samples one row after the other. A row stays in the thread's cache from the first
// pass, which finds the largest logit, to the last one.
#include "../sample.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace flashpo::FLASHPO_ISA {
namespace {

using sampling::All;
using sampling::Kept;
using sampling::Ties;
using sampling::Weight;

constexpr int CHUNKS = 128, CANDIDATES = 16384;

double total(vf x) {
  double sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

// Call f(vector, index of its first element) over [begin, end); missing elements of the last vector are -inf.
template <typename T, typename F>
void each(const T* x, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
#pragma GCC unroll 4
  for (; i + W <= end; i += W) f(load(x + i), i);
  if (i < end) f(load_part(x + i, static_cast<int>(end - i), -INFINITY), i);
}

template <typename T>
class Row {
 public:
  static constexpr int SHIFT = std::is_same_v<T, float> ? 0 : std::is_same_v<T, bf16> ? 16 : 13;
  static constexpr int PIVOTS = 1;  // one pivot and a few more passes take the same time as more pivots at once
  const int64_t size;
  float top = -INFINITY, unit = 1;

  Row(const T* logits, int64_t size) : size(size), logits(logits) {
    length = std::max<int64_t>(16, ((size + CHUNKS - 1) / CHUNKS + W - 1) / W) * W;
    chunks = static_cast<int>((size + length - 1) / length);
  }

  // Find `top`. Return the sum of all weights, as sums(All) does; NaN if there is nothing to sample from.
  double begin() {
    vi fine = splat_int(-1);
    top = -INFINITY;
    for (int c = 0; c < chunks; ++c) {
      vf highest = splat(-INFINITY);
      each(logits, c * length, end_of(c), [&](vf x, int64_t) {
        highest = max(highest, x);
        fine &= x < splat(INFINITY);  // false for NaN
      });
      maximum[c] = -INFINITY;
      for (int i = 0; i < W; ++i) maximum[c] = std::max(maximum[c], highest[i]);
      top = std::max(top, maximum[c]);
    }
    return any(~fine) || top == -INFINITY ? NAN : sums(All{});
  }

  float at(int64_t i) const { return load_part(logits + i, 1, 0)[0]; }
  float weight(float x) const { return weights(splat(x))[0]; }

  // Sum what `measure` gives for each logit. The sums of the chunks are kept for `locate`.
  template <typename Measure>
  double sums(Measure measure) {
    double sum = 0;
    for (int c = 0; c < chunks; ++c) {
      vf in_chunk{};
      if (!beyond(measure, maximum[c]))
        each(logits, c * length, end_of(c), [&](vf x, int64_t i) { in_chunk += measured(measure, x, i); });
      part[c] = total(in_chunk);
      sum += part[c];
    }
    return sum;
  }

  // The first logit at which the cumulative sum exceeds `target`; never one for which `measure` gives 0.
  template <typename Measure>
  int64_t locate(Measure measure, double target) const {
    int chunk = -1;
    double before = 0, sum = 0;
    for (int c = 0; c < chunks && sum <= target; ++c) {
      if (part[c] == 0) continue;
      chunk = c;
      before = sum;
      sum += part[c];
    }
    int64_t last = -1;
    for (int64_t i = chunk * length; i < end_of(chunk); i += W) {
      const int count = static_cast<int>(std::min<int64_t>(W, end_of(chunk) - i));
      const vf x = count == W ? load(logits + i) : load_part(logits + i, count, -INFINITY);
      const vf here = measured(measure, x, i);
      for (int lane = 0; lane < W; ++lane) {
        if (here[lane] == 0) continue;
        last = i + lane;
        before += here[lane];
        if (before > target) return last;
      }
    }
    return last;  // because of rounding, the chunk's sum was larger
  }

  // From now on pivots lie between low and high. If few logits do, these are copied, and later passes read only the
  // copy.
  void unfocus() { candidates = -1; }
  void focus(float low, float high, Weight at_high, int64_t inside) {
    if (inside > CANDIDATES || inside > (candidates < 0 ? size : candidates) / 2) return;
    low = std::max(low, -FLT_MAX);  // excludes the -inf that fills the last vector
    int64_t n = 0;
    const auto copy = [&](vf x, int64_t) { n += compress(candidate + n, x, (x >= splat(low)) & (x < splat(high))); };
    if (candidates < 0) {
      for (int c = 0; c < chunks; ++c)
        if (maximum[c] >= low) each(logits, c * length, end_of(c), copy);
    } else {
      each(candidate, 0, candidates, copy);
    }
    candidates = n;
    above = at_high;
  }

  // The weight of all logits >= *pivot.
  template <bool COUNTED>
  void weigh(const float* pivot, Weight* out) const {
    const vf least = splat(*pivot);
    vi counts{};
    vd masses{};
    const auto pass = [&](const auto* x, int64_t begin, int64_t end) {
      vf sum{};
      each(x, begin, end, [&](vf x, int64_t) {
        const vi inside = x >= least;
        counts -= inside;
        if (!COUNTED) sum += inside ? weights(x) : vf{};
      });
      if (!COUNTED) masses += __builtin_convertvector(sum, vd);
    };
    *out = {0, 0};
    if (candidates >= 0) {
      pass(candidate, 0, candidates);
      *out = above;
    } else {
      for (int c = 0; c < chunks; ++c)
        if (maximum[c] >= *pivot) pass(logits, c * length, end_of(c));
    }
    for (int i = 0; i < W; ++i) out->count += counts[i];
    for (int i = 0; i < W; ++i) out->mass += masses[i];
    if (COUNTED) out->mass = static_cast<double>(out->count);
  }

 private:
  const T* logits;
  int64_t length;  // of a chunk; a multiple of W
  int chunks;
  float maximum[CHUNKS];
  double part[CHUNKS];
  float candidate[CANDIDATES + W];
  int64_t candidates = -1;  // -1: none were copied
  Weight above{0, 0};       // the weight of the logits above the candidates

  int64_t end_of(int chunk) const { return std::min(size, (chunk + 1) * length); }
  vf weights(vf x) const { return exp2((x - top) * unit); }

  vf measured(All, vf x, int64_t) const { return weights(x); }
  vf measured(Ties ties, vf x, int64_t) const { return x == splat(ties.value) ? splat(1) : vf{}; }
  vf measured(Kept kept, vf x, int64_t i) const {
    const vi before = splat_int(static_cast<int32_t>(i)) + iota() < splat_int(static_cast<int32_t>(kept.limit));
    const vi inside = (x > splat(kept.threshold)) | ((x == splat(kept.threshold)) & before);
    return inside ? weights(x) : vf{};
  }
  // Whether `measure` gives 0 for all logits up to x.
  static bool beyond(All, float) { return false; }
  static bool beyond(Ties ties, float x) { return x < ties.value; }
  static bool beyond(Kept kept, float x) { return x < kept.threshold; }
};

template <typename T>
void run(const T* logits, const sampling::Problem& p, int threads) {
  parallel_for(p.rows, p.rows * p.vocab < 32768 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Row<T> row(logits + r * p.stride, p.vocab);
      const sampling::Drawn drawn = sampling::draw(row, p, r);
      p.token[r] = drawn.token;
      p.numbers[r] = drawn.logprob;
      p.numbers[p.rows + r] = drawn.logprob_full;
      p.numbers[2 * p.rows + r] = drawn.kept_mass;
    }
  });
}

void check_values(const sampling::Problem& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    expect(sampling::fine_temperature(p.temperature[r]), sampling::TEMPERATURE);
    expect(p.top_k == nullptr || p.top_k[r] >= 0, sampling::TOP_K);
    expect(p.top_p == nullptr || sampling::is_share(p.top_p[r]), sampling::TOP_P);
    expect(p.min_p == nullptr || sampling::is_share(p.min_p[r]), sampling::MIN_P);
  }
}

}  // namespace

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
            const Tensor& min_p, const Tensor& seed, const Tensor& offset, const Tensor& token, const Tensor& numbers,
            int threads) {
  const sampling::Problem p =
      expect_sample(logits, temperature, top_k, top_p, min_p, seed, offset, token, numbers, kDLCPU);
  check_values(p);
  switch (logits.dtype()) {
    case DType::f32: return run(logits.data<const float>(), p, threads);
    case DType::bf16: return run(logits.data<const bf16>(), p, threads);
    default: return run(logits.data<const f16>(), p, threads);
  }
}

}  // namespace flashpo::FLASHPO_ISA
