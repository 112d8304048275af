// The chunks of a token tree, as Chunks in python/flashpo/ops/_lineage.py has them, for tree_recurrence on the CPU.
#pragma once
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace flashpo::tree {

struct Chunk {
  int64_t begin, count;  // tokens
  int64_t depth, at;     // chunks before it, and its place among those of its depth
};

// Some numbers for each of many: those of i are items[first[i]] to items[first[i + 1]].
struct Lists {
  std::vector<int64_t> first, items;
};

class ChunkTree {
 public:
  std::vector<Chunk> chunks;
  std::vector<int64_t> first;  // chunk of each depth, and the number of all
  Lists next, ends;            // of each chunk: those that start from its state, and the segments that end with it
  int64_t widest;              // chunks of one depth

  ChunkTree(const Tensor& token, const Tensor& before, const Tensor& last, const std::vector<int64_t>& sizes,
            int64_t tokens);
  ~ChunkTree();  // not inline: a copy compiled for AVX-512 must never be the one that the linker keeps

  int64_t count() const { return static_cast<int64_t>(chunks.size()); }
  int64_t depths() const { return static_cast<int64_t>(first.size()) - 1; }
};

}  // namespace flashpo::tree
