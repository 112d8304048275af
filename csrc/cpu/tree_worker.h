// Tree attention on the CPU: how queries, keys and values lie in tiles, and which of them meet.
#pragma once
#include <algorithm>
#include <atomic>

#include "../tree_tiles.h"
#include "attention.h"
#include "parallel.h"
#include "product.h"

namespace flashpo::FLASHPO_ISA {

using tree::TILE;
using tree::Tile;
using tree::Tiles;

constexpr int64_t MOST_HEADS = 4;  // of queries, in one product
constexpr int64_t CHAIN = 64;      // products that are summed one behind the other: the error grows with them
constexpr int LANES = 16;          // to which rows in memory are padded

// Memory for floats, part by part out of a scratch tensor; without one, it counts how much is needed.
class Arena {
 public:
  explicit Arena(float* p = nullptr) : p_(p) {}
  float* take(int64_t count) {
    float* const part = p_ != nullptr ? p_ + used_ : nullptr;
    used_ += round_up(count, LANES);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* p_;
  int64_t used_ = 0;
};

struct Shape {
  int64_t tokens, heads, rep, features, values;

  int64_t group() const { return std::min(rep, MOST_HEADS); }  // query heads of one product
  int64_t groups() const { return (rep + group() - 1) / group(); }
  int64_t wide() const { return round_up(features, LANES); }
  int64_t wide_values() const { return round_up(values, LANES); }
  int64_t rows() const { return round_up(TILE * group(), LANES); }
};

template <typename T>
struct Array {
  const T* p;
  int64_t token, head;  // strides
  explicit Array(const Tensor& x) : p(x.data<const T>()), token(x.stride(0)), head(x.stride(1)) {}
  const T* at(int64_t i, int64_t h) const { return p + i * token + h * head; }
};

// Whole vectors of fp32, filled up with zeros.
template <typename T>
static inline void load_row(const T* from, int64_t count, int64_t padded, float* to) {
  int64_t j = 0;
  for (; j + W <= count; j += W) store(to + j, load(from + j));
  if (j < count) {
    store(to + j, load_part(from + j, static_cast<int>(count - j), 0.0f));
    j += W;
  }
  std::fill(to + std::min(j, padded), to + padded, 0.0f);
}

// to (columns, rows) = from (rows, columns) transposed; both multiples of LANES.
static inline void turn(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < columns; j += W) {
      vu block[W];
      for (int64_t r = 0; r < W; ++r) std::memcpy(&block[r], from + (i + r) * columns + j, sizeof(vu));
      transpose(block);
      for (int64_t r = 0; r < W; ++r) std::memcpy(to + (j + r) * rows + i, &block[r], sizeof(vu));
    }
  }
}

static inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
                           const float* b, int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int64_t k = 0; k < depth; k += CHAIN, add = true)
    VectorProduct<float>(nullptr)(rows, columns, k, std::min(k + CHAIN, depth), a, a_stride, b, b_stride, c, c_stride,
                                  add, Ahead{});
}

// f(i, thread) for all i < n: whichever thread is free takes the next.
template <typename F>
static inline void take_turns(int64_t n, int threads, F&& f) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t begin, int64_t stop) {
    for (int64_t thread = begin; thread < stop; ++thread)
      for (int64_t i; (i = next.fetch_add(1)) < n;) f(i, thread);
  });
}

// The keys and values of all heads, tile by tile: (heads, tiles, TILE, wide), or turned (heads, tiles, wide, TILE).
// Backward needs values turned, and keys both ways.
struct Keys {
  const Shape& shape;
  const Tiles& tiles;
  const bool backward;
  float *keys, *turned, *values, *rows;  // rows: a tile of one head, of each thread

  Keys(Arena& arena, const Shape& shape, const Tiles& tiles, bool backward, int threads)
      : shape(shape),
        tiles(tiles),
        backward(backward),
        keys(arena.take(backward ? size(shape.wide()) : 0)),
        turned(arena.take(size(shape.wide()))),
        values(arena.take(size(shape.wide_values()))),
        rows(arena.take(threads * TILE * widest())) {}

  template <typename T>
  void load(const Array<T>& k, const Array<T>& v, int threads) const {
    const int64_t count = tiles.count(), width = shape.wide(), values_width = shape.wide_values();
    take_turns(shape.heads * count, threads, [&](int64_t i, int64_t thread) {
      const int64_t head = i / count, t = i % count;
      float *const own = rows + thread * TILE * widest(), *const v_at = values + place(head, t, values_width);
      float* const k_at = backward ? keys + place(head, t, width) : own;
      load(k, tiles.tiles[t], head, shape.features, width, k_at);
      turn(k_at, TILE, width, turned + place(head, t, width));
      load(v, tiles.tiles[t], head, shape.values, values_width, backward ? own : v_at);
      if (backward) turn(own, TILE, values_width, v_at);
    });
  }

  int64_t place(int64_t head, int64_t t, int64_t width) const { return (head * tiles.count() + t) * TILE * width; }

  // Whether query i sees the keys of W lanes, from `lane` on.
  vi seen(int64_t i, int32_t its_position, int64_t t, int lane) const {
    const int32_t here = static_cast<int32_t>(i);
    const int64_t at = t * TILE + lane;
    const vi index = iota() + static_cast<int32_t>(tiles.tiles[t].begin + lane);
    vi yes = (load_int(tiles.ends.data() + at) > here) & (index <= here);
    if (tiles.window > 0) yes &= its_position - load_int(tiles.positions.data() + at) < tiles.window32();
    return yes;
  }

 private:
  int64_t size(int64_t width) const { return shape.heads * tiles.count() * TILE * width; }
  int64_t widest() const { return std::max(shape.wide(), shape.wide_values()); }

  template <typename T>
  static void load(const Array<T>& from, const Tile& tile, int64_t head, int64_t count, int64_t width, float* to) {
    for (int64_t i = 0; i < TILE; ++i, to += width) {
      if (tile.begin + i < tile.stop)
        load_row(from.at(tile.begin + i, head), count, width, to);
      else
        std::fill(to, to + width, 0.0f);
    }
  }
};

// What forward and backward do alike: go over the tiles of keys that some queries of a tile see.
class TreeWorker {
 public:
  TreeWorker(Arena& arena, const Shape& shape, const Keys& keys, const Scores& scores)
      : shape_(shape),
        keys_(keys),
        scores_(scores),
        queries_(arena.take(shape.rows() * shape.wide())),
        products_(arena.take(shape.rows() * TILE)) {}

 protected:
  // The query heads of a group, of one key's head.
  void begin(int64_t head, int64_t group, int64_t t) {
    head_ = head;
    first_head_ = head * shape_.rep + group * shape_.group();
    count_ = std::min(shape_.group(), shape_.rep - group * shape_.group());
    index_ = t;
    tile_ = keys_.tiles.tiles[t];
  }
  template <typename T>
  void load_queries(const Array<T>& from, int64_t count, int64_t width, float* to) const {
    for (int64_t i = tile_.begin; i < tile_.stop; ++i)
      for (int64_t h = 0; h < count_; ++h, to += width) load_row(from.at(i, first_head_ + h), count, width, to);
  }
  // f(tile of keys, first row, number of rows, whether they see all of it); a row is one head of one token.
  template <typename F>
  void for_keys(F&& f) const {
    for (int64_t t = 0; t <= index_; ++t) {
      const Tile& k = keys_.tiles.tiles[t];
      if (!keys_.tiles.some_seen(tile_, k)) continue;
      const int64_t first = std::max(tile_.begin, k.begin), stop = std::min<int64_t>(tile_.stop, k.last_end);
      f(t, (first - tile_.begin) * count_, (stop - first) * count_, keys_.tiles.all_seen(tile_, k));
    }
  }
  void multiply_keys(int64_t t, int64_t row, int64_t rows) const {
    product(rows, TILE, shape_.features, queries_ + row * shape_.wide(), shape_.wide(),
            keys_.turned + keys_.place(head_, t, shape_.wide()), TILE, products_ + row * TILE, TILE, false);
  }
  vi seen(int64_t row, int64_t t, int lane) const {
    const int64_t i = row / count_;
    return keys_.seen(tile_.begin + i, keys_.tiles.positions[index_ * TILE + i], t, lane);
  }
  int64_t rows() const { return (tile_.stop - tile_.begin) * count_; }
  int64_t token_of(int64_t row) const { return tile_.begin + row / count_; }
  int64_t head_of(int64_t row) const { return first_head_ + row % count_; }

  const Shape& shape_;
  const Keys& keys_;
  const Scores& scores_;
  float *queries_, *products_;
  int64_t head_ = 0, first_head_ = 0, count_ = 0, index_ = 0;
  Tile tile_{};
};

}  // namespace flashpo::FLASHPO_ISA
