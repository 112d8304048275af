#include "chunk_tree.h"

#include <algorithm>
#include <numeric>

namespace flashpo::tree {
namespace {

// For each of `count` owners, the indices at which `owners` names it, in ascending order.
Lists lists_of(const std::vector<int64_t>& owners, int64_t count) {
  Lists lists{std::vector<int64_t>(count + 1), std::vector<int64_t>(owners.size())};
  for (const int64_t owner : owners)
    if (owner >= 0) ++lists.first[owner + 1];
  std::partial_sum(lists.first.begin(), lists.first.end(), lists.first.begin());
  std::vector<int64_t> at(lists.first.begin(), lists.first.end() - 1);
  for (size_t i = 0; i < owners.size(); ++i)
    if (owners[i] >= 0) lists.items[at[owners[i]]++] = static_cast<int64_t>(i);
  return lists;
}

}  // namespace

ChunkTree::ChunkTree(const Tensor& token, const Tensor& before, const Tensor& last, const std::vector<int64_t>& sizes,
                     int64_t tokens)
    : first{0}, widest(0) {
  const int64_t size = token.dim() == 2 ? token.size(1) : 0, all = token.dim() == 2 ? token.size(0) : 0;
  const int64_t segments = last.dim() == 1 ? last.size(0) : 0;
  expect_dense("token", token, DType::i64, {all, size});
  expect_dense("before", before, DType::i64, {all});
  expect_dense("last", last, DType::i64, {segments});
  const int64_t *tokens_of = token.data<const int64_t>(), *before_of = before.data<const int64_t>();
  std::vector<int64_t> parents, owners(last.data<const int64_t>(), last.data<const int64_t>() + segments);
  for (const int64_t wide : sizes) {
    const int64_t depth = depths(), above = depth > 0 ? first[depth - 1] : 0;
    expect(wide > 0 && wide <= all - first[depth], "sizes must be those of the depths, of all chunks together");
    for (int64_t i = first[depth]; i < first[depth] + wide; ++i) {
      const int64_t* row = tokens_of + i * size;
      const int64_t count = std::find(row, row + size, tokens) - row;
      expect(count > 0 && row[0] >= 0 && row[0] + count <= tokens && row[count - 1] == row[0] + count - 1,
             "token must hold in each chunk some tokens in a row");
      chunks.push_back({row[0], count, depth, i - first[depth]});
      expect(depth == 0 || (before_of[i] >= 0 && before_of[i] < first[depth] - above),
             "before must be chunks of the depth before");
      parents.push_back(depth == 0 ? -1 : above + before_of[i]);
    }
    first.push_back(first[depth] + wide);
    widest = std::max(widest, wide);
  }
  expect(count() == all, "sizes must be those of the depths, of all chunks together");
  expect(std::all_of(owners.begin(), owners.end(), [&](int64_t i) { return i >= 0 && i < all; }),
         "last must be chunks");
  next = lists_of(parents, all);
  ends = lists_of(owners, all);
}

ChunkTree::~ChunkTree() = default;

}  // namespace flashpo::tree
