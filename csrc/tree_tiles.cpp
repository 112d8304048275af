#include "tree_tiles.h"

#include <stdexcept>
#include <string>

namespace flashpo::tree {

// A tile ends early if a path ends in its second half, so that most tiles hold tokens of one path.
Tiles::Tiles(const Tensor& end, const Tensor& position, int64_t window) : window(window) {
  const int64_t tokens = end.dim() == 1 ? end.size(0) : 0;
  expect_dense("end", end, DType::i32, {tokens});
  expect_dense("position", position, DType::i32, {tokens});
  const int32_t *ends_of = end.data<int32_t>(), *position_of = position.data<int32_t>();
  std::vector<int64_t> open{tokens};  // ends of the subtrees that contain the token
  for (int64_t i = 0; i < tokens; ++i) {
    while (open.back() <= i) open.pop_back();
    const int32_t end = ends_of[i], position = position_of[i];
    if (end <= i || end > open.back())
      throw std::invalid_argument("end: the subtrees of token " + std::to_string(i) +
                                  " and of one before it are neither nested nor disjoint");
    if (end < open.back()) open.push_back(end);
    const int64_t held = tiles.empty() ? TILE : i - tiles.back().begin;
    if (held == TILE || (held >= TILE / 2 && ends_of[i - 1] == i)) {
      tiles.push_back({i, i, end, end, position, position});
      ends.resize(ends.size() + TILE, 0);
      positions.resize(positions.size() + TILE, 0);
    }
    Tile& tile = tiles.back();
    const int64_t at = (count() - 1) * TILE + i - tile.begin;
    ends[at] = end;
    positions[at] = position;
    tile.stop = i + 1;
    tile.first_end = std::min(tile.first_end, end);
    tile.last_end = std::max(tile.last_end, end);
    tile.low = std::min(tile.low, position);
    tile.high = std::max(tile.high, position);
  }
}

Tiles::~Tiles() = default;

std::vector<int64_t> Tiles::ranges(int64_t count) const {
  std::vector<double> work;
  double total = 0;
  for (const Tile& queries : tiles) {
    work.push_back(1);
    for (const Tile& keys : tiles) work.back() += some_seen(queries, keys);
    total += work.back();
  }
  std::vector<int64_t> bounds{0};
  double before = 0;
  for (size_t t = 0; t < tiles.size(); before += work[t++])
    if (t > 0 && before >= total * bounds.size() / count) bounds.push_back(t);
  bounds.push_back(tiles.size());
  return bounds;
}

}  // namespace flashpo::tree
