#include "decode_plan.h"

#include <algorithm>

namespace flashpo::decode {
namespace {

constexpr double LOADING = 16;  // loading a key costs as much as multiplying it with so many queries
constexpr double PARTS_A_THREAD = 4;

// Read and check the segments that are used.
std::vector<Segment> read_segments(const Tensor& rows, const Tensor& start, const Tensor& length,
                                   const Tensor& blocks, int64_t batch, int64_t cache_blocks) {
  std::vector<Segment> segments;
  const int64_t most_blocks = blocks.dim() == 2 ? blocks.size(1) : 0;
  for (int64_t i = 0; i < rows.size(0); ++i) {
    const Segment s{rows.data<int32_t>()[2 * i], rows.data<int32_t>()[2 * i + 1], start.data<int32_t>()[i],
                    length.data<int32_t>()[i], blocks.data<int32_t>() + i * most_blocks};
    if (s.begin == s.end) continue;
    expect(0 <= s.begin && s.begin < s.end && s.end <= batch, "rows holds ranges outside of the batch");
    expect(0 <= s.length && s.length <= most_blocks * BLOCK, "length holds values that blocks has no room for");
    for (int64_t j = 0; j * BLOCK < s.length; ++j)
      expect(0 <= s.blocks[j] && s.blocks[j] < cache_blocks, "blocks holds values outside of the cache");
    if (s.length > 0) segments.push_back(s);
  }
  return segments;
}

// family[b] numbers the sets of rows that are connected by common segments, from 0; the last entry is their number.
std::vector<int64_t> families(const std::vector<Segment>& segments, int64_t batch) {
  std::vector<int64_t> joined(batch + 1, 0);  // at first differences: how many segments contain both rows b - 1 and b
  for (const Segment& s : segments) {
    ++joined[std::min(s.begin + 1, batch)];
    --joined[s.end];
  }
  int64_t spanning = 0, family = -1;
  for (int64_t b = 0; b < batch; ++b) {
    spanning += joined[b];
    if (b == 0 || spanning == 0) ++family;
    joined[b] = family;
  }
  joined[batch] = family + 1;
  return joined;
}

}  // namespace

Plan::Plan(const Tensor& rows, const Tensor& start, const Tensor& length, const Tensor& blocks, const Tensor& position,
           int64_t window, int64_t cache_blocks, int64_t heads, int64_t rep, int threads)
    : batch(position.dim() == 1 ? position.size(0) : 0),
      heads(heads),
      rep(rep),
      cache_blocks(cache_blocks),
      threads(std::max(threads, 1)),
      position_(position.data<int32_t>()),
      window_(window) {
  const int64_t entries = rows.dim() == 2 ? rows.size(0) : 0;
  expect_dense("rows", rows, DType::i32, {entries, 2});
  expect_dense("start", start, DType::i32, {entries});
  expect_dense("length", length, DType::i32, {entries});
  expect_dense("blocks", blocks, DType::i32, {entries, blocks.dim() == 2 ? blocks.size(1) : 0});
  expect_dense("position", position, DType::i32, {batch});
  expect(heads > 0 && rep > 0, "heads must be positive");
  segments_ = read_segments(rows, start, length, blocks, batch, cache_blocks);
  const std::vector<int64_t> family = families(segments_, batch);
  std::stable_sort(segments_.begin(), segments_.end(),
                   [&](const Segment& a, const Segment& b) { return family[a.begin] < family[b.begin]; });
  make_units(family);

  std::vector<double> work(units.size(), 1.0);  // of one head; 1 is for writing the results
  double total = 0;
  for (size_t u = 0; u < units.size(); ++u) {
    for (const Chunk& c : chunks(units[u])) work[u] += work_of(c);
    total += work[u] * heads;
  }
  const double fair = this->threads > 1 ? total / (this->threads * PARTS_A_THREAD) : total;
  for (int64_t u = 0; u < static_cast<int64_t>(units.size()); ++u)
    work[u] <= fair ? cut_by_heads(u, work[u], fair) : cut_by_chunks(u, fair);
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.work > b.work; });
}

void Plan::make_units(const std::vector<int64_t>& family) {
  const int64_t most_rows = std::max<int64_t>(MAX_QUERIES / rep, 1), segments = segments_.size();
  for (int64_t begin = 0, end, segment = 0; begin < batch; begin = end) {
    end = begin;
    while (end < batch && family[end] == family[begin]) ++end;
    const int64_t first = segment;
    while (segment < segments && segments_[segment].begin < end) ++segment;
    const int64_t rows = end - begin, pieces = (rows + most_rows - 1) / most_rows;
    for (int64_t i = 0; i < pieces; ++i)
      units.push_back({begin + rows * i / pieces, begin + rows * (i + 1) / pieces, first, segment});
  }
}

int64_t Plan::first_visible_at(const Segment& s, int64_t position) const {
  return window_ > 0 ? std::clamp<int64_t>(position - window_ + 1 - s.start, 0, s.length) : 0;
}

std::vector<Chunk> Plan::chunks(const Unit& unit) const {
  std::vector<Chunk> chunks;
  int64_t rows_before = 0;
  for (int64_t i = unit.first_segment; i < unit.last_segment; ++i) {
    const Segment& s = segments_[i];
    const int64_t begin = std::max(s.begin, unit.begin), end = std::min(s.end, unit.end);
    if (begin >= end) continue;
    const int64_t low = first_visible_at(s, *std::min_element(position_ + begin, position_ + end));
    if (low == s.length) continue;
    for (int64_t base = low / CHUNK * CHUNK; base < s.length; base += CHUNK) {
      chunks.push_back({&s, begin, end, base, std::max(low - base, int64_t{0}), std::min(s.length - base, CHUNK),
                        rows_before});
      rows_before += end - begin;
    }
  }
  return chunks;
}

double Plan::work_of(const Chunk& c) const { return (c.last - c.first) * (LOADING + (c.end - c.begin) * rep); }

void Plan::cut_by_heads(int64_t unit, double work, double fair) {
  const int64_t pieces = std::min<int64_t>(std::max(work * heads / fair, 1.0), heads);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = heads * i / pieces, last = heads * (i + 1) / pieces;
    parts.push_back({unit, first, last, 0, INT64_MAX, -1, work * (last - first)});
  }
}

void Plan::cut_by_chunks(int64_t unit, double fair) {
  std::vector<Part> pieces;
  int64_t queries = 0, index = 0;
  for (const Chunk& c : chunks(units[unit])) {
    if (pieces.empty() || pieces.back().work + work_of(c) > fair) pieces.push_back({unit, 0, 0, index, index, -1, 0.0});
    pieces.back().last_chunk = ++index;
    pieces.back().work += work_of(c);
    queries += (c.end - c.begin) * rep;
  }
  const bool split = pieces.size() > 1;
  for (int64_t head = 0; head < heads; ++head) {
    for (Part part : pieces) {
      part.first_head = head;
      part.last_head = head + 1;
      part.split = split ? static_cast<int64_t>(splits.size()) : -1;
      parts.push_back(part);
    }
    if (!split) continue;
    splits.push_back({static_cast<int64_t>(pieces.size()), partials});
    partials += queries;
  }
}

}  // namespace flashpo::decode
