// Attention over a token tree on the CPU. Products of bfloat16 use AMX or AVX512-BF16 if available; everything else is
// fp32. The formulas are those of python/flashpo/ops/tree_attention.py.
//
// The tokens are cut into tiles. A tile of queries, with the query heads of one key head next to each other, is
// combined with those tiles of keys that any of its queries sees. These are small products of tiles, whose layout is
// prepared once. A product covers only the rows up to the last one that sees the keys (with AMX, rounded up to a
// block). Forward keeps a running softmax. Backward goes through the queries and adds up the keys' gradients,
// transposed. The queries are divided into a few ranges, each with separate sums, which are added in a fixed order at
// the end.
#include <algorithm>
#include <vector>

#include "../ops.h"
#include "for_dtype.h"
#include "tree_worker.h"

namespace flashpo::FLASHPO_ISA {
namespace {

constexpr int64_t MOST_RANGES = 4;  // ranges of queries, each with separate sums
constexpr int VECTORS = TILE / W;

template <typename T, bool CAPPED>
class Forward : TreeWorker {
 public:
  Forward(Arena& arena, const Shape& shape, const Keys& keys, const Scores& scores, const Tensor& q,
          const Tensor& sinks, const Tensor& out, const Tensor& lse)
      : TreeWorker(arena, shape, keys, scores),
        q_(q),
        sinks_(sinks.data<const float>()),
        out_(out.data<T>()),
        lse_(lse.data<float>()),
        results_(arena.take(shape.rows() * shape.wide_values())),
        top_(arena.take(shape.rows())),
        sums_(arena.take(shape.rows() * W)) {}

  void operator()(int64_t head, int64_t group, int64_t t) {
    [[maybe_unused]] const Math::Registers registers;
    begin(head, group, t);
    load_queries(q_, shape_.features, shape_.words(), queries_);
    const int64_t width = shape_.wide_values();
    std::fill(results_, results_ + rows() * width, 0.0f);
    std::fill(top_, top_ + rows(), LOWEST);
    std::fill(sums_, sums_ + rows() * W, 0.0f);
    for_keys([&](int64_t keys, int64_t count, bool all) {
      multiply_keys(keys, count);
      for (int64_t row = 0; row < count; ++row) all ? fold<true>(row, keys) : fold<false>(row, keys);
      std::fill(products_ + count * TILE, products_ + in_blocks(count) * TILE, 0.0f);
      Math::product(count, width, TILE, products_, TILE, keys_.values + keys_.place(head_, keys, shape_.value_words()),
                    width, results_, width, true);
    });
    for (int64_t row = 0; row < rows(); ++row) {
      const int64_t at = token_of(row) * shape_.heads * shape_.rep + head_of(row);
      const float sum = reduce(load(sums_ + row * W), [](vf a, vf b) { return a + b; });
      const SoftmaxEnd end = softmax_end(scores_, top_[row], sum, sinks_ ? sinks_[head_of(row)] : -INFINITY);
      lse_[at] = end.lse;
      write_row(results_ + row * width, end.factor, shape_.values, out_ + at * shape_.values);
    }
  }

 private:
  // Turn the products with a tile of keys into weights, and rescale the row's results to the largest score so far.
  template <bool ALL>
  void fold(int64_t row, int64_t t) {
    float* const p = products_ + row * TILE;
    vf x[VECTORS], highest = splat(top_[row]);
    for (int v = 0; v < VECTORS; ++v) {
      x[v] = scores_.value<CAPPED>(load(p + v * W));
      if constexpr (!ALL) x[v] = seen(row, t, v * W) ? x[v] : splat(-INFINITY);
      highest = max(x[v], highest);
    }
    const float unit = scores_.unit(), top = reduce(highest, max);
    vf sum = load(sums_ + row * W);
    if (top > top_[row]) {
      const vf factor = exp2(splat((top_[row] - top) * unit));
      float* const result = results_ + row * shape_.wide_values();
      for (int64_t j = 0; j < shape_.wide_values(); j += W) store(result + j, load(result + j) * factor);
      sum *= factor;
      top_[row] = top;
    }
    for (int v = 0; v < VECTORS; ++v) {
      const vf weight = exp2((x[v] - top) * unit);
      sum += weight;
      Math::put(p, v * W, weight);
    }
    store(sums_ + row * W, sum);
  }

  const Array<T> q_;
  const float* sinks_;
  T* out_;
  float* lse_;
  float *results_, *top_, *sums_;
};

template <typename T, bool CAPPED>
class Backward : TreeWorker {
  static constexpr int64_t PACK = Math::PACK, ROW = TILE / PACK;  // words of a row

 public:
  Backward(Arena& arena, const Shape& shape, const Keys& keys, const Scores& scores, const Tensor& q,
           const Tensor& d_out, const Tensor& lse, const Tensor& delta, const Tensor& dq)
      : TreeWorker(arena, shape, keys, scores),
        q_(q),
        d_out_(d_out),
        lse_(lse.data<const float>()),
        delta_(delta.data<const float>()),
        dq_(dq.data<float>()),
        turned_queries_(arena.take(shape.rows() * shape.words())),
        upstream_(arena.take(shape.rows() * shape.value_words())),
        turned_upstream_(arena.take(shape.rows() * shape.value_words())),
        packed_(arena.take(shape.rows() * shape.most_words())),
        slopes_(arena.take(shape.rows() * TILE)),
        slope_rows_(PACK == 1 ? slopes_ : arena.take(shape.rows() * ROW)),
        results_(arena.take(shape.rows() * shape.wide())),
        tops_(arena.take(shape.rows())),
        factors_(arena.take(shape.rows())) {}

  // Add to dk (tiles, wide, TILE) and dv (tiles, wide values, TILE).
  void operator()(int64_t head, int64_t group, int64_t t, float* dk, float* dv) {
    [[maybe_unused]] const Math::Registers registers;
    begin(head, group, t);
    const int64_t width = shape_.wide(), values = shape_.wide_values(), turned = shape_.rows() / PACK;
    load_both_ways(q_, shape_.features, shape_.words(), queries_, turned_queries_);
    load_both_ways(d_out_, shape_.values, shape_.value_words(), upstream_, turned_upstream_);
    std::fill(results_, results_ + rows() * width, 0.0f);
    // Exp(score - lse) would lose digits that the difference of two x keeps
    for (int64_t row = 0; row < rows(); ++row) {
      const double lse = lse_[place(row)], scale = scores_.score_of(1.0f);
      tops_[row] = static_cast<float>(lse / scale);
      factors_[row] = static_cast<float>(std::exp(tops_[row] * scale - lse));
    }
    for_keys([&](int64_t keys, int64_t count, bool all) {
      multiply_keys(keys, count);
      Math::product(count, TILE, shape_.values, upstream_, shape_.value_words(),
                    keys_.values + keys_.place(head_, keys, shape_.value_words()), TILE, slopes_, TILE, false);
      all ? slopes<true>(count, keys) : slopes<false>(count, keys);
      Math::product(shape_.values, TILE, count, turned_upstream_, turned, products_, TILE, dv + keys * values * TILE,
                    TILE, true);
      Math::product(shape_.features, TILE, count, turned_queries_, turned, slopes_, TILE, dk + keys * width * TILE,
                    TILE, true);
      Math::product(count, width, TILE, slope_rows_, ROW, keys_.packed + keys_.place(head_, keys, shape_.words()),
                    width, results_, width, true);
    });
    for (int64_t row = 0; row < rows(); ++row)
      write_row(results_ + row * width, 1.0f, shape_.features, dq_ + place(row) * shape_.features);
  }

 private:
  int64_t place(int64_t row) const { return token_of(row) * shape_.heads * shape_.rep + head_of(row); }

  void load_both_ways(const Array<T>& from, int64_t count, int64_t words, float* to, float* turned) {
    load_queries(from, count, words, to);
    Math::pack(to, shape_.rows(), words, packed_);
    turn(packed_, shape_.rows() / PACK, words * PACK, turned);
  }

  // Turn the products q k and d_out v into p and ds, both packed, and store the rows of ds.
  template <bool ALL>
  void slopes(int64_t count, int64_t t) {
    for (int64_t first = 0; first < in_blocks(count); first += PACK) {
      for (int v = 0; v < VECTORS; ++v) {
        vf p[PACK] = {}, ds[PACK] = {};
        for (int64_t i = 0; i < PACK && first + i < count; ++i)
          slope<ALL>(first + i, t, v * W, &p[i], &ds[i]);
        Math::put_packed(products_ + first * ROW, v * W, p);
        Math::put_packed(slopes_ + first * ROW, v * W, ds);
        if constexpr (PACK > 1)
          for (int64_t i = 0; i < PACK; ++i) Math::put(slope_rows_ + (first + i) * ROW, v * W, ds[i]);
      }
    }
  }

  template <bool ALL>
  void slope(int64_t row, int64_t t, int lane, vf* weight, vf* slope) const {
    const vf x = scores_.value<CAPPED>(load(products_ + row * TILE + lane));
    *weight = exp2((x - tops_[row]) * scores_.unit()) * factors_[row];
    if constexpr (!ALL) *weight = seen(row, t, lane) ? *weight : vf{};
    *slope = *weight * (load(slopes_ + row * TILE + lane) - delta_[place(row)]) * scores_.scale;
    if constexpr (CAPPED) *slope *= 1.0f - (x / scores_.softcap) * (x / scores_.softcap);
  }

  const Array<T> q_, d_out_;
  const float *lse_, *delta_;
  float* dq_;
  float *turned_queries_, *upstream_, *turned_upstream_, *packed_, *slopes_, *slope_rows_, *results_, *tops_, *factors_;
};

// The gradients of keys and values from each range of queries, for every unit: a group of the query heads of one key
// head.
struct Sums {
  const Shape& shape;
  const Tiles& tiles;
  const int64_t units;
  const std::vector<int64_t> bounds;  // of the ranges, in tiles
  float *keys, *values, *rows;        // (units, ranges, tiles, wide, TILE); rows: two tiles per thread

  Sums(Arena& arena, const Shape& shape, const Tiles& tiles, int threads)
      : shape(shape),
        tiles(tiles),
        units(shape.heads * shape.groups()),
        bounds(tiles.ranges(std::clamp<int64_t>((2 * threads + units - 1) / units, 1, MOST_RANGES))),
        keys(arena.take(units * ranges() * size(shape.wide()))),
        values(arena.take(units * ranges() * size(shape.wide_values()))),
        rows(arena.take(2 * threads * TILE * std::max(shape.wide(), shape.wide_values()))) {}

  int64_t ranges() const { return static_cast<int64_t>(bounds.size()) - 1; }
  int64_t size(int64_t wide) const { return tiles.count() * wide * TILE; }

  // Add up all units and ranges of a head in their order, into out (tokens, heads, features).
  void add_up(const float* sums, int64_t features, float* out, int threads) const {
    const int64_t wide = padded(features), count = tiles.count(), parts = shape.groups() * ranges();
    take_turns(shape.heads * count, threads, [&](int64_t i, int64_t thread) {
      const int64_t head = i / count, t = i % count;
      float *const sum = rows + 2 * thread * TILE * wide, *const turned = sum + TILE * wide;
      const float* from = sums + head * parts * size(wide) + t * wide * TILE;
      std::copy(from, from + wide * TILE, sum);
      for (int64_t part = 1; part < parts; ++part) {
        from += size(wide);
        for (int64_t j = 0; j < wide * TILE; j += W) store(sum + j, load(sum + j) + load(from + j));
      }
      turn(sum, wide, TILE, turned);
      const Tile& tile = tiles.tiles[t];
      for (int64_t token = tile.begin; token < tile.stop; ++token)
        write_row(turned + (token - tile.begin) * wide, 1.0f, features, out + (token * shape.heads + head) * features);
    });
  }
};

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end) {
  expect(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v must have 3 dimensions");
  const Shape s{q.size(0), k.size(1), k.size(1) > 0 ? q.size(1) / k.size(1) : 0, q.size(2), v.size(2)};
  for (const Tensor* x : {&q, &k, &v})
    expect(x->dtype() == q.dtype() && x->size(0) == s.tokens && (x->stride(2) == 1 || x->size(2) == 1),
           "q, k, v must be of one dtype and length, dense along features");
  expect(s.rep > 0 && q.size(1) == s.heads * s.rep && v.size(1) == s.heads && k.size(2) == s.features,
         "q, k, v must have heads that fit");
  expect_dense("end", end, DType::i32, {s.tokens});  // Tiles checks position
  return s;
}

template <typename F>
void for_element([[maybe_unused]] const Tensor& q, F&& run) {
#ifdef FLASHPO_PAIRS
  run(bf16{});
#else
  for_dtype("q", q, run);
#endif
}

}  // namespace

void tree_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sinks, const Tensor& end,
                        const Tensor& position, double scale, int64_t window, double softcap, const Tensor& out,
                        const Tensor& lse, const Tensor& scratch, int threads) {
#ifdef FLASHPO_PAIRS
  if (q.dtype() != DType::bf16)
    return without_pairs::tree_attention_fwd(q, k, v, sinks, end, position, scale, window, softcap, out, lse, scratch,
                                             threads);
#endif
  const Shape shape = shape_of(q, k, v, end);
  const int64_t query_heads = shape.heads * shape.rep;
  expect_dense("sinks", sinks, DType::f32, {query_heads}, true);
  expect_dense("out", out, q.dtype(), {shape.tokens, query_heads, shape.values});
  expect_dense("lse", lse, DType::f32, {shape.tokens, query_heads});
  const Tiles tiles(end, position, window);
  const Scores scores{static_cast<float>(scale), static_cast<float>(softcap)};
  Arena arena(scratch.data<float>());
  const Keys keys(arena, shape, tiles, false, threads);
  for_element(q, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto capped) {
      auto workers = crew<Forward<T, capped.value>>(arena, threads, shape, keys, scores, q, sinks, out, lse);
      expect_dense("scratch", scratch, DType::f32, {arena.used()});
      keys.load(Array<T>(k), Array<T>(v), threads);
      const int64_t units = shape.heads * shape.groups(), count = tiles.count();
      take_turns(units * count, threads, [&](int64_t i, int64_t thread) {  // the last tiles see the most
        workers[thread](i % units / shape.groups(), i % shape.groups(), count - 1 - i / units);
      });
    };
    softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
}

// dq, dk and dv are fp32. delta (tokens, query heads) is d_out . out.
void tree_attention_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end, const Tensor& position,
                        double scale, int64_t window, double softcap, const Tensor& lse, const Tensor& delta,
                        const Tensor& d_out, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const Tensor& scratch, int threads) {
#ifdef FLASHPO_PAIRS
  if (q.dtype() != DType::bf16)
    return without_pairs::tree_attention_bwd(q, k, v, end, position, scale, window, softcap, lse, delta, d_out, dq, dk,
                                             dv, scratch, threads);
#endif
  const Shape shape = shape_of(q, k, v, end);
  const int64_t query_heads = shape.heads * shape.rep;
  expect_dense("lse", lse, DType::f32, {shape.tokens, query_heads});
  expect_dense("delta", delta, DType::f32, {shape.tokens, query_heads});
  expect_dense("d_out", d_out, q.dtype(), {shape.tokens, query_heads, shape.values});
  expect_dense("dq", dq, DType::f32, {shape.tokens, query_heads, shape.features});
  expect_dense("dk", dk, DType::f32, {shape.tokens, shape.heads, shape.features});
  expect_dense("dv", dv, DType::f32, {shape.tokens, shape.heads, shape.values});
  const Tiles tiles(end, position, window);
  const Scores scores{static_cast<float>(scale), static_cast<float>(softcap)};
  Arena arena(scratch.data<float>());
  const Keys keys(arena, shape, tiles, true, threads);
  const Sums sums(arena, shape, tiles, threads);
  for_element(q, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto capped) {
      auto workers = crew<Backward<T, capped.value>>(arena, threads, shape, keys, scores, q, d_out, lse, delta, dq);
      expect_dense("scratch", scratch, DType::f32, {arena.used()});
      keys.load(Array<T>(k), Array<T>(v), threads);
      const int64_t k_size = sums.size(shape.wide()), v_size = sums.size(shape.wide_values());
      take_turns(sums.units * sums.ranges(), threads, [&](int64_t i, int64_t thread) {
        float *const k_sum = sums.keys + i * k_size, *const v_sum = sums.values + i * v_size;
        std::fill(k_sum, k_sum + k_size, 0.0f);
        std::fill(v_sum, v_sum + v_size, 0.0f);
        const int64_t unit = i / sums.ranges(), range = i % sums.ranges();
        for (int64_t t = sums.bounds[range]; t < sums.bounds[range + 1]; ++t)
          workers[thread](unit / shape.groups(), unit % shape.groups(), t, k_sum, v_sum);
      });
    };
    softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
  sums.add_up(sums.keys, shape.features, dk.data<float>(), threads);
  sums.add_up(sums.values, shape.values, dv.data<float>(), threads);
}

int64_t tree_attention_scratch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end,
                               const Tensor& position, int64_t window, bool backward, int threads) {
#ifdef FLASHPO_PAIRS
  if (q.dtype() != DType::bf16)
    return without_pairs::tree_attention_scratch(q, k, v, end, position, window, backward, threads);
#endif
  const Shape shape = shape_of(q, k, v, end);
  const Tiles tiles(end, position, window);
  const Scores scores{};
  const Tensor none;
  Arena arena;
  const Keys keys(arena, shape, tiles, backward, threads);
  if (backward) {
    const Sums sums(arena, shape, tiles, threads);
    crew<Backward<float, false>>(arena, threads, shape, keys, scores, q, q, none, none, none);
  } else {
    crew<Forward<float, false>>(arena, threads, shape, keys, scores, q, none, none, none);
  }
  return arena.used();
}

}  // namespace flashpo::FLASHPO_ISA
