// The tokens of a tree, cut into tiles for tree attention on the CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace flashpo::tree {

constexpr int64_t TILE = 64;  // tokens

// A range of tokens, and what its keys have in common.
struct Tile {
  int64_t begin, stop;
  int32_t first_end, last_end;  // the first and the last token that sees no more of them
  int32_t low, high;            // positions

  bool full() const { return stop - begin == TILE; }
};

class Tiles {
 public:
  std::vector<Tile> tiles;
  std::vector<int32_t> ends, positions;  // of each tile's tokens; what fills a tile up is seen by nobody
  const int64_t window;                  // 0: none

  // end, position: (tokens,), as tree_attention takes them.
  Tiles(const Tensor& end, const Tensor& position, int64_t window);
  ~Tiles();  // not inline: a copy compiled for AVX-512 must never be the one that the linker keeps for every machine

  int32_t window32() const { return static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX)); }
  int64_t count() const { return static_cast<int64_t>(tiles.size()); }
  // Whether some query sees some of a tile's keys, as far as their bounds tell; and whether all see all.
  bool some_seen(const Tile& queries, const Tile& keys) const {
    return keys.begin < queries.stop && keys.last_end > queries.begin &&
           (window == 0 || queries.low - keys.high < window);
  }
  bool all_seen(const Tile& queries, const Tile& keys) const {
    return keys.full() && keys.stop - 1 <= queries.begin && keys.first_end >= queries.stop &&
           (window == 0 || queries.high - keys.low < window);
  }
  // Where `count` adjacent ranges of tiles of queries begin, and the last of them ends: of about equal numbers of
  // products, each of at least a tile.
  std::vector<int64_t> ranges(int64_t count) const;
};

}  // namespace flashpo::tree
