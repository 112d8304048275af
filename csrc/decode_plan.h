// The work of decode attention on the CPU, cut into parts that take about the same time.
//
// A unit is a range of rows that share segments, directly or through other rows; it has at most MAX_QUERIES queries per
// key head. Its work is a fixed sequence of chunks, each of which is a stretch of at most CHUNK keys of one segment.
// Each chunk has its own softmax, and is merged into its rows' results in that sequence. So neither the cut into parts
// nor the other rows change a bit of a row's result.
#pragma once
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace flashpo::decode {

constexpr int64_t BLOCK = 64, CHUNK = 256, MAX_QUERIES = 64;

struct Segment {
  int64_t begin, end;  // the rows that read it
  int64_t start, length;
  const int32_t* blocks;
};

struct Chunk {
  const Segment* segment;
  int64_t begin, end;        // those rows of the unit that read it
  int64_t base;              // where it begins in its segment
  int64_t first, last;       // the keys that some of these rows see, counted from base
  int64_t rows_before;       // the sum of the numbers of rows of the chunks before it
};

struct Unit {
  int64_t begin, end;                // rows
  int64_t first_segment, last_segment;
};

struct Part {
  int64_t unit, first_head, last_head;
  int64_t first_chunk, last_chunk;  // all chunks; or some chunks of one head, which is then split over parts
  int64_t split;                    // the index of its split, or -1
  double work;
};

struct Split {  // one head of one unit that is split over parts
  int64_t parts;
  int64_t partials;  // where the partial results of its chunks begin, counted in queries
};

class Plan {  // reads the tables as long as it lives
 public:
  std::vector<Unit> units;
  std::vector<Part> parts;  // those with the most work first
  std::vector<Split> splits;
  int64_t partials = 0;  // of all splits, in queries
  const int64_t batch, heads, rep, cache_blocks;
  const int threads;

  Plan(const Tensor& rows, const Tensor& start, const Tensor& length, const Tensor& blocks, const Tensor& position,
       int64_t window, int64_t cache_blocks, int64_t heads, int64_t rep, int threads);

  // The unit's chunks in order.
  std::vector<Chunk> chunks(const Unit& unit) const;
  // The first token of the segment that a row sees; the segment's length if it sees none.
  int64_t first_visible(const Segment& s, int64_t row) const { return first_visible_at(s, position_[row]); }

 private:
  void make_units(const std::vector<int64_t>& family);
  double work_of(const Chunk& c) const;
  void cut_by_heads(int64_t unit, double work, double fair);
  void cut_by_chunks(int64_t unit, double fair);
  int64_t first_visible_at(const Segment& s, int64_t position) const;

  std::vector<Segment> segments_;  // the segments that are used, sorted by family
  const int32_t* position_;
  const int64_t window_;
};

}  // namespace flashpo::decode
