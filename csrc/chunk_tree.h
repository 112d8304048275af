// The chunks of a token tree for tree_recurrence on the CPU, as in `Chunks` of python/flashpo/ops/_lineage.py.
#pragma once
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace flashpo::tree {

struct Chunk {
  int64_t begin, count;  // its tokens
  int64_t depth, at;     // the number of chunks before it, and its index among those of its depth
};

// A list of numbers for each of many things: the list of i is items[first[i]] to items[first[i + 1] - 1].
struct Lists {
  std::vector<int64_t> first, items;
};

class ChunkTree {
 public:
  std::vector<Chunk> chunks;
  std::vector<int64_t> first;  // the first chunk of each depth, and the number of all chunks at the end
  // For each chunk: the chunks that start from its state, and the segments that end with it
  Lists next, ends;
  int64_t widest;              // the largest number of chunks in one depth

  ChunkTree(const Tensor& token, const Tensor& before, const Tensor& last, const std::vector<int64_t>& sizes,
            int64_t tokens);
  ~ChunkTree();  // not inline: the linker must not keep a copy that was compiled for AVX-512

  int64_t count() const { return static_cast<int64_t>(chunks.size()); }
  int64_t depths() const { return static_cast<int64_t>(first.size()) - 1; }
};

}  // namespace flashpo::tree
