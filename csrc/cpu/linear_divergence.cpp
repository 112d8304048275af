// The elementwise half of linear_divergence on the CPU. A tile of the student's logits and one of the teacher's, for
// the same vocabulary entries and tokens, are folded together, or the student's becomes its gradient. The GEMMs are
// torch's. Formulas and the names of rows are those of python/flashpo/ops/divergence_stats.py.
#include "../ops.h"
#include "for_dtype.h"
#include "logit_tiles.h"

namespace flashpo::FLASHPO_ISA {
namespace {

enum Mode { FORWARD, REVERSE, MIXTURE };
Mode mode_of(double beta) { return beta == 0 ? FORWARD : beta == 1 ? REVERSE : MIXTURE; }

// The rows of the state between tiles: the state of each head, and what is computed from both.
enum State { STUDENT = 0, TEACHER = state_rows(false), GAP = 2 * TEACHER, GAP_LOW, FORBIDDEN, TOPS, STATE_ROWS = TOPS + 4 };
// The rows of a partial. Here and in the state, the last four rows exist only if the most probable tokens are wanted.
enum DivergenceRow { OF_STUDENT = 0, OF_TEACHER = 4, OF_GAP = 8, OF_FORBIDDEN, OF_TOPS, PARTIAL_ROWS = OF_TOPS + 4 };

constexpr float FAR = 0x1p100f;  // a logit counts at most so many bits below another, so that sums of it stay finite

// The tile of one head. Only two functions depend on its dtype, so that the arithmetic is compiled once.
struct Head {
  void* tile;
  int64_t width, tokens, stride;
  const float* bias;  // (J,) or null
  Transform transform;
  float inv_temperature;
  bool capped;
  // read_block loads the block's logits before temperature. write_block takes gradients by these logits, and writes the
  // gradients by what the GEMM gave, in place of it, and, if `rows_out` (N, J) is given, transposed there too.
  void (*read_block)(const Head&, int64_t row, int rows, int64_t column, int lanes, vf* x);
  void (*write_block)(const Head&, int64_t row, int rows, int64_t column, int lanes, const vf* d, void* rows_out,
                      int64_t out_stride);

  template <typename Lanes>
  void read(int64_t row, int rows, int64_t column, Lanes lanes, vf* x) const {
    read_block(*this, row, rows, column, lanes, x);
  }
  float unit() const { return inv_temperature * LOG2E * (capped ? 1.0f : transform.logit_scale); }
  float slope() const { return inv_temperature * transform.logit_scale; }
  float bias_of(int64_t row) const { return bias ? bias[row] : 0.0f; }
};

template <typename F>
void with_lanes(int lanes, F&& f) {
  lanes == W ? f(AllLanes{}) : f(lanes);
}

template <typename T, bool CAPPED>
void read_block(const Head& h, int64_t row, int rows, int64_t column, int lanes, vf* x) {
  const T* at = static_cast<const T*>(h.tile) + row * h.stride + column;
  with_lanes(lanes, [&](auto all) {
    for (int i = 0; i < rows; ++i)
      x[i] = h.transform.value<CAPPED>(load_lanes(at + i * h.stride, all), h.bias_of(row + i));
  });
}

template <typename T, bool CAPPED>
void write_block(const Head& h, int64_t row, int rows, int64_t column, int lanes, const vf* d, void* rows_out,
                 int64_t out_stride) {
  T* at = static_cast<T*>(h.tile) + row * h.stride + column;
  vu bits[BLOCK] = {};
  with_lanes(lanes, [&](auto all) {
    for (int i = 0; i < rows; ++i) {
      vf dx = d[i];
      if constexpr (CAPPED)
        dx *= h.transform.cap_slope<CAPPED>(load_lanes(at + i * h.stride, all), h.bias_of(row + i));
      bits[i] = to_bits(dx, at);
      store_lanes(at + i * h.stride, dx, all);
    }
    if constexpr (sizeof(T) == 2)
      if (rows_out != nullptr)
        store_transposed(bits, rows, all, static_cast<T*>(rows_out) + column * out_stride + row, out_stride);
  });
}

Head describe(const Tensor& tile, const Tensor& bias, double logit_scale, double softcap, double inv_temperature) {
  expect(tile.dim() == 2 && tile.stride(1) == 1, "a tile must be (J, N), dense along N");
  expect_dense("bias", bias, DType::f32, {tile.size(0)}, true);
  Head h{tile.data<void>(),
         tile.size(0),
         tile.size(1),
         tile.stride(0),
         bias.data<float>(),
         {static_cast<float>(logit_scale), static_cast<float>(softcap)},
         static_cast<float>(inv_temperature),
         bias.defined() || softcap != 0,
         nullptr,
         nullptr};
  for_dtype("tile", tile, [&](auto type) {
    using T = decltype(type);
    h.read_block = h.capped ? read_block<T, true> : read_block<T, false>;
    h.write_block = h.capped ? write_block<T, true> : write_block<T, false>;
  });
  return h;
}

void expect_beside(const Head& s, const Head& t) {
  expect(s.width == t.width && s.tokens == t.tokens, "the tiles of student and teacher must have the same shape");
}

// Update the largest logit so far and its index in the vocabulary (the first of several that tie).
template <typename Lanes>
void keep_top(const vf* x, int rows, int64_t place, float* top_row, float* at_row, Lanes lanes, bool first) {
  vf top = first ? splat(-INFINITY) : load_lanes(top_row, lanes), at = first ? vf{} : load_lanes(at_row, lanes);
  for (int i = 0; i < rows; ++i) {
    const vi better = x[i] > top;
    top = better ? x[i] : top;
    at = better ? splat(static_cast<float>(place + i)) : at;
  }
  store_lanes(top_row, top, lanes);
  store_lanes(at_row, at, lanes);
}

// By how many bits values change when their reference changes.
vf moved(vf before, vf after, float unit) {
  return at_least((at_least(before, LOWEST) - at_least(after, LOWEST)) * unit, -FAR);
}

// `first`: the state is still empty.
template <Mode MODE, bool TOP1, typename Lanes>
void fold_columns(const Head& s, const Head& t, const int64_t* targets, int64_t start, int64_t row, int rows,
                  int64_t column, Lanes lanes, float* state, bool first) {
  const auto at = [&](int r) { return state + r * s.tokens + column; };
  vf xs[BLOCK], xt[BLOCK];
  s.read(row, rows, column, lanes, xs);
  t.read(row, rows, column, lanes, xt);
  const StateColumns<false, Lanes> of_s{at(STUDENT), s.tokens, lanes}, of_t{at(TEACHER), s.tokens, lanes};
  Online<false> online_s = of_s.load(first), online_t = of_t.load(first);
  const vi target = target_rows(targets + column, start, lanes);
  const auto position = [&](int i) { return splat_int(static_cast<int32_t>(row + i)); };
  if constexpr (MODE == MIXTURE) {
    online_s.fold(xs, rows, splat(s.unit()), target, position);
    online_t.fold(xt, rows, splat(t.unit()), target, position);
  } else {
    constexpr bool BY_STUDENT = MODE == REVERSE;
    const vf *x = BY_STUDENT ? xs : xt, *x_other = BY_STUDENT ? xt : xs;
    Online<false>&own = BY_STUDENT ? online_s : online_t, &other = BY_STUDENT ? online_t : online_s;
    const float unit = BY_STUDENT ? s.unit() : t.unit(), unit_other = BY_STUDENT ? t.unit() : s.unit();
    Sum gap;
    vf forbidden{};
    if (!first) {
      gap = {load_lanes(at(GAP), lanes), load_lanes(at(GAP_LOW), lanes)};
      forbidden = load_lanes(at(FORBIDDEN), lanes);
    }
    const vf ref = own.ref, ref_other = other.ref, sum = own.sum.value;
    const vf highest = own.follow(x, rows, splat(unit)), highest_other = other.follow(x_other, rows, splat(unit_other));
    if (any((own.ref != ref) | (other.ref != ref_other))) {
      const vf shift = moved(ref, own.ref, unit);
      gap.value += (shift - moved(ref_other, other.ref, unit_other)) * sum;
      gap.scale(exp2(shift));
    }
    const vf base = at_least(other.ref, LOWEST);
    vf gap_sum{};
    vi found{};
    own.add(x, rows, highest, splat(unit), target, position, [&](int i, vf e, vf y) {
      const vf y_other = at_least((x_other[i] - base) * unit_other, -FAR);
      gap_sum += y < splat(SMALLEST) ? vf{} : e * (y - y_other);
      found |= (x_other[i] == -INFINITY) & (x[i] > -INFINITY);
    });
    other.add(x_other, rows, highest_other, splat(unit_other), target, position, [](int, vf, vf) {});
    gap.add(gap_sum);
    store_lanes(at(GAP), gap.value, lanes);
    store_lanes(at(GAP_LOW), gap.low, lanes);
    store_lanes(at(FORBIDDEN), found ? splat(1.0f) : forbidden, lanes);
  }
  of_s.store(online_s);
  of_t.store(online_t);
  of_s.store_target(xs, row, rows, target);
  of_t.store_target(xt, row, rows, target);
  if constexpr (TOP1) {
    keep_top(xs, rows, start + row, at(TOPS), at(TOPS + 1), lanes, first);
    keep_top(xt, rows, start + row, at(TOPS + 2), at(TOPS + 3), lanes, first);
  }
}

// For log2 p = (x - value) unit - rest of a logit x. It is as exact as LOG_Z + LOG_Z_REST, with or without fused
// multiply-adds, because the difference is taken before the product is rounded.
struct Reference {
  vf value, rest;
  Reference(vf log_z, vf log_z_rest, float unit) : value(log_z / unit) {
    const vd lost = __builtin_convertvector(log_z, vd) - __builtin_convertvector(value, vd) * static_cast<double>(unit);
    rest = log_z_rest + __builtin_convertvector(lost, vf);
  }
};

// Both log-probabilities of a block, in bits, from the merged rows of the whole vocabulary.
struct LogProbs {
  const Head &s, &t;
  const float *s_rows, *t_rows;

  template <typename Lanes, typename F>
  void each(int64_t row, int rows, int64_t column, Lanes lanes, F&& f) const {
    vf xs[BLOCK], xt[BLOCK];
    s.read(row, rows, column, lanes, xs);
    t.read(row, rows, column, lanes, xt);
    const auto result = [&](const float* of, Result r) { return load_lanes(of + r * s.tokens + column, lanes); };
    const float s_unit = s.unit(), t_unit = t.unit();
    const Reference of_s(result(s_rows, LOG_Z), result(s_rows, LOG_Z_REST), s_unit);
    const Reference of_t(result(t_rows, LOG_Z), result(t_rows, LOG_Z_REST), t_unit);
#pragma GCC unroll 2
    for (int i = 0; i < rows; ++i)
      f(i, at_least((xs[i] - of_s.value) * s_unit - of_s.rest, -FAR),
        at_least((xt[i] - of_t.value) * t_unit - of_t.rest, -FAR));
  }
};

// log M minus the student's log-prob, and log M minus the teacher's, in nats; the arguments are in bits.
struct Mixture {
  float beta, rest;  // rest: 1 - beta
  vf over_student{}, over_teacher{};
  explicit Mixture(double of) : beta(static_cast<float>(of)), rest(static_cast<float>(1 - of)) {}
  void operator()(vf student, vf teacher) {
    vf bits = teacher - student;  // beyond the range of exp2, the smaller probability adds nothing
    bits = at_least(bits > splat(-SMALLEST) ? splat(-SMALLEST) : bits, SMALLEST);
    // Relative to the larger probability; e is the ratio of the smaller one to it. Near e = 1, where both results are
    // small differences, 1 - beta and its rounding are avoided.
    const vi less = bits < vf{};  // whether the teacher's is the smaller one
    const vf e = exp2_normal(less ? bits : -bits);
    const vf small = less ? splat(beta) : splat(rest), large = less ? splat(rest) : splat(beta);
    const vf over_larger = log(e < splat(0.5f) ? large + small * e : 1.0f + small * (e - 1.0f));
    over_student = less ? over_larger : over_larger + bits * LN2;
    over_teacher = less ? over_larger - bits * LN2 : over_larger;
  }
};

template <typename Lanes>
void mixture_columns(const LogProbs& log_probs, double beta, int64_t row, int rows, int64_t column, Lanes lanes,
                     float* state, bool first) {
  const auto at = [&](int r) { return state + r * log_probs.s.tokens + column; };
  Sum jsd, kl;
  if (!first) {
    jsd = {load_lanes(at(0), lanes), load_lanes(at(2), lanes)};
    kl = {load_lanes(at(1), lanes), load_lanes(at(3), lanes)};
  }
  Mixture m(beta);
  vf jsd_sum{}, kl_sum{};
  log_probs.each(row, rows, column, lanes, [&](int, vf student, vf teacher) {
    m(student, teacher);
    const vf of_student = exp2(student) * m.over_student;
    jsd_sum -= m.beta * exp2(teacher) * m.over_teacher + m.rest * of_student;
    kl_sum -= of_student;
  });
  jsd.add(jsd_sum);
  kl.add(kl_sum);
  store_lanes(at(0), jsd.value, lanes);
  store_lanes(at(1), kl.value, lanes);
  store_lanes(at(2), jsd.low, lanes);
  store_lanes(at(3), kl.low, lanes);
}

// Constants per token for the backward pass.
struct Upstream {
  const float *kl, *d_divergence, *d_entropy, *d_logprob;
  const int64_t* target;
  int64_t start;
  double beta;
};

// d loss / d x of a student's logit is p (a + b log2 p + c X). X is the teacher's log2 p - log2 p in the reverse KL,
// and log M - log p with the mixture. In the forward KL, d times the teacher's p is subtracted.
template <Mode MODE, typename Lanes>
void grad_columns(const LogProbs& log_probs, const Upstream& up, int64_t row, int rows, int64_t column, Lanes lanes,
                  void* rows_out, int64_t out_stride) {
  const Head& s = log_probs.s;
  const auto upstream = [&](const float* p) { return p ? load_lanes(p + column, lanes) : vf{}; };
  const float slope = s.slope();
  const vf d = upstream(up.d_divergence) * slope, dh = upstream(up.d_entropy) * slope,
           dl = upstream(up.d_logprob) * slope;
  const vf entropy = load_lanes(log_probs.s_rows + ENTROPY * s.tokens + column, lanes);
  // An infinite KL would give NaN even where its gradient is 0
  const vf weighted = d == 0.0f ? vf{} : d * load_lanes(up.kl + column, lanes);
  Mixture m(up.beta);
  vf a = -dl - dh * entropy, c{};
  const vf b = dh * -LN2;
  if constexpr (MODE == FORWARD) a += d;
  if constexpr (MODE == REVERSE) a -= weighted, c = d * -LN2;
  if constexpr (MODE == MIXTURE) a -= m.rest * weighted, c = -m.rest * d;
  vf dx[BLOCK];
  log_probs.each(row, rows, column, lanes, [&](int i, vf student, vf teacher) {
    const vf log2p = at_least(student, NOTHING);
    vf factor = a + b * log2p;
    if constexpr (MODE == REVERSE) factor += c * (teacher - log2p);
    if constexpr (MODE == MIXTURE) {
      m(student, teacher);
      factor += c * m.over_student;
    }
    dx[i] = exp2(log2p) * factor;
    if constexpr (MODE == FORWARD) dx[i] -= d * exp2(teacher);
  });
  const vi target = target_rows(up.target + column, up.start, lanes);
  if (up.d_logprob != nullptr && any(in_block(target, row, rows)))
    for (int i = 0; i < rows; ++i) dx[i] = target == static_cast<int32_t>(row + i) ? dx[i] + dl : dx[i];
  s.write_block(s, row, rows, column, lanes, dx, rows_out, out_stride);
}

template <Mode MODE>
using Constant = std::integral_constant<Mode, MODE>;

template <typename F>
void with_mode(double beta, F&& f) {
  switch (mode_of(beta)) {
    case FORWARD: return f(Constant<FORWARD>{});
    case REVERSE: return f(Constant<REVERSE>{});
    case MIXTURE: return f(Constant<MIXTURE>{});
  }
}

LogProbs expect_log_probs(const Head& s, const Head& t, const Tensor& s_rows, const Tensor& t_rows) {
  expect_beside(s, t);
  expect_dense("student_rows", s_rows, DType::f32, {4, s.tokens});
  expect_dense("teacher_rows", t_rows, DType::f32, {4, s.tokens});
  return {s, t, s_rows.data<float>(), t_rows.data<float>()};
}

}  // namespace

void linear_divergence_fold(const Tensor& s_tile, const Tensor& s_bias, double s_scale, double s_softcap,
                            const Tensor& t_tile, const Tensor& t_bias, double t_scale, double t_softcap,
                            double inv_temperature, double beta, const Tensor& target, int64_t start,
                            const Tensor& state, bool first, int threads) {
  const Head s = describe(s_tile, s_bias, s_scale, s_softcap, inv_temperature);
  const Head t = describe(t_tile, t_bias, t_scale, t_softcap, inv_temperature);
  expect_beside(s, t);
  const bool top1 = state.size(0) == STATE_ROWS;
  expect_dense("target", target, DType::i64, {s.tokens});
  expect_dense("state", state, DType::f32, {top1 ? STATE_ROWS : TOPS, s.tokens});
  with_mode(beta, [&](auto mode) {
    const auto run = [&](auto with_top1) {
      for_blocks(s.width, s.tokens, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
        fold_columns<mode, with_top1>(s, t, target.data<const int64_t>(), start, row, rows, column, lanes,
                                      state.data<float>(), first && row == 0);
      });
    };
    top1 ? run(std::true_type{}) : run(std::false_type{});
  });
}

void linear_divergence_finish(const Tensor& state, double s_unit_of_all, double t_unit_of_all, double beta,
                              const Tensor& partial) {
  const int64_t n = state.size(1);
  const bool top1 = state.size(0) == STATE_ROWS;
  expect_dense("state", state, DType::f32, {top1 ? STATE_ROWS : TOPS, n});
  expect_dense("partial", partial, DType::f32, {top1 ? PARTIAL_ROWS : OF_TOPS, n});
  const float units[] = {static_cast<float>(s_unit_of_all) * LOG2E, static_cast<float>(t_unit_of_all) * LOG2E};
  const int states[] = {STUDENT, TEACHER}, partials[] = {OF_STUDENT, OF_TEACHER};
  const float* in = state.data<const float>();
  float* out = partial.data<float>();
  const int own = mode_of(beta) == REVERSE ? 0 : 1;
  for (int64_t i = 0; i < n; ++i) {
    float lost[2];
    for (int h = 0; h < 2; ++h)
      lost[h] = finish_partial(in + states[h] * n, i, n, units[h], false, out + partials[h] * n);
    const bool mixture = mode_of(beta) == MIXTURE;
    const float sum = in[(states[own] + SUM) * n + i];
    out[OF_GAP * n + i] =
        mixture ? 0.0f : (in[GAP * n + i] + (lost[own] - lost[1 - own]) * sum) * std::exp2(lost[own]);
    out[OF_FORBIDDEN * n + i] = mixture ? 0.0f : in[FORBIDDEN * n + i];
    if (!top1) continue;
    for (int h = 0; h < 2; ++h) {
      const float top = in[(TOPS + 2 * h) * n + i], ref = in[(states[h] + REF) * n + i];
      out[(OF_TOPS + 2 * h) * n + i] = top == -INFINITY ? top : (top - ref) * units[h] + lost[h];
      out[(OF_TOPS + 2 * h + 1) * n + i] = in[(TOPS + 2 * h + 1) * n + i];
    }
  }
}

void linear_divergence_mixture(const Tensor& s_tile, const Tensor& s_bias, double s_scale, double s_softcap,
                               const Tensor& t_tile, const Tensor& t_bias, double t_scale, double t_softcap,
                               double inv_temperature, double beta, const Tensor& s_rows, const Tensor& t_rows,
                               const Tensor& state, bool first, int threads) {
  const Head s = describe(s_tile, s_bias, s_scale, s_softcap, inv_temperature);
  const Head t = describe(t_tile, t_bias, t_scale, t_softcap, inv_temperature);
  const LogProbs log_probs = expect_log_probs(s, t, s_rows, t_rows);
  expect_dense("state", state, DType::f32, {4, s.tokens});
  for_blocks(s.width, s.tokens, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
    mixture_columns(log_probs, beta, row, rows, column, lanes, state.data<float>(), first && row == 0);
  });
}

void linear_divergence_grad(const Tensor& s_tile, const Tensor& s_bias, double s_scale, double s_softcap,
                            const Tensor& t_tile, const Tensor& t_bias, double t_scale, double t_softcap,
                            double inv_temperature, double beta, const Tensor& target, int64_t start,
                            const Tensor& s_rows, const Tensor& t_rows, const Tensor& kl, const Tensor& d_divergence,
                            const Tensor& d_entropy, const Tensor& d_logprob, const Tensor& rows_out, int threads) {
  const Head s = describe(s_tile, s_bias, s_scale, s_softcap, inv_temperature);
  const Head t = describe(t_tile, t_bias, t_scale, t_softcap, inv_temperature);
  const LogProbs log_probs = expect_log_probs(s, t, s_rows, t_rows);
  expect_dense("target", target, DType::i64, {s.tokens});
  expect_dense("kl", kl, DType::f32, {s.tokens});
  expect_dense("d_divergence", d_divergence, DType::f32, {s.tokens}, true);
  expect_dense("d_entropy", d_entropy, DType::f32, {s.tokens}, true);
  expect_dense("d_logprob", d_logprob, DType::f32, {s.tokens}, true);
  expect_transposed(rows_out, s_tile);
  const int64_t out_stride = rows_out.defined() ? rows_out.stride(0) : 0;
  const Upstream up{kl.data<float>(),        d_divergence.data<float>(),    d_entropy.data<float>(),
                    d_logprob.data<float>(), target.data<const int64_t>(), start,
                    beta};
  with_mode(beta, [&](auto mode) {
    for_blocks(s.width, s.tokens, threads, [&](int64_t row, int rows, int64_t column, auto lanes) {
      grad_columns<mode>(log_probs, up, row, rows, column, lanes, rows_out.data<void>(), out_stride);
    });
  });
}

}  // namespace flashpo::FLASHPO_ISA
