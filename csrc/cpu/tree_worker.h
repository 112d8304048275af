// Tree attention on the CPU: how queries, keys and values are stored in tiles, and which tiles are combined.
#pragma once
#include <algorithm>

#include "../tree_tiles.h"
#include "attention.h"
#include "crew.h"
#include "tree_math.h"

namespace flashpo::FLASHPO_ISA {

using tree::TILE;
using tree::Tile;
using tree::Tiles;

constexpr int64_t MOST_HEADS = 4;  // query heads in one product

// The number of columns in a product with so many features.
constexpr int64_t padded(int64_t features) { return round_up(features, LANES * Math::PACK); }

struct Shape {
  int64_t tokens, heads, rep, features, values;

  int64_t group() const { return std::min(rep, MOST_HEADS); }  // query heads in one product
  int64_t groups() const { return (rep + group() - 1) / group(); }
  int64_t rows() const { return TILE * group(); }
  int64_t wide() const { return padded(features); }
  int64_t wide_values() const { return padded(values); }
  int64_t words() const { return wide() / Math::PACK; }
  int64_t value_words() const { return wide_values() / Math::PACK; }
  int64_t most_words() const { return std::max(words(), value_words()); }
};

// The keys and values of all heads, tile by tile. They are packed (heads, tiles, TILE / PACK, wide) or turned (heads,
// tiles, words, TILE). Backward needs values turned, and keys in both forms.
struct Keys {
  const Shape& shape;
  const Tiles& tiles;
  const bool backward;
  float *packed, *turned, *values, *rows;  // rows: a tile of one head per thread

  Keys(Arena& arena, const Shape& shape, const Tiles& tiles, bool backward, int threads)
      : shape(shape),
        tiles(tiles),
        backward(backward),
        packed(arena.take(backward ? size(shape.words()) : 0)),
        turned(arena.take(size(shape.words()))),
        values(arena.take(size(shape.value_words()))),
        rows(arena.take(threads * TILE * shape.most_words())) {}

  template <typename T>
  void load(const Array<T>& k, const Array<T>& v, int threads) const {
    const int64_t count = tiles.count(), words = shape.words(), value_words = shape.value_words();
    take_turns(shape.heads * count, threads, [&](int64_t i, int64_t thread) {
      const int64_t head = i / count, t = i % count;
      float* const own = rows + thread * TILE * shape.most_words();
      load(k, tiles.tiles[t], head, shape.features, words, own);
      turn(own, TILE, words, turned + place(head, t, words));
      if (backward) Math::pack(own, TILE, words, packed + place(head, t, words));
      load(v, tiles.tiles[t], head, shape.values, value_words, own);
      float* const to = values + place(head, t, value_words);
      backward ? turn(own, TILE, value_words, to) : Math::pack(own, TILE, value_words, to);
    });
  }

  int64_t place(int64_t head, int64_t t, int64_t words) const { return (head * tiles.count() + t) * TILE * words; }

  // Whether query i sees each of the W keys from `lane`.
  vi seen(int64_t i, int32_t its_position, int64_t t, int lane) const {
    const int32_t here = static_cast<int32_t>(i);
    const int64_t at = t * TILE + lane;
    const vi index = iota() + static_cast<int32_t>(tiles.tiles[t].begin + lane);
    vi yes = (load_int(tiles.ends.data() + at) > here) & (index <= here);
    if (tiles.window > 0) yes &= its_position - load_int(tiles.positions.data() + at) < tiles.window32();
    return yes;
  }

 private:
  int64_t size(int64_t words) const { return shape.heads * tiles.count() * TILE * words; }

  template <typename T>
  static void load(const Array<T>& from, const Tile& tile, int64_t head, int64_t count, int64_t words, float* to) {
    for (int64_t i = tile.begin; i < tile.stop; ++i, to += words) Math::load_row(from.at(i, head), count, words, to);
    std::fill(to, to + (TILE - (tile.stop - tile.begin)) * words, 0.0f);
  }
};

// What forward and backward share: going over the tiles of keys that some query of a tile sees. A row is one head of
// one token.
class TreeWorker {
 protected:
  TreeWorker(Arena& arena, const Shape& shape, const Keys& keys, const Scores& scores)
      : shape_(shape),
        keys_(keys),
        scores_(scores),
        queries_(arena.take(shape.rows() * shape.words())),
        products_(arena.take(shape.rows() * TILE)) {}

  // Begin with a group of the query heads that belong to one key head.
  void begin(int64_t head, int64_t group, int64_t t) {
    head_ = head;
    first_head_ = head * shape_.rep + group * shape_.group();
    count_ = std::min(shape_.group(), shape_.rep - group * shape_.group());
    index_ = t;
    tile_ = keys_.tiles.tiles[t];
  }
  template <typename T>
  void load_queries(const Array<T>& from, int64_t count, int64_t words, float* to) const {
    for (int64_t i = tile_.begin; i < tile_.stop; ++i)
      for (int64_t h = 0; h < count_; ++h, to += words) Math::load_row(from.at(i, first_head_ + h), count, words, to);
    std::fill(to, to + (shape_.rows() - rows()) * words, 0.0f);
  }
  // Call f(tile of keys, number of rows up to the last that sees some of it, whether they see all of it).
  template <typename F>
  void for_keys(F&& f) const {
    for (int64_t t = 0; t <= index_; ++t) {
      const Tile& k = keys_.tiles.tiles[t];
      if (!keys_.tiles.some_seen(tile_, k)) continue;
      const int64_t stop = std::min<int64_t>(tile_.stop, k.last_end);
      f(t, (stop - tile_.begin) * count_, keys_.tiles.all_seen(tile_, k));
    }
  }
  void multiply_keys(int64_t t, int64_t rows) const {
    const int64_t words = shape_.words();
    Math::product(rows, TILE, shape_.features, queries_, words, keys_.turned + keys_.place(head_, t, words), TILE,
                  products_, TILE, false);
  }
  vi seen(int64_t row, int64_t t, int lane) const {
    const int64_t i = row / count_;
    return keys_.seen(tile_.begin + i, keys_.tiles.positions[index_ * TILE + i], t, lane);
  }
  static int64_t in_blocks(int64_t rows) { return round_up(rows, Math::BLOCK); }
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
