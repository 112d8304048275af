// tree_recurrence on the CPU, in fp32. The formulas are those of python/flashpo/ops/tree_recurrence.py.
//
// The chunks of one depth are independent of each other, and so are the heads. A unit of work is a chunk with some of
// the heads that belong to one key head. Forward goes down the tree and stores for each chunk the state from which it
// starts. Backward goes up; each chunk adds up the gradients of the states that continue its own, in their order.
#include "../ops.h"
#include "for_dtype.h"
#include "recurrence_terms.h"

namespace flashpo::FLASHPO_ISA {
namespace recurrence {
namespace {

template <typename T, bool FEATURES>
class Forward : Terms<T, FEATURES> {
  using Base = Terms<T, FEATURES>;

 public:
  Forward(Arena& arena, const Shape& shape, const Inputs& inputs, const ChunkTree& chunks, const States& states,
          const Tensor& out, const Tensor& ends)
      : Base(arena, shape, inputs), chunks_(chunks), states_(states), out_(out.data<T>()), ends_(ends.data<float>()) {}

  void operator()(int64_t chunk, int64_t unit) {
    const Shape& shape = this->shape_;
    this->begin(chunks_.chunks[chunk], unit);
    const int64_t wide = this->wide_values_;
    for (int64_t h = 0; h < this->heads_; ++h) {
      const int64_t head = this->first_head_ + h;
      this->compute(head);
      this->read_state(head, states_.at(chunk, head), true);
      multiply_lower(this->n_, wide, this->within_, this->size_, this->update_, this->read_, true);
      for (int64_t i = 0; i < this->n_; ++i)
        write_row(this->read_ + i * wide, 1.0f, shape.values,
                  out_ + ((this->begin_ + i) * shape.heads() + head) * shape.values);
      hand_on(chunk, head);
    }
  }

 private:
  void hand_on(int64_t chunk, int64_t head) {
    const auto &next = chunks_.next, &ends = chunks_.ends;
    const int64_t first = next.first[chunk], last = next.first[chunk + 1], first_end = ends.first[chunk];
    const int64_t last_end = ends_ == nullptr ? first_end : ends.first[chunk + 1];
    if (first == last && first_end == last_end) return;
    const int64_t wide = this->wide_values_;
    for (int64_t d = 0; d < this->shape_.features; ++d) {
      const float kept = this->reach_[FEATURES ? (this->n_ - 1) * this->wide_ + d : this->n_ - 1];
      for (int64_t v = 0; v < wide; v += W)
        store(this->state_ + d * wide + v, load(this->state_ + d * wide + v) * kept);
    }
    multiply(this->shape_.features, wide, this->n_, this->write_, One{}, this->wide_, this->update_, this->state_,
             true);
    for (int64_t i = first; i < last; ++i) write_state(states_.at(next.items[i], head));
    for (int64_t i = first_end; i < last_end; ++i)
      write_state(ends_ + (ends.items[i] * this->shape_.heads() + head) * this->shape_.state());
  }
  void write_state(float* to) const {
    for (int64_t d = 0; d < this->shape_.features; ++d)
      write_row(this->state_ + d * this->wide_values_, 1.0f, this->shape_.values, to + d * this->shape_.values);
  }

  const ChunkTree& chunks_;
  const States& states_;
  T* out_;
  float* ends_;
};

// Where the gradients are written. dq and dk are (groups, tokens, key heads, features), to be added up over groups.
struct Gradients {
  float *dq, *dk, *dv, *d_decay, *d_beta;
};

template <typename T, bool FEATURES>
class Backward : Terms<T, FEATURES> {
  using Base = Terms<T, FEATURES>;

 public:
  Backward(Arena& arena, const Shape& shape, const Inputs& inputs, const ChunkTree& chunks, const States& before,
           const States& d_states, const Tensor& d_out, const Tensor& d_ends, const Gradients& gradients)
      : Base(arena, shape, inputs),
        chunks_(chunks),
        before_(before),
        d_states_(d_states),
        d_out_(d_out.data<const T>()),
        d_ends_(d_ends.data<const float>()),
        to_(gradients),
        dq_(arena.take(this->size_ * this->wide_)),
        dk_(arena.take(this->size_ * this->wide_)),
        d_by_query_(arena.take(this->size_ * this->size_)),
        d_by_key_(arena.take(this->size_ * this->size_)),
        d_behind_(arena.take(this->wide_ * this->wide_values_)),
        turned_state_(arena.take(this->wide_ * this->wide_values_)),
        turned_update_(arena.take(this->size_ * this->wide_values_)),
        upstream_(arena.take(2 * this->size_ * this->wide_values_)),
        d_reached_(arena.take(2 * this->size_ * this->wide_)),
        d_write_(arena.take(this->size_ * this->wide_)),
        d_pairs_(arena.take(2 * this->size_ * this->size_)),
        d_reach_(arena.take(this->size_ * (FEATURES ? this->wide_ : 1))),
        d_rest_(arena.take(this->size_ * (FEATURES ? this->wide_ : 1))),
        d_decay_(arena.take(this->size_ * (FEATURES ? this->wide_ : 1))),
        d_keep_(arena.take(this->size_)) {}

  void operator()(int64_t chunk, int64_t unit) {
    this->begin(chunks_.chunks[chunk], unit);
    const int64_t wide = this->wide_, size = this->size_, n = this->n_;
    for (float* x : {dq_, dk_}) std::fill(x, x + n * wide, 0.0f);
    for (float* x : {d_by_query_, d_by_key_}) std::fill(x, x + n * size, 0.0f);
    for (int64_t h = 0; h < this->heads_; ++h) one_head(chunk, this->first_head_ + h);
    if constexpr (!FEATURES) {
      multiply(n, wide, n, d_by_query_, size, One{}, this->keys_, dq_, true);
      multiply(n, wide, n, d_by_query_, One{}, size, this->queries_, dk_, true);
      if (this->shape_.delta) {
        multiply(n, wide, n, d_by_key_, size, One{}, this->keys_, dk_, true);
        multiply(n, wide, n, d_by_key_, One{}, size, this->keys_, dk_, true);
      }
    }
    const int64_t features = this->shape_.features;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (this->group_ * this->shape_.tokens + this->begin_ + i) * this->shape_.key_heads;
      write_row(dq_ + i * wide, this->scale_, features, to_.dq + (at + this->key_head_) * features);
      write_row(dk_ + i * wide, 1.0f, features, to_.dk + (at + this->key_head_) * features);
    }
  }

 private:
  void one_head(int64_t chunk, int64_t head) {
    const Shape& shape = this->shape_;
    const int64_t n = this->n_, wide = this->wide_, values = this->wide_values_, size = this->size_;
    this->compute(head);
    this->read_state(head, before_.at(chunk, head), false);
    add_up_behind(chunk, head);
    turn(this->state_, wide, values, turned_state_);
    std::fill(this->update_ + n * values, this->update_ + size * values, 0.0f);
    turn(this->update_, size, values, turned_update_);

    // upstream_ holds the gradient of out, and below it -r, where r is the gradient of (I + A) u.
    float* const r = upstream_ + n * values;
    float* const du = shape.delta ? r : this->read_;
    for (int64_t i = 0; i < n; ++i)
      Math::load_row(d_out_ + ((this->begin_ + i) * shape.heads() + head) * shape.values, shape.values, values,
                     upstream_ + i * values);
    multiply_turned(n, values, this->within_, size, upstream_, du, false);
    multiply(n, values, shape.features, this->write_, wide, One{}, d_behind_, du, true);
    if (shape.delta) solve_turned(n, values, this->against_, size, r);
    for (int64_t i = 0; i < n; ++i)
      write_row(du + i * values, shape.delta ? this->beta(i, head) : 1.0f, shape.values,
                to_.dv + ((this->begin_ + i) * shape.heads() + head) * shape.values);
    if (shape.delta)
      for (int64_t i = 0; i < n * values; i += W) store(r + i, -load(r + i));

    multiply(this->rows(), wide, shape.values, upstream_, values, One{}, turned_state_, d_reached_, false);
    multiply(this->rows(), size, shape.values, upstream_, values, One{}, turned_update_, d_pairs_, false);
    turn(d_behind_, wide, values, turned_state_);
    multiply(n, wide, shape.values, this->update_, values, One{}, turned_state_, d_write_, false);

    for (int64_t i = 0; i < n; ++i) of_token(i, head);
    of_last_state();
    hand_back(chunk, head);
    FEATURES ? pairs_by_feature(head) : pairs_together(head);
  }

  // Compute the gradient of the state after the chunk.
  void add_up_behind(int64_t chunk, int64_t head) {
    const Shape& shape = this->shape_;
    const int64_t values = this->wide_values_;
    std::fill(d_behind_, d_behind_ + this->wide_ * values, 0.0f);
    const auto add = [&](const float* from) {
      for (int64_t d = 0; d < shape.features; ++d, from += shape.values) {
        float* const to = d_behind_ + d * values;
        int64_t v = 0;
        for (; v + W <= shape.values; v += W) store(to + v, load(to + v) + load(from + v));
        if (v < shape.values)
          store(to + v, load(to + v) + load_part(from + v, static_cast<int>(shape.values - v), 0.0f));
      }
    };
    const auto &next = chunks_.next, &ends = chunks_.ends;
    for (int64_t i = next.first[chunk]; i < next.first[chunk + 1]; ++i) add(d_states_.at(next.items[i], head));
    if (d_ends_ == nullptr) return;
    for (int64_t i = ends.first[chunk]; i < ends.first[chunk + 1]; ++i)
      add(d_ends_ + (ends.items[i] * shape.heads() + head) * shape.state());
  }

  // The gradients from products with states: of q and k, of the exponentials, and of beta except for its part in A.
  void of_token(int64_t i, int64_t head) {
    const Shape& shape = this->shape_;
    const int64_t wide = this->wide_;
    const float b = this->beta(i, head);
    vf reach_sum{}, rest_sum{}, beta_sum{};
    for (int64_t d = 0; d < wide; d += W) {
      const int64_t at = i * wide + d, below = (this->n_ + i) * wide + d;
      const vf reach = this->factor(this->reach_, i, d);
      vf d_key = load(d_write_ + at) * this->factor(this->rest_, i, d);
      vf d_reach = load(this->reached_ + at) * load(d_reached_ + at);
      const vf d_rest = load(this->write_ + at) * load(d_write_ + at);
      if (shape.delta) {
        const vf d_read = load(d_reached_ + below) * reach;
        d_key += b * d_read;
        d_reach += load(this->reached_ + below) * load(d_reached_ + below);
        beta_sum += load(this->keys_ + at) * d_read;
      }
      store(dq_ + at, load(dq_ + at) + load(d_reached_ + at) * reach);
      store(dk_ + at, load(dk_ + at) + d_key);
      if constexpr (FEATURES) {
        store(d_reach_ + at, d_reach);
        store(d_rest_ + at, d_rest);
      }
      reach_sum += d_reach;
      rest_sum += d_rest;
    }
    if constexpr (!FEATURES) {
      d_reach_[i] = reduce(reach_sum, sum_of);
      d_rest_[i] = reduce(rest_sum, sum_of);
    }
    if (!shape.delta) return;
    const float* const r = upstream_ + (this->n_ + i) * this->wide_values_;
    Math::load_row(this->v_.at(this->begin_ + i, head), shape.values, this->wide_values_, this->read_);
    for (int64_t v = 0; v < this->wide_values_; v += W) beta_sum -= load(r + v) * load(this->read_ + v);
    d_keep_[i] = reduce(beta_sum, sum_of);
  }

  // The gradient through exp(G_last) S_before, which is a part of the state after the chunk.
  void of_last_state() {
    const int64_t values = this->wide_values_, last = this->n_ - 1;
    vf sum{};
    for (int64_t d = 0; d < this->shape_.features; ++d) {
      vf row{};
      for (int64_t v = 0; v < values; v += W)
        row += load(this->state_ + d * values + v) * load(d_behind_ + d * values + v);
      if constexpr (FEATURES)
        d_reach_[last * this->wide_ + d] += this->reach_[last * this->wide_ + d] * reduce(row, sum_of);
      sum += row;
    }
    if constexpr (!FEATURES) d_reach_[last] += this->reach_[last] * reduce(sum, sum_of);
  }

  // Compute the gradient of the state before the chunk.
  void hand_back(int64_t chunk, int64_t head) {
    if (chunks_.chunks[chunk].depth == 0) return;
    const int64_t values = this->wide_values_, last = this->n_ - 1;
    for (int64_t d = 0; d < this->shape_.features; ++d) {
      const float kept = this->reach_[FEATURES ? last * this->wide_ + d : last];
      for (int64_t v = 0; v < values; v += W) store(d_behind_ + d * values + v, load(d_behind_ + d * values + v) * kept);
    }
    multiply(this->shape_.features, values, this->rows(), this->reached_, One{}, this->wide_, upstream_, d_behind_,
             true);
    float* to = d_states_.at(chunk, head);
    for (int64_t d = 0; d < this->shape_.features; ++d, to += this->shape_.values)
      write_row(d_behind_ + d * values, 1.0f, this->shape_.values, to);
  }

  // From the gradients of P and A, compute those of the products of all pairs, of the decays between them, and of beta.
  void pairs_together(int64_t head) {
    const int64_t n = this->n_, size = this->size_, heads = this->shape_.heads();
    float* const between = this->read_;  // for each earlier token, the sum over the tokens from i
    std::fill(between, between + size, 0.0f);
    float from_start = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
      const float b = this->beta(i, head);
      vf decay_sum{}, beta_sum{};
      for (int64_t j = 0; j <= i; j += W) {
        const int64_t at = i * size + j;
        const vi earlier = iota() + static_cast<int32_t>(j) < splat_int(static_cast<int32_t>(i));
        const vf factor = load(this->factors_ + at);
        const vf d_query = load(d_pairs_ + at) * factor;
        vf d_gap = d_query * load(this->by_query_ + at);
        store(d_by_query_ + at, load(d_by_query_ + at) + d_query);
        if (this->shape_.delta) {
          const vf d_key = earlier ? load(d_pairs_ + (n + i) * size + j) * factor : vf{};
          const vf of_beta = d_key * load(this->by_key_ + at);
          store(d_by_key_ + at, load(d_by_key_ + at) + d_key * b);
          beta_sum += of_beta;
          d_gap += of_beta * b;
        }
        if (i == n - 1) d_gap += load(d_rest_ + j);
        const vf sum = load(between + j) + (earlier ? d_gap : vf{});
        store(between + j, sum);
        decay_sum += earlier ? sum : vf{};
      }
      from_start += d_reach_[i];
      const int64_t to = (this->begin_ + i) * heads + head;
      to_.d_decay[to] = from_start + reduce(decay_sum, sum_of);
      if (this->shape_.delta) to_.d_beta[to] = d_keep_[i] + reduce(beta_sum, sum_of);
    }
  }

  void pairs_by_feature(int64_t head) {
    const int64_t n = this->n_, size = this->size_, wide = this->wide_;
    std::fill(d_decay_, d_decay_ + n * wide, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
      this->load_kept(i, head);
      this->step(i);
      const float b = this->beta(i, head);
      const float *const d_query = d_pairs_ + i * size, *const d_key = d_pairs_ + (n + i) * size;
      vf beta_sum{};
      for (int64_t d = 0; d < wide; d += W) {
        const vf query = load(this->queries_ + i * wide + d), key = load(this->keys_ + i * wide + d);
        vf dq{}, dk{}, between = load(d_reach_ + i * wide + d);  // of the decays after token j
        store(d_decay_ + d, load(d_decay_ + d) + between);
        for (int64_t j = 0; j < i; ++j) {
          const int64_t at = j * wide + d;
          const vf factor = load(this->factors_ + at), other = load(this->keys_ + at), kept = other * factor;
          vf d_other = d_query[j] * query;
          dq += d_query[j] * kept;
          if (this->shape_.delta) {
            d_other += b * d_key[j] * key;
            dk += d_key[j] * kept;
          }
          d_other *= factor;
          store(dk_ + at, load(dk_ + at) + d_other);
          between += d_other * other;
          if (i == n - 1) between += load(d_rest_ + at);
          store(d_decay_ + at + wide, load(d_decay_ + at + wide) + between);
        }
        beta_sum += dk * key;
        store(dq_ + i * wide + d, load(dq_ + i * wide + d) + dq + d_query[i] * key);
        store(dk_ + i * wide + d, load(dk_ + i * wide + d) + b * dk + d_query[i] * query);
      }
      const int64_t to = (this->begin_ + i) * this->shape_.heads() + head;
      if (this->shape_.delta) to_.d_beta[to] = d_keep_[i] + reduce(beta_sum, sum_of);
    }
    const int64_t features = this->shape_.features;
    for (int64_t i = 0; i < n; ++i)
      write_row(d_decay_ + i * wide, 1.0f, features,
                to_.d_decay + ((this->begin_ + i) * this->shape_.heads() + head) * features);
  }

  const ChunkTree& chunks_;
  const States &before_, &d_states_;
  const T* d_out_;
  const float* d_ends_;
  const Gradients& to_;
  float *dq_, *dk_, *d_by_query_, *d_by_key_, *d_behind_, *turned_state_, *turned_update_, *upstream_, *d_reached_,
      *d_write_, *d_pairs_, *d_reach_, *d_rest_, *d_decay_, *d_keep_;
};

Shape shape_of(const Inputs& x, int64_t size) {
  expect(x.q.dim() == 3 && x.k.dim() == 3 && x.v.dim() == 3, "q, k, v must have 3 dimensions");
  Shape s{x.q.size(0), x.q.size(1), 0, x.q.size(2), x.v.size(2), size, x.decay.dim() == 3, x.beta.defined()};
  s.rep = s.key_heads > 0 ? x.v.size(1) / s.key_heads : 0;
  for (const Tensor* y : {&x.q, &x.k, &x.v})
    expect(y->dtype() == x.q.dtype() && y->size(0) == s.tokens && (y->stride(2) == 1 || y->size(2) == 1),
           "q, k, v must be of one dtype and length, dense along features");
  expect(s.rep > 0 && x.v.size(1) == s.heads() && x.k.size(1) == s.key_heads && x.k.size(2) == s.features,
         "q, k, v must have heads that fit");
  expect(size > 0 && size % LANES == 0, "chunks must be of whole vectors");
  s.per_feature ? expect_dense("decay", x.decay, DType::f32, {s.tokens, s.heads(), s.features})
                : expect_dense("decay", x.decay, DType::f32, {s.tokens, s.heads()});
  expect_dense("beta", x.beta, DType::f32, {s.tokens, s.heads()}, true);
  return s;
}

// Call run(T{}, whether there is a decay per feature).
template <typename F>
void for_kind(const Inputs& inputs, F&& run) {
  for_dtype("v", inputs.v, [&](auto element) {
    inputs.decay.dim() == 3 ? run(element, std::true_type{}) : run(element, std::false_type{});
  });
}

// Call f(chunk, unit, thread) for all chunks, one depth after the other, away from the roots or towards them.
template <typename F>
void from_depth_to_depth(const ChunkTree& chunks, const Shape& shape, bool down, int threads, F&& f) {
  together(threads, [&] {
    for (int64_t step = 0; step < chunks.depths(); ++step) {
      const int64_t depth = down ? step : chunks.depths() - 1 - step, first = chunks.first[depth];
      const int64_t units = shape.units(), count = (chunks.first[depth + 1] - first) * units;
      take_turns(count, threads, [&](int64_t i, int64_t thread) { f(first + i / units, i % units, thread); });
    }
  });
}

// Memory for the gradients of the states of two depths and, if a key head has several units, for dq and dk of each.
struct Room {
  float *d_states, *dq, *dk;
  Room(Arena& arena, const Shape& shape, const ChunkTree& chunks)
      : d_states(arena.take(States::of_two_depths(shape, chunks))), dq(parts(arena, shape)), dk(parts(arena, shape)) {}
  static float* parts(Arena& arena, const Shape& shape) {
    return arena.take(shape.groups() > 1 ? shape.groups() * shape.tokens * shape.key_heads * shape.features : 0);
  }
};

void add_parts(const float* parts, int64_t count, int64_t size, float* out, int threads) {
  parallel_for(size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = parts[i];
      for (int64_t part = 1; part < count; ++part) sum += parts[part * size + i];
      out[i] = sum;
    }
  });
}

}  // namespace
}  // namespace recurrence

using namespace recurrence;

// states: before the chunks (chunks, heads, features, values), or undefined. ends: (segments, ...), or undefined.
void tree_recurrence_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, const Tensor& beta,
                         const Tensor& token, const Tensor& before, const Tensor& last,
                         const std::vector<int64_t>& sizes, double scale, const Tensor& out, const Tensor& states,
                         const Tensor& ends, const Tensor& scratch, int threads) {
  const Inputs inputs{q, k, v, decay, beta, static_cast<float>(scale)};
  const Shape shape = shape_of(inputs, token.size(-1));
  const ChunkTree chunks(token, before, last, sizes, shape.tokens);
  expect_dense("out", out, v.dtype(), {shape.tokens, shape.heads(), shape.values});
  expect_dense("states", states, DType::f32, {chunks.count(), shape.heads(), shape.features, shape.values}, true);
  expect_dense("ends", ends, DType::f32, {last.size(0), shape.heads(), shape.features, shape.values}, true);
  Arena arena(scratch.data<float>());
  const bool all = states.defined();
  float* const room = arena.take(all ? 0 : States::of_two_depths(shape, chunks));
  const States kept{shape, chunks, all ? states.data<float>() : room, all};
  for_kind(inputs, [&](auto element, auto features) {
    auto workers = crew<Forward<decltype(element), features.value>>(arena, threads, shape, inputs, chunks, kept, out,
                                                                    ends);
    expect_dense("scratch", scratch, DType::f32, {arena.used()});
    std::fill(kept.p, kept.at(0, 0) + chunks.first[1] * shape.heads() * shape.state(), 0.0f);
    from_depth_to_depth(chunks, shape, true, threads,
                        [&](int64_t chunk, int64_t unit, int64_t thread) { workers[thread](chunk, unit); });
  });
}

// dq, dk and dv are fp32.
void tree_recurrence_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, const Tensor& beta,
                         const Tensor& token, const Tensor& before, const Tensor& last,
                         const std::vector<int64_t>& sizes, double scale, const Tensor& states, const Tensor& d_out,
                         const Tensor& d_ends, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                         const Tensor& d_decay, const Tensor& d_beta, const Tensor& scratch, int threads) {
  const Inputs inputs{q, k, v, decay, beta, static_cast<float>(scale)};
  const Shape shape = shape_of(inputs, token.size(-1));
  const ChunkTree chunks(token, before, last, sizes, shape.tokens);
  const int64_t heads = shape.heads(), of_keys = shape.tokens * shape.key_heads * shape.features;
  expect_dense("states", states, DType::f32, {chunks.count(), heads, shape.features, shape.values});
  expect_dense("d_out", d_out, v.dtype(), {shape.tokens, heads, shape.values});
  expect_dense("d_ends", d_ends, DType::f32, {last.size(0), heads, shape.features, shape.values}, true);
  for (const Tensor* x : {&dq, &dk})
    expect_dense("dq, dk", *x, DType::f32, {shape.tokens, shape.key_heads, shape.features});
  expect_dense("dv", dv, DType::f32, {shape.tokens, heads, shape.values});
  shape.per_feature ? expect_dense("d_decay", d_decay, DType::f32, {shape.tokens, heads, shape.features})
                    : expect_dense("d_decay", d_decay, DType::f32, {shape.tokens, heads});
  expect_dense("d_beta", d_beta, DType::f32, {shape.tokens, heads}, !shape.delta);
  Arena arena(scratch.data<float>());
  const Room room(arena, shape, chunks);
  const bool parts = shape.groups() > 1;
  const States kept{shape, chunks, states.data<float>(), true}, d_states{shape, chunks, room.d_states, false};
  const Gradients to{parts ? room.dq : dq.data<float>(), parts ? room.dk : dk.data<float>(), dv.data<float>(),
                     d_decay.data<float>(), d_beta.data<float>()};
  for_kind(inputs, [&](auto element, auto features) {
    auto workers = crew<Backward<decltype(element), features.value>>(arena, threads, shape, inputs, chunks, kept,
                                                                     d_states, d_out, d_ends, to);
    expect_dense("scratch", scratch, DType::f32, {arena.used()});
    from_depth_to_depth(chunks, shape, false, threads,
                        [&](int64_t chunk, int64_t unit, int64_t thread) { workers[thread](chunk, unit); });
  });
  if (!parts) return;
  add_parts(room.dq, shape.groups(), of_keys, dq.data<float>(), threads);
  add_parts(room.dk, shape.groups(), of_keys, dk.data<float>(), threads);
}

int64_t tree_recurrence_scratch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,
                                const Tensor& beta, const Tensor& token, const Tensor& before, const Tensor& last,
                                const std::vector<int64_t>& sizes, bool backward, bool with_states, int threads) {
  const Inputs inputs{q, k, v, decay, beta, 1.0f};
  const Shape shape = shape_of(inputs, token.size(-1));
  const ChunkTree chunks(token, before, last, sizes, shape.tokens);
  const States none{shape, chunks, nullptr, true};
  const Tensor nothing;
  const Gradients to{};
  Arena arena;
  for_kind(inputs, [&](auto, auto features) {
    if (backward) {
      const Room room(arena, shape, chunks);
      crew<Backward<float, features.value>>(arena, threads, shape, inputs, chunks, none, none, nothing, nothing, to);
    } else {
      arena.take(with_states ? 0 : States::of_two_depths(shape, chunks));
      crew<Forward<float, features.value>>(arena, threads, shape, inputs, chunks, none, nothing, nothing);
    }
  });
  return arena.used();
}

}  // namespace flashpo::FLASHPO_ISA
