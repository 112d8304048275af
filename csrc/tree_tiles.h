// The tokens of a tree, cut into tiles for tree attention on the CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace flashpo::tree {

constexpr int64_t TILE = 64;  // tokens

// A range of tokens, with bounds of what sees its keys.
struct Tile {
  int64_t begin, stop;
  int32_t first_end, last_end;  // the smallest and the largest `end` of its tokens
  int32_t low, high;            // the smallest and the largest position

  bool full() const { return stop - begin == TILE; }
};

class Tiles {
 public:
  std::vector<Tile> tiles;
  std::vector<int32_t> ends, positions;  // of each tile's tokens; nobody sees the entries that fill up a tile
  const int64_t window;                  // 0 means none

  // end and position are (tokens,), as tree_attention takes them.
  Tiles(const Tensor& end, const Tensor& position, int64_t window);
  ~Tiles();  // not inline: the linker must not keep a copy that was compiled for AVX-512 for every machine

  int32_t window32() const { return static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX)); }
  int64_t count() const { return static_cast<int64_t>(tiles.size()); }
  // Whether, by these bounds, some query may see some of a tile's keys; and whether all queries see all keys.
  bool some_seen(const Tile& queries, const Tile& keys) const {
    return keys.begin < queries.stop && keys.last_end > queries.begin &&
           (window == 0 || queries.low - keys.high < window);
  }
  bool all_seen(const Tile& queries, const Tile& keys) const {
    return keys.full() && keys.stop - 1 <= queries.begin && keys.first_end >= queries.stop &&
           (window == 0 || queries.high - keys.low < window);
  }
  // Where `count` adjacent ranges of query tiles begin, and where the last one ends. They have about the same number of
  // products, and at least one tile each.
  std::vector<int64_t> ranges(int64_t count) const;
};

}  // namespace flashpo::tree
