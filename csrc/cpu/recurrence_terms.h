// tree_recurrence on the CPU: the terms of a chunk and a head that both forward and backward need. The formulas are
// those of python/flashpo/ops/tree_recurrence.py.
//
// The heads that belong to one key head are computed together, in groups of limited size. Without decays per feature
// they share the products of queries and keys. exp(G_i - G_j) is computed as a product of the tokens' exp(decay), so no
// digits are lost in differences of sums, and one exponential per token is enough.
#pragma once
#include <algorithm>

#include "../chunk_tree.h"
#include "crew.h"

namespace flashpo::FLASHPO_ISA::recurrence {

using tree::Chunk;
using tree::ChunkTree;

constexpr int64_t MOST_HEADS = 4;  // heads in one unit of work

struct Shape {
  int64_t tokens, key_heads, rep, features, values, size;  // size: tokens per chunk
  bool per_feature, delta;

  int64_t heads() const { return key_heads * rep; }
  int64_t group() const { return std::min(rep, MOST_HEADS); }
  int64_t groups() const { return (rep + group() - 1) / group(); }
  int64_t units() const { return key_heads * groups(); }
  int64_t wide() const { return round_up(features, LANES); }
  int64_t wide_values() const { return round_up(values, LANES); }
  int64_t state() const { return features * values; }
};

struct Inputs {
  const Tensor &q, &k, &v, &decay, &beta;
  float scale;
};

// The states of all chunks, or of the chunks of two depths, which is enough for passing states from depth to depth.
struct States {
  const Shape& shape;
  const ChunkTree& chunks;
  float* p;
  bool all;

  static int64_t of_two_depths(const Shape& shape, const ChunkTree& chunks) {
    return 2 * chunks.widest * shape.heads() * shape.state();
  }
  float* at(int64_t chunk, int64_t head) const {
    const Chunk& c = chunks.chunks[chunk];
    const int64_t place = all ? chunk : c.depth % 2 * chunks.widest + c.at;
    return p + (place * shape.heads() + head) * shape.state();
  }
};

static inline vf sum_of(vf a, vf b) { return a + b; }

// The product of two factors, or 0 if it is below fp32's normal numbers, with which processors are slow.
static inline vf decayed(vf x, vf by) {
  const vf y = x * by;
  return y < splat(1.17549435e-38f) ? vf{} : y;
}

// c (rows x columns) = a b or c += a b, where a(i, k) = a[i stride + k step]; stride or step is One.
template <typename Stride, typename Step>
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, Stride stride, Step step,
                            const float* b, float* c, bool add) {
  Near near;
  for (int64_t k = 0; k < depth; k += CHAIN, add = true) {
    const int64_t part = std::min(CHAIN, depth - k);
    int64_t j = 0;
    for (; j + TILE_VECTORS * W <= columns; j += TILE_VECTORS * W)
      product_vectors<TILE_VECTORS>(rows, a + k * step, stride, b + k * columns + j, columns, part, c + j, columns, add,
                                    near, step);
    for (; j < columns; j += W)
      product_vectors<1>(rows, a + k * step, stride, b + k * columns + j, columns, part, c + j, columns, add, near,
                         step);
  }
}

// c (rows x columns) = l b or c += l b for a lower triangle l (rows x rows) with zeros above it; then the same for l^T.
static inline void multiply_lower(int64_t rows, int64_t columns, const float* l, int64_t size, const float* b,
                                  float* c, bool add) {
  for (int64_t i = 0; i < rows; i += 2 * TILE_ROWS) {
    const int64_t stop = std::min<int64_t>(i + 2 * TILE_ROWS, rows);
    multiply(stop - i, columns, stop, l + i * size, size, One{}, b, c + i * columns, add);
  }
}
static inline void multiply_turned(int64_t rows, int64_t columns, const float* l, int64_t size, const float* b,
                                   float* c, bool add) {
  for (int64_t j = 0; j < rows; j += 2 * TILE_ROWS) {
    const int64_t stop = std::min<int64_t>(j + 2 * TILE_ROWS, rows);
    multiply(stop - j, columns, rows - j, l + j * size + j, One{}, size, b + j * columns, c + j * columns, add);
  }
}

// x (rows x columns) = (I - l)^-1 x for a strictly lower l; then the same for l^T.
static inline void solve(int64_t rows, int64_t columns, const float* l, int64_t size, float* x) {
  for (int64_t begin = 0; begin < rows; begin += TILE_ROWS) {
    const int64_t stop = std::min<int64_t>(begin + TILE_ROWS, rows);
    if (begin > 0) multiply(stop - begin, columns, begin, l + begin * size, size, One{}, x, x + begin * columns, true);
    for (int64_t v = 0; v < columns; v += W) {
      for (int64_t i = begin + 1; i < stop; ++i) {
        vf sum = load(x + i * columns + v);
        for (int64_t j = begin; j < i; ++j) sum += l[i * size + j] * load(x + j * columns + v);
        store(x + i * columns + v, sum);
      }
    }
  }
}
static inline void solve_turned(int64_t rows, int64_t columns, const float* l, int64_t size, float* x) {
  for (int64_t begin = (rows - 1) / TILE_ROWS * TILE_ROWS; begin >= 0; begin -= TILE_ROWS) {
    const int64_t stop = std::min<int64_t>(begin + TILE_ROWS, rows);
    if (stop < rows)
      multiply(stop - begin, columns, rows - stop, l + stop * size + begin, One{}, size, x + stop * columns,
               x + begin * columns, true);
    for (int64_t v = 0; v < columns; v += W) {
      for (int64_t j = stop - 2; j >= begin; --j) {
        vf sum = load(x + j * columns + v);
        for (int64_t i = j + 1; i < stop; ++i) sum += l[i * size + j] * load(x + i * columns + v);
        store(x + j * columns + v, sum);
      }
    }
  }
}

// FEATURES: whether there is a decay per feature. The rows of features and of values are padded with zeros.
template <typename T, bool FEATURES>
class Terms {
 protected:
  Terms(Arena& arena, const Shape& shape, const Inputs& inputs)
      : shape_(shape),
        q_(inputs.q),
        k_(inputs.k),
        v_(inputs.v),
        decay_(inputs.decay.data<const float>()),
        beta_(inputs.beta.data<const float>()),
        scale_(inputs.scale),
        wide_(shape.wide()),
        wide_values_(shape.wide_values()),
        size_(shape.size),
        queries_(arena.take(size_ * wide_)),
        keys_(arena.take(size_ * wide_)),
        turned_(arena.take(size_ * wide_)),
        by_query_(arena.take(size_ * size_)),
        by_key_(arena.take(size_ * size_)),
        factors_(arena.take(size_ * (FEATURES ? wide_ : size_))),
        reach_(arena.take(size_ * (FEATURES ? wide_ : 1))),
        rest_(arena.take(size_ * (FEATURES ? wide_ : 1))),
        keep_(arena.take(FEATURES ? wide_ : size_)),
        within_(arena.take(size_ * size_)),
        against_(arena.take(size_ * size_)),
        reached_(arena.take(2 * size_ * wide_)),
        write_(arena.take(size_ * wide_)),
        state_(arena.take(wide_ * wide_values_)),
        read_(arena.take(2 * size_ * wide_values_)),
        update_(arena.take(size_ * wide_values_)) {}

  // Load what the heads of a unit share.
  void begin(const Chunk& chunk, int64_t unit) {
    begin_ = chunk.begin;
    n_ = chunk.count;
    key_head_ = unit / shape_.groups();
    group_ = unit % shape_.groups();
    first_head_ = key_head_ * shape_.rep + group_ * shape_.group();
    heads_ = std::min(shape_.group(), shape_.rep - group_ * shape_.group());
    for (int64_t i = 0; i < n_; ++i) {
      Math::load_row(k_.at(begin_ + i, key_head_), shape_.features, wide_, keys_ + i * wide_);
      Math::load_row(q_.at(begin_ + i, key_head_), shape_.features, wide_, queries_ + i * wide_);
      for (int64_t d = 0; d < wide_; d += W) store(queries_ + i * wide_ + d, load(queries_ + i * wide_ + d) * scale_);
    }
    if constexpr (!FEATURES) {
      std::fill(keys_ + n_ * wide_, keys_ + size_ * wide_, 0.0f);
      turn(keys_, size_, wide_, turned_);
      multiply(n_, size_, shape_.features, queries_, wide_, One{}, turned_, by_query_, false);
      if (shape_.delta) multiply(n_, size_, shape_.features, keys_, wide_, One{}, turned_, by_key_, false);
    }
  }

  // Compute P, -A, scale q exp(G) with beta k exp(G) below it, and k exp(G_last - G).
  void compute(int64_t head) {
    FEATURES ? compute_by_feature(head) : compute_together(head);
    for (int64_t i = 0; i < n_; ++i) {
      const float b = beta(i, head);
      for (int64_t d = 0; d < wide_; d += W) {
        const vf reach = factor(reach_, i, d);
        const vf key = load(keys_ + i * wide_ + d);
        store(reached_ + i * wide_ + d, load(queries_ + i * wide_ + d) * reach);
        if (shape_.delta) store(reached_ + (n_ + i) * wide_ + d, key * reach * b);
        store(write_ + i * wide_ + d, key * factor(rest_, i, d));
      }
    }
  }

  // Compute what the queries and (in the last rows) the keys read from the state before the chunk; and u.
  void read_state(int64_t head, const float* state, bool queries_too) {
    for (int64_t d = 0; d < shape_.features; ++d)
      Math::load_row(state + d * shape_.values, shape_.values, wide_values_, state_ + d * wide_values_);
    std::fill(state_ + shape_.features * wide_values_, state_ + wide_ * wide_values_, 0.0f);
    const int64_t from = queries_too ? 0 : n_;
    multiply(rows() - from, wide_values_, shape_.features, reached_ + from * wide_, wide_, One{}, state_,
             read_ + from * wide_values_, false);
    for (int64_t i = 0; i < n_; ++i) {
      float* const u = update_ + i * wide_values_;
      Math::load_row(v_.at(begin_ + i, head), shape_.values, wide_values_, u);
      if (!shape_.delta) continue;
      const float* read = read_ + (n_ + i) * wide_values_;
      for (int64_t d = 0; d < wide_values_; d += W) store(u + d, load(u + d) * beta(i, head) - load(read + d));
    }
    if (shape_.delta) solve(n_, wide_values_, against_, size_, update_);
  }

  // The factor of the chunk's token i, for the features from d.
  static vf factor_of(const float* factors, int64_t i, int64_t d, int64_t wide) {
    if constexpr (FEATURES) return load(factors + i * wide + d);
    return splat(factors[i]);
  }
  vf factor(const float* factors, int64_t i, int64_t d) const { return factor_of(factors, i, d, wide_); }
  float beta(int64_t i, int64_t head) const { return shape_.delta ? beta_[(begin_ + i) * shape_.heads() + head] : 0; }
  int64_t rows() const { return shape_.delta ? 2 * n_ : n_; }  // the rows of queries, and of keys that read the state

  // Advance from token i - 1 to token i: what earlier tokens keep until i decays, and token i itself is kept whole.
  void step(int64_t i) {
    for (int64_t j = 0; j < i; ++j)
      for (int64_t d = 0; d < wide_; d += W)
        store(factors_ + j * wide_ + d, decayed(load(factors_ + j * wide_ + d), load(keep_ + d)));
    std::fill(factors_ + i * wide_, factors_ + (i + 1) * wide_, 1.0f);
  }
  void load_kept(int64_t i, int64_t head) {
    const float* from = decay_ + ((begin_ + i) * shape_.heads() + head) * shape_.features;
    Math::load_row(from, shape_.features, wide_, keep_);
    for (int64_t d = 0; d < wide_; d += W) store(keep_ + d, exp(load(keep_ + d)));
  }

  const Shape& shape_;
  const Array<T> q_, k_, v_;
  const float *decay_, *beta_;
  const float scale_;
  const int64_t wide_, wide_values_, size_;
  float *queries_, *keys_, *turned_, *by_query_, *by_key_;     // of the unit; by_query_, by_key_: products of all pairs
  // Exp of G_i - G_j, of G, of G_last - G, and of the decays
  float *factors_, *reach_, *rest_, *keep_;
  float *within_, *against_, *reached_, *write_;               // as described at `compute`
  float *state_, *read_, *update_;
  int64_t begin_ = 0, n_ = 0, key_head_ = 0, group_ = 0, first_head_ = 0, heads_ = 0;

 private:
  void compute_together(int64_t head) {
    const int64_t heads = shape_.heads();
    for (int64_t i = 0; i < n_; ++i) keep_[i] = decay_[(begin_ + i) * heads + head];
    std::fill(keep_ + n_, keep_ + size_, 0.0f);
    for (int64_t i = 0; i < size_; i += W) store(keep_ + i, exp(load(keep_ + i)));
    float reach = 1;
    for (int64_t i = 0; i < n_; ++i) {
      const vf keep = splat(keep_[i]);
      reach_[i] = reach = decayed(splat(reach), keep)[0];
      float* const row = factors_ + i * size_;
      const float b = -beta(i, head);
      if (i == 0) std::fill(row, row + size_, 0.0f);
      for (int64_t j = 0; i > 0 && j < size_; j += W) store(row + j, decayed(load(row - size_ + j), keep));
      row[i] = 1;
      for (int64_t j = 0; j < size_; j += W) {
        const vf factor = load(row + j);
        store(within_ + i * size_ + j, load(by_query_ + i * size_ + j) * factor);
        if (!shape_.delta) continue;
        store(against_ + i * size_ + j, load(by_key_ + i * size_ + j) * factor * b);
      }
      if (shape_.delta) against_[i * size_ + i] = 0;
    }
    std::copy(factors_ + (n_ - 1) * size_, factors_ + (n_ - 1) * size_ + n_, rest_);
  }

  void compute_by_feature(int64_t head) {
    std::fill(within_, within_ + n_ * size_, 0.0f);
    std::fill(against_, against_ + n_ * size_, 0.0f);
    for (int64_t i = 0; i < n_; ++i) {
      load_kept(i, head);
      step(i);
      for (int64_t d = 0; d < wide_; d += W) {
        const vf before = i > 0 ? load(reach_ + (i - 1) * wide_ + d) : splat(1.0f);
        store(reach_ + i * wide_ + d, decayed(before, load(keep_ + d)));
      }
      const float *q = queries_ + i * wide_, *k = keys_ + i * wide_;
      for (int64_t j = 0; j <= i; ++j) {
        vf with_query{}, with_key{};
        for (int64_t d = 0; d < wide_; d += W) {
          const vf key = load(keys_ + j * wide_ + d) * load(factors_ + j * wide_ + d);
          with_query += load(q + d) * key;
          with_key += load(k + d) * key;
        }
        within_[i * size_ + j] = reduce(with_query, sum_of);
        if (j < i) against_[i * size_ + j] = -beta(i, head) * reduce(with_key, sum_of);
      }
    }
    std::copy(factors_, factors_ + n_ * wide_, rest_);
  }
};

}  // namespace flashpo::FLASHPO_ISA::recurrence
