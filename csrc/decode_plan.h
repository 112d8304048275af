// What decode attention has to do on the CPU, cut into parts of about equal work.
//
// A unit is a range of rows that share segments (directly or through others), at most MAX_QUERIES queries of a head
// together. Its work is a fixed sequence of chunks, each a run of at most CHUNK keys of one segment. Every chunk has
// a softmax of its own and is merged into its rows' results in that sequence, so that neither the cut into parts nor
// the other rows change a bit of a row's result.
#pragma once
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace flashpo::decode {

constexpr int64_t BLOCK = 64, CHUNK = 256, MAX_QUERIES = 64;

struct Segment {
  int64_t begin, end;  // of the rows that read it
  int64_t start, length;
  const int32_t* blocks;
};

struct Chunk {
  const Segment* segment;
  int64_t begin, end;        // of the unit's rows that read it
  int64_t base;              // where it begins in its segment
  int64_t first, last;       // its keys that some of these rows see, from base on
  int64_t rows_before;       // of the chunks before it
};

struct Unit {
  int64_t begin, end;                // rows
  int64_t first_segment, last_segment;
};

struct Part {
  int64_t unit, first_head, last_head;
  int64_t first_chunk, last_chunk;  // all chunks, or some of one head's: then that head is split over parts
  int64_t split;                    // which of the splits it belongs to, or -1
  double work;
};

struct Split {  // of one head of one unit over parts
  int64_t parts;
  int64_t partials;  // where its chunks' partial results begin, in queries
};

class Plan {  // it looks into the tables as long as it lives
 public:
  std::vector<Unit> units;
  std::vector<Part> parts;  // the longest first
  std::vector<Split> splits;
  int64_t partials = 0;  // of all splits, in queries
  const int64_t batch, heads, rep, cache_blocks;
  const int threads;

  Plan(const Tensor& rows, const Tensor& start, const Tensor& length, const Tensor& blocks, const Tensor& position,
       int64_t window, int64_t cache_blocks, int64_t heads, int64_t rep, int threads);

  // The unit's chunks in their order.
  std::vector<Chunk> chunks(const Unit& unit) const;
  // The first of the segment's tokens that a row sees; one beyond the last where it sees none.
  int64_t first_visible(const Segment& s, int64_t row) const { return first_visible_at(s, position_[row]); }

 private:
  void make_units(const std::vector<int64_t>& family);
  double work_of(const Chunk& c) const;
  void cut_by_heads(int64_t unit, double work, double fair);
  void cut_by_chunks(int64_t unit, double fair);
  int64_t first_visible_at(const Segment& s, int64_t position) const;

  std::vector<Segment> segments_;  // the used ones, family by family
  const int32_t* position_;
  const int64_t window_;
};

}  // namespace flashpo::decode
