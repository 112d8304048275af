// Decode attention on the CPU: free threads take the parts of the plan in order.
//
// The queries of all rows that read a chunk are the rows of two small products: first with the keys, 64 at a time,
// which are contiguous for each feature; then their weights with the 64 values. The softmax of a chunk needs no
// rescaling; its result is merged into the running results of its rows.
#include <algorithm>
#include <atomic>
#include <memory>

#include "../decode_plan.h"
#include "../ops.h"
#include "attention.h"
#include "for_dtype.h"
#include "parallel.h"
#include "product.h"
#ifdef FLASHPO_PAIRS
#include "product_pairs.h"
#endif

namespace flashpo::FLASHPO_ISA {
namespace {

using decode::BLOCK;
using decode::Chunk;
using decode::CHUNK;
using decode::Part;
using decode::Plan;
using decode::Unit;

struct Sizes {
  int64_t heads, rep, features, value_features;

  // The numbers of rows and columns are rounded up, because whole AMX tiles are written.
  int64_t queries() const { return round_up(std::max(decode::MAX_QUERIES, rep), 16); }
  int64_t padded_features() const { return round_up(features, 32); }
  int64_t padded_values() const { return round_up(value_features, 32); }
  int64_t result() const { return padded_values() + 16; }  // o, followed by m and l

  int64_t tile() const { return BLOCK * std::max(padded_features(), padded_values()); }
  int64_t of_thread() const { return queries() * (padded_features() + 2 * CHUNK + 2 * result()) + tile(); }
};

struct Options : Scores {
  const float* sinks;  // (heads rep) or null
};

template <typename T>
struct Arrays {
  const T *q, *k_cache, *v_cache;
  int64_t q_row, q_head;  // strides
  T* out;
  float* lse;
};

// Turn the products s with the keys of a chunk into weights 2^((x - m) unit), which may overwrite s. Keys outside of
// [visible, last) get weight 0, from `first`, which is not after any row's first visible key, to the end of the last
// 32 keys. Returns m and the sum of the weights.
template <bool CAPPED, typename Weight>
void softmax(float* s, int64_t first, int64_t last, int64_t visible, const Options& options, Weight* weights, float* m,
             float* l) {
  const int64_t begin = std::clamp(visible, first, last) / W * W, end = round_up(last, W);
  std::fill(s + begin, s + std::clamp(visible, begin, end), -INFINITY);
  std::fill(s + last, s + end, -INFINITY);
  vf top = splat(LOWEST);
  for (int64_t j = begin; j < end; j += W) {
    vf x = load(s + j);
    if constexpr (CAPPED) {
      x = x > splat(-INFINITY) ? options.value<true>(x) : x;
      store(s + j, x);
    }
    top = max(x, top);
  }
  *m = reduce(top, max);
  vf sum{};
  for (int64_t j = begin; j < end; j += W) {
    const vf p = exp2((load(s + j) - *m) * options.unit());
    sum += p;
    store(weights + j, p);
  }
  *l = reduce(sum, [](vf x, vf y) { return x + y; });
  std::fill(weights + first, weights + begin, Weight{});
  std::fill(weights + end, weights + round_up(last, 32), Weight{});
}

// The state of one thread.
template <typename T, typename Product, bool CAPPED>
class Worker {
  using Operand = typename Product::Operand;

 public:
  Worker(const Plan& plan, const Arrays<T>& arrays, const Sizes& sizes, const Options& options, float* scratch,
         float* partials)
      : plan_(plan),
        arrays_(arrays),
        sizes_(sizes),
        options_(options),
        product_(scratch),
        products_(scratch + sizes.tile()),
        results_(products_ + sizes.queries() * CHUNK),
        partial_(results_ + sizes.queries() * sizes.result()),
        queries_(reinterpret_cast<Operand*>(partial_ + sizes.queries() * sizes.result())),
        weights_(queries_ + sizes.queries() * sizes.padded_features()),
        partials_(partials) {
    if constexpr (sizeof(Operand) == sizeof(float)) weights_ = products_;
  }

  // Compute whole heads of a unit, from queries to results; or some chunks of one head, into `partials`.
  void attend(const Part& part) {
    const Unit& unit = plan_.units[part.unit];
    chunks_ = plan_.chunks(unit);
    const bool split = part.split >= 0;
    const int64_t first = split ? part.first_chunk : 0, last = split ? part.last_chunk : chunks_.size();
    for (int64_t head = part.first_head; head < part.last_head; ++head) {
      load_queries(unit, head);
      clear(unit);
      for (int64_t i = first; i < last; ++i) {
        const bool more_heads = head + 1 < part.last_head;
        const Ahead ahead = i + 1 < last ? ahead_of_keys(chunks_[i + 1], head, first_block(chunks_[i + 1]))
                            : more_heads ? ahead_of_keys(chunks_[first], head + 1, first_block(chunks_[first]))
                                         : Ahead{};
        attend(unit, head, chunks_[i], ahead);
        if (split)
          std::copy(partial_, partial_ + queries_of(chunks_[i]) * sizes_.result(), partial_of(part, chunks_[i]));
        else
          merge(unit, chunks_[i], partial_);
      }
      if (!split) write(unit, head);
    }
  }

  // Merge all chunks of a head that was split.
  void merge_all(const Part& part) {
    const Unit& unit = plan_.units[part.unit];
    clear(unit);
    for (const Chunk& chunk : chunks_) merge(unit, chunk, partial_of(part, chunk));
    write(unit, part.first_head);
  }

 private:
  int64_t queries_of(const Chunk& chunk) const { return (chunk.end - chunk.begin) * sizes_.rep; }
  static int64_t first_block(const Chunk& chunk) { return chunk.first / BLOCK * BLOCK; }

  float* partial_of(const Part& part, const Chunk& chunk) {
    return partials_ + (plan_.splits[part.split].partials + chunk.rows_before * sizes_.rep) * sizes_.result();
  }

  void load_queries(const Unit& unit, int64_t head) {
    Operand* to = queries_;
    for (int64_t row = unit.begin; row < unit.end; ++row) {
      const T* from = arrays_.q + row * arrays_.q_row + head * sizes_.rep * arrays_.q_head;
      for (int64_t i = 0; i < sizes_.rep; ++i, from += arrays_.q_head, to += sizes_.padded_features())
        Product::operand(from, sizes_.features, to);
    }
  }

  // The softmax of a chunk's rows over the chunk: o, m and l of each query go into `partial_`.
  void attend(const Unit& unit, int64_t head, const Chunk& chunk, const Ahead& ahead_of_next) {
    const int64_t queries = queries_of(chunk), begin = first_block(chunk);
    const int64_t features = sizes_.features, value_features = sizes_.value_features;
    const Operand* q = queries_ + (chunk.begin - unit.begin) * sizes_.rep * sizes_.padded_features();
    for (int64_t at = begin; at < chunk.last; at += BLOCK) {
      const Ahead ahead = at + BLOCK < chunk.last ? ahead_of_keys(chunk, head, at + BLOCK)
                                                  : ahead_of_values(chunk, head, begin);
      product_(queries, std::min(chunk.last - at, BLOCK), 0, features, q, sizes_.padded_features(),
               tile(arrays_.k_cache, features, chunk, head, at), BLOCK, products_ + at, CHUNK, false, ahead);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t visible = plan_.first_visible(*chunk.segment, chunk.begin + i / sizes_.rep) - chunk.base;
      float* m = partial_ + i * sizes_.result() + sizes_.padded_values();
      softmax<CAPPED>(products_ + i * CHUNK, begin, chunk.last, visible, options_, weights_ + i * CHUNK, m, m + 1);
    }
    for (int64_t at = begin; at < chunk.last; at += BLOCK) {
      const Ahead ahead = at + BLOCK < chunk.last ? ahead_of_values(chunk, head, at + BLOCK) : ahead_of_next;
      product_(queries, value_features, std::max(chunk.first - at, int64_t{0}), std::min(chunk.last - at, BLOCK),
               weights_ + at, CHUNK, tile(arrays_.v_cache, value_features, chunk, head, at), value_features, partial_,
               sizes_.result(), at > begin, ahead);
    }
  }

  const T* tile(const T* cache, int64_t features, const Chunk& chunk, int64_t head, int64_t at) const {
    const int64_t block = chunk.segment->blocks[(chunk.base + at) / BLOCK];
    return cache + (block * sizes_.heads + head) * features * BLOCK;
  }
  Ahead ahead_of_keys(const Chunk& chunk, int64_t head, int64_t at) const {
    const void* p = tile(arrays_.k_cache, sizes_.features, chunk, head, at);
    const int64_t row = BLOCK * sizeof(T), used = std::min(chunk.last - at, BLOCK) * sizeof(T);
    return {static_cast<const char*>(p), sizes_.features * (used > 128 ? row / 128 : 1), used > 128 ? 128 : row};
  }
  Ahead ahead_of_values(const Chunk& chunk, int64_t head, int64_t at) const {
    const void* p = tile(arrays_.v_cache, sizes_.value_features, chunk, head, at);
    const int64_t used = std::min(chunk.last - at, BLOCK) * sizes_.value_features * sizeof(T);
    return {static_cast<const char*>(p), used / 128, 128};
  }

  void clear(const Unit& unit) {
    const int64_t size = (unit.end - unit.begin) * sizes_.rep * sizes_.result();
    std::fill(results_, results_ + size, 0.0f);
    for (int64_t i = sizes_.padded_values(); i < size; i += sizes_.result()) results_[i] = LOWEST;
  }

  void merge(const Unit& unit, const Chunk& chunk, const float* partial) {
    const int64_t padded = sizes_.padded_values();
    float* row = results_ + (chunk.begin - unit.begin) * sizes_.rep * sizes_.result();
    for (int64_t i = 0; i < queries_of(chunk); ++i, row += sizes_.result(), partial += sizes_.result()) {
      float &m = row[padded], &l = row[padded + 1];
      const float top = partial[padded] > m ? partial[padded] : m;
      const vf old_factor = exp2(splat((m - top) * options_.unit()));
      const vf factor = exp2(splat((partial[padded] - top) * options_.unit()));
      for (int64_t j = 0; j < sizes_.value_features; j += W)
        store(row + j, load(row + j) * old_factor + load(partial + j) * factor);
      l = l * old_factor[0] + partial[padded + 1] * factor[0];
      m = top;
    }
  }

  void write(const Unit& unit, int64_t head) {
    const int64_t padded = sizes_.padded_values(), values = sizes_.value_features;
    const float* row = results_;
    for (int64_t b = unit.begin; b < unit.end; ++b) {
      for (int64_t i = 0; i < sizes_.rep; ++i, row += sizes_.result()) {
        const int64_t query_head = head * sizes_.rep + i, at = b * sizes_.heads * sizes_.rep + query_head;
        const float sink = options_.sinks ? options_.sinks[query_head] : -INFINITY;
        const SoftmaxEnd end = softmax_end(options_, row[padded], row[padded + 1], sink);
        arrays_.lse[at] = end.lse;
        write_row(row, end.factor, values, arrays_.out + at * values);
      }
    }
  }

  const Plan& plan_;
  const Arrays<T>& arrays_;
  const Sizes& sizes_;
  const Options& options_;
  std::vector<Chunk> chunks_;  // of the current part
  Product product_;
  float *products_, *results_, *partial_;  // (queries, CHUNK), (queries, result), (queries, result)
  Operand *queries_, *weights_;            // (queries, padded features), (queries, CHUNK)
  float* partials_;
};

template <typename Product, bool CAPPED, typename T>
void run(const Plan& plan, const Arrays<T>& arrays, const Sizes& sizes, const Options& options, float* scratch) {
  float* const partials = scratch + plan.threads * sizes.of_thread();
  std::unique_ptr<std::atomic<int64_t>[]> pending(new std::atomic<int64_t>[plan.splits.size()]);
  for (size_t i = 0; i < plan.splits.size(); ++i) pending[i] = plan.splits[i].parts;
  std::atomic<size_t> next{0};
  parallel_for(plan.threads, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      float* const own = scratch + thread * sizes.of_thread();
      Worker<T, Product, CAPPED> worker(plan, arrays, sizes, options, own, partials);
      for (size_t i; (i = next.fetch_add(1)) < plan.parts.size();) {
        const Part& part = plan.parts[i];
        worker.attend(part);
        if (part.split >= 0 && pending[part.split].fetch_sub(1, std::memory_order_acq_rel) == 1)
          worker.merge_all(part);
      }
    }
  });
}

template <typename T, typename Product = VectorProduct<T>>
void run(const Plan& plan, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Sizes& sizes,
         const Options& options, const Tensor& out, const Tensor& lse, float* scratch) {
  const Arrays<T> arrays{q.data<T>(), k_cache.data<T>(), v_cache.data<T>(), q.stride(0), q.stride(1),
                         out.data<T>(), lse.data<float>()};
  options.softcap != 0 ? run<Product, true>(plan, arrays, sizes, options, scratch)
                       : run<Product, false>(plan, arrays, sizes, options, scratch);
}

}  // namespace

void decode_attention(const Plan& plan, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, float scale,
                      float softcap, const Tensor& sinks, const Tensor& out, const Tensor& lse,
                      const Tensor& scratch) {
  const DType dtype = q.dtype();
  expect(k_cache.dim() == 4 && v_cache.dim() == 4, "the caches must have 4 dimensions");
  const Sizes sizes{plan.heads, plan.rep, k_cache.size(2), v_cache.size(3)};
  const int64_t query_heads = sizes.heads * sizes.rep;
  expect(q.dim() == 3 && q.size(0) == plan.batch && q.size(1) == query_heads && q.size(2) == sizes.features &&
             (sizes.features <= 1 || q.stride(2) == 1) && q.dl.device.device_type == kDLCPU,
         "q must be (B, Hq, D), dense along D");
  expect_dense("k_cache", k_cache, dtype, {plan.cache_blocks, sizes.heads, sizes.features, BLOCK});
  expect_dense("v_cache", v_cache, dtype, {plan.cache_blocks, sizes.heads, BLOCK, sizes.value_features});
  expect_dense("sinks", sinks, DType::f32, {query_heads}, true);
  expect_dense("out", out, dtype, {plan.batch, query_heads, sizes.value_features});
  expect_dense("lse", lse, DType::f32, {plan.batch, query_heads});
  expect(scratch.dim() == 1 && scratch.size(0) >= decode_attention_scratch(plan, k_cache, v_cache),
         "scratch must hold decode_attention_scratch's numbers");
  expect_dense("scratch", scratch, DType::f32, {scratch.size(0)});
  const Options options{{scale, softcap}, sinks.data<float>()};
  float* const own = scratch.data<float>();
#ifdef FLASHPO_PAIRS
  if (dtype == DType::bf16) return run<bf16, PairProduct>(plan, q, k_cache, v_cache, sizes, options, out, lse, own);
  without_pairs::decode_attention(plan, q, k_cache, v_cache, scale, softcap, sinks, out, lse, scratch);
#else
  for_dtype("q", q, [&](auto element) {
    run<decltype(element)>(plan, q, k_cache, v_cache, sizes, options, out, lse, own);
  });
#endif
}

int64_t decode_attention_scratch(const Plan& plan, const Tensor& k_cache, const Tensor& v_cache) {
  const Sizes sizes{plan.heads, plan.rep, k_cache.size(2), v_cache.size(3)};
  return plan.threads * sizes.of_thread() + plan.partials * sizes.result();
}

}  // namespace flashpo::FLASHPO_ISA
