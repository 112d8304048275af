// Attention over a token tree on the CPU, in fp32 whatever the arguments are. Formulas as in
// python/flashpo/ops/tree_attention.py.
//
// The tokens are cut into tiles. A tile of queries, the query heads of one key beside each other, meets the tiles of
// keys that any of it sees: small products of tiles that are laid out for them once. No product is of more rows than
// see the keys. Forward keeps a running softmax; backward goes through the queries and adds up the keys' gradients,
// transposed, in sums of its own for each of a few ranges of queries, which are added in a fixed order at the end.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../ops.h"
#include "../tree_tiles.h"
#include "attention.h"
#include "for_dtype.h"
#include "parallel.h"
#include "product.h"

namespace flashpo::FLASHPO_ISA {
namespace {

using tree::TILE;
using tree::Tile;
using tree::Tiles;

constexpr int64_t MOST_HEADS = 4;  // of queries, in one product
constexpr int64_t MOST_RANGES = 4;
constexpr int64_t CHAIN = 64;  // products that are summed one behind the other: the error grows with them
constexpr int LANES = 16;  // to which rows in memory are padded

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

class Floats {
 public:
  explicit Floats(int64_t count) : p_(static_cast<float*>(std::aligned_alloc(64, round_up(count * 4 + 4, 64)))) {
    if (p_ == nullptr) throw std::bad_alloc();
  }
  operator float*() const { return p_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> p_;
};

struct Shape {
  int64_t tokens, heads, rep, features, values;

  int64_t group() const { return std::min(rep, MOST_HEADS); }  // query heads of one product
  int64_t groups() const { return (rep + group() - 1) / group(); }
  int64_t wide() const { return round_up(features, LANES); }
  int64_t wide_values() const { return round_up(values, LANES); }
  int64_t rows() const { return round_up(TILE * group(), LANES); }
};

template <typename T>
struct Array {
  const T* p;
  int64_t token, head;  // strides
  explicit Array(const Tensor& x) : p(x.data<const T>()), token(x.stride(0)), head(x.stride(1)) {}
  const T* at(int64_t i, int64_t h) const { return p + i * token + h * head; }
};

// Whole vectors of fp32, filled up with zeros.
template <typename T>
void load_row(const T* from, int64_t count, int64_t padded, float* to) {
  int64_t j = 0;
  for (; j + W <= count; j += W) store(to + j, load(from + j));
  if (j < count) {
    store(to + j, load_part(from + j, static_cast<int>(count - j), 0.0f));
    j += W;
  }
  std::fill(to + std::min(j, padded), to + padded, 0.0f);
}

// to (columns, rows) = from (rows, columns) transposed; both multiples of LANES.
void turn(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < columns; j += W) {
      vu block[W];
      for (int64_t r = 0; r < W; ++r) std::memcpy(&block[r], from + (i + r) * columns + j, sizeof(vu));
      transpose(block);
      for (int64_t r = 0; r < W; ++r) std::memcpy(to + (j + r) * rows + i, &block[r], sizeof(vu));
    }
  }
}

void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int64_t k = 0; k < depth; k += CHAIN, add = true)
    VectorProduct<float>(nullptr)(rows, columns, k, std::min(k + CHAIN, depth), a, a_stride, b, b_stride, c, c_stride,
                                  add, Ahead{});
}

// The keys and values of all heads, tile by tile: (heads, tiles, TILE, wide), or turned (heads, tiles, wide, TILE).
struct Keys {
  const Shape& shape;
  const Tiles& tiles;
  Floats keys, turned, values, turned_values;

  // T{}: an element of k and v.
  template <typename T>
  Keys(T, const Shape& shape, const Tiles& tiles, const Tensor& k, const Tensor& v, bool backward, int threads)
      : shape(shape),
        tiles(tiles),
        keys(backward ? size(shape.wide()) : 0),
        turned(size(shape.wide())),
        values(backward ? 0 : size(shape.wide_values())),
        turned_values(backward ? size(shape.wide_values()) : 0) {
    const Array<T> k_of(k), v_of(v);
    const int64_t count = tiles.count(), width = shape.wide(), values_width = shape.wide_values();
    parallel_for(shape.heads * count, threads, [&](int64_t begin, int64_t stop) {
      const Floats rows(TILE * std::max(width, values_width));
      for (int64_t i = begin; i < stop; ++i) {
        const int64_t head = i / count, t = i % count;
        float* to = backward ? keys + place(head, t, width) : rows;
        load(k_of, tiles.tiles[t], head, shape.features, width, to);
        turn(to, TILE, width, turned + place(head, t, width));
        to = backward ? rows : values + place(head, t, values_width);
        load(v_of, tiles.tiles[t], head, shape.values, values_width, to);
        if (backward) turn(to, TILE, values_width, turned_values + place(head, t, values_width));
      }
    });
  }

  int64_t place(int64_t head, int64_t t, int64_t width) const { return (head * tiles.count() + t) * TILE * width; }

  // Whether query i sees the keys of W lanes, from `lane` on.
  vi seen(int64_t i, int32_t its_position, int64_t t, int lane) const {
    const int32_t here = static_cast<int32_t>(i);
    const int64_t at = t * TILE + lane;
    const vi index = iota() + static_cast<int32_t>(tiles.tiles[t].begin + lane);
    vi yes = (load_int(tiles.ends.data() + at) > here) & (index <= here);
    if (tiles.window > 0) yes &= its_position - load_int(tiles.positions.data() + at) < tiles.window32();
    return yes;
  }

 private:
  int64_t size(int64_t width) const { return shape.heads * tiles.count() * TILE * width; }

  template <typename T>
  static void load(const Array<T>& from, const Tile& tile, int64_t head, int64_t count, int64_t width, float* to) {
    for (int64_t i = 0; i < TILE; ++i, to += width) {
      if (tile.begin + i < tile.stop)
        load_row(from.at(tile.begin + i, head), count, width, to);
      else
        std::fill(to, to + width, 0.0f);
    }
  }
};

// What forward and backward do alike: go over the tiles of keys that some queries of a tile see.
class Worker {
 public:
  Worker(const Shape& shape, const Keys& keys, const Scores& scores)
      : shape_(shape),
        keys_(keys),
        scores_(scores),
        queries_(shape.rows() * shape.wide()),
        products_(shape.rows() * TILE) {}

 protected:
  // The query heads of a group, of one key's head.
  void begin(int64_t head, int64_t group, int64_t t) {
    head_ = head;
    first_head_ = head * shape_.rep + group * shape_.group();
    count_ = std::min(shape_.group(), shape_.rep - group * shape_.group());
    index_ = t;
    tile_ = keys_.tiles.tiles[t];
  }
  template <typename T>
  void load_queries(const Array<T>& from, int64_t count, int64_t width, float* to) const {
    for (int64_t i = tile_.begin; i < tile_.stop; ++i)
      for (int64_t h = 0; h < count_; ++h, to += width) load_row(from.at(i, first_head_ + h), count, width, to);
  }
  // f(tile of keys, first row, number of rows, whether they see all of it); a row is one head of one token.
  template <typename F>
  void for_keys(F&& f) const {
    for (int64_t t = 0; t <= index_; ++t) {
      const Tile& k = keys_.tiles.tiles[t];
      if (!keys_.tiles.some_seen(tile_, k)) continue;
      const int64_t first = std::max(tile_.begin, k.begin), stop = std::min<int64_t>(tile_.stop, k.last_end);
      f(t, (first - tile_.begin) * count_, (stop - first) * count_, keys_.tiles.all_seen(tile_, k));
    }
  }
  void multiply_keys(int64_t t, int64_t row, int64_t rows) const {
    product(rows, TILE, shape_.features, queries_ + row * shape_.wide(), shape_.wide(),
            keys_.turned + keys_.place(head_, t, shape_.wide()), TILE, products_ + row * TILE, TILE, false);
  }
  vi seen(int64_t row, int64_t t, int lane) const {
    const int64_t i = row / count_;
    return keys_.seen(tile_.begin + i, keys_.tiles.positions[index_ * TILE + i], t, lane);
  }
  int64_t rows() const { return (tile_.stop - tile_.begin) * count_; }
  int64_t token_of(int64_t row) const { return tile_.begin + row / count_; }
  int64_t head_of(int64_t row) const { return first_head_ + row % count_; }

  const Shape& shape_;
  const Keys& keys_;
  const Scores& scores_;
  Floats queries_, products_;
  int64_t head_ = 0, first_head_ = 0, count_ = 0, index_ = 0;
  Tile tile_{};
};

constexpr int VECTORS = TILE / W;

template <typename T, bool CAPPED>
class Forward : Worker {
 public:
  Forward(const Shape& shape, const Keys& keys, const Scores& scores, const Tensor& q, const float* sinks,
          const Tensor& out, const Tensor& lse)
      : Worker(shape, keys, scores),
        q_(q),
        sinks_(sinks),
        out_(out.data<T>()),
        lse_(lse.data<float>()),
        results_(shape.rows() * shape.wide_values()),
        top_(shape.rows()),
        sums_(shape.rows() * W) {}

  void operator()(int64_t head, int64_t group, int64_t t) {
    begin(head, group, t);
    load_queries(q_, shape_.features, shape_.wide(), queries_);
    const int64_t width = shape_.wide_values();
    std::fill(results_ + 0, results_ + rows() * width, 0.0f);
    std::fill(top_ + 0, top_ + rows(), LOWEST);
    std::fill(sums_ + 0, sums_ + rows() * W, 0.0f);
    for_keys([&](int64_t keys, int64_t first, int64_t count, bool all) {
      multiply_keys(keys, first, count);
      for (int64_t row = first; row < first + count; ++row) all ? fold<true>(row, keys) : fold<false>(row, keys);
      product(count, width, TILE, products_ + first * TILE, TILE, keys_.values + keys_.place(head_, keys, width), width,
              results_ + first * width, width, true);
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
  // Products with a tile's keys -> their weights, the row's results being brought to the largest score so far.
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
      store(p + v * W, weight);
    }
    store(sums_ + row * W, sum);
  }

  const Array<T> q_;
  const float* sinks_;
  T* out_;
  float* lse_;
  Floats results_, top_, sums_;
};

template <typename T, bool CAPPED>
class Backward : Worker {
 public:
  Backward(const Shape& shape, const Keys& keys, const Scores& scores, const Tensor& q, const Tensor& d_out,
           const Tensor& lse, const Tensor& delta, const Tensor& dq)
      : Worker(shape, keys, scores),
        q_(q),
        d_out_(d_out),
        lse_(lse.data<const float>()),
        delta_(delta.data<const float>()),
        dq_(dq.data<float>()),
        turned_queries_(shape.rows() * shape.wide()),
        upstream_(shape.rows() * shape.wide_values()),
        turned_upstream_(shape.rows() * shape.wide_values()),
        slopes_(shape.rows() * TILE),
        results_(shape.rows() * shape.wide()),
        tops_(shape.rows()),
        factors_(shape.rows()) {}

  // Adds to dk (tiles, wide, TILE) and dv (tiles, wide values, TILE).
  void operator()(int64_t head, int64_t group, int64_t t, float* dk, float* dv) {
    begin(head, group, t);
    const int64_t width = shape_.wide(), values = shape_.wide_values(), padded = shape_.rows();
    load_queries(q_, shape_.features, width, queries_);
    load_queries(d_out_, shape_.values, values, upstream_);
    turn(queries_, padded, width, turned_queries_);
    turn(upstream_, padded, values, turned_upstream_);
    std::fill(results_ + 0, results_ + rows() * width, 0.0f);
    for (int64_t row = 0; row < rows(); ++row) {  // exp(score - lse) would lose what a difference of two x has
      const double lse = lse_[place(row)], scale = scores_.score_of(1.0f);
      tops_[row] = static_cast<float>(lse / scale);
      factors_[row] = static_cast<float>(std::exp(tops_[row] * scale - lse));
    }
    for_keys([&](int64_t keys, int64_t first, int64_t count, bool all) {
      float *const p = products_ + first * TILE, *const ds = slopes_ + first * TILE;
      multiply_keys(keys, first, count);
      product(count, TILE, shape_.values, upstream_ + first * values, values,
              keys_.turned_values + keys_.place(head_, keys, values), TILE, ds, TILE, false);
      for (int64_t row = first; row < first + count; ++row) all ? slopes<true>(row, keys) : slopes<false>(row, keys);
      product(shape_.values, TILE, count, turned_upstream_ + first, padded, p, TILE, dv + keys * values * TILE, TILE,
              true);
      product(shape_.features, TILE, count, turned_queries_ + first, padded, ds, TILE, dk + keys * width * TILE, TILE,
              true);
      product(count, width, TILE, ds, TILE, keys_.keys + keys_.place(head_, keys, width), width,
              results_ + first * width, width, true);
    });
    for (int64_t row = 0; row < rows(); ++row)
      write_row(results_ + row * width, 1.0f, shape_.features, dq_ + place(row) * shape_.features);
  }

 private:
  int64_t place(int64_t row) const { return token_of(row) * shape_.heads * shape_.rep + head_of(row); }

  // Products q k and d_out v -> p and ds.
  template <bool ALL>
  void slopes(int64_t row, int64_t t) {
    float *const p = products_ + row * TILE, *const ds = slopes_ + row * TILE;
    const float top = tops_[row], factor = factors_[row], delta = delta_[place(row)], unit = scores_.unit();
    for (int v = 0; v < VECTORS; ++v) {
      const vf x = scores_.value<CAPPED>(load(p + v * W));
      vf weight = exp2((x - top) * unit) * factor;
      if constexpr (!ALL) weight = seen(row, t, v * W) ? weight : vf{};
      vf slope = weight * (load(ds + v * W) - delta) * scores_.scale;
      if constexpr (CAPPED) slope *= 1.0f - (x / scores_.softcap) * (x / scores_.softcap);
      store(p + v * W, weight);
      store(ds + v * W, slope);
    }
  }

  const Array<T> q_, d_out_;
  const float *lse_, *delta_;
  float* dq_;
  Floats turned_queries_, upstream_, turned_upstream_, slopes_, results_, tops_, factors_;
};

// f(worker, i) for all i < n, each worker a thread's own: whichever is free takes the next.
template <typename MakeWorker, typename F>
void take_turns(int64_t n, int threads, MakeWorker&& make, F&& f) {
  std::atomic<int64_t> next{0};
  const int workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), n));
  parallel_for(workers, workers, [&](int64_t begin, int64_t stop) {
    for (int64_t w = begin; w < stop; ++w) {
      auto worker = make();
      for (int64_t i; (i = next.fetch_add(1)) < n;) f(worker, i);
    }
  });
}

// Sums (heads, ranges, tiles, wide, TILE) -> out (tokens, heads, features).
void add_up(const Shape& shape, const Tiles& tiles, const float* sums, int64_t ranges, int64_t features, float* out,
            int threads) {
  const int64_t wide = round_up(features, LANES), size = wide * TILE, count = tiles.count();
  parallel_for(shape.heads * count, threads, [&](int64_t begin, int64_t stop) {
    const Floats sum(size), rows(size);
    for (int64_t i = begin; i < stop; ++i) {
      const int64_t head = i / count, t = i % count;
      const float* from = sums + (head * ranges * count + t) * size;
      std::copy(from, from + size, sum + 0);
      for (int64_t r = 1; r < ranges; ++r)
        for (int64_t j = 0; j < size; j += W) store(sum + j, load(sum + j) + load(from + r * count * size + j));
      turn(sum, wide, TILE, rows);
      const Tile& tile = tiles.tiles[t];
      for (int64_t token = tile.begin; token < tile.stop; ++token)
        write_row(rows + (token - tile.begin) * wide, 1.0f, features, out + (token * shape.heads + head) * features);
    }
  });
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end) {
  expect(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v must have 3 dimensions");
  const Shape s{q.size(0), k.size(1), k.size(1) > 0 ? q.size(1) / k.size(1) : 0, q.size(2), v.size(2)};
  for (const Tensor* x : {&q, &k, &v})
    expect(x->dtype() == q.dtype() && x->size(0) == s.tokens && (x->stride(2) == 1 || x->size(2) == 1),
           "q, k, v must be of one dtype and length, dense along features");
  expect(s.rep > 0 && q.size(1) == s.heads * s.rep && v.size(1) == s.heads && k.size(2) == s.features,
         "q, k, v must have heads that fit");
  expect_dense("end", end, DType::i32, {s.tokens});  // position: by Tiles
  return s;
}

}  // namespace

void tree_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sinks, const Tensor& end,
                        const Tensor& position, double scale, int64_t window, double softcap, const Tensor& out,
                        const Tensor& lse, int threads) {
  const Shape shape = shape_of(q, k, v, end);
  const int64_t query_heads = shape.heads * shape.rep;
  expect_dense("sinks", sinks, DType::f32, {query_heads}, true);
  expect_dense("out", out, q.dtype(), {shape.tokens, query_heads, shape.values});
  expect_dense("lse", lse, DType::f32, {shape.tokens, query_heads});
  const Tiles tiles(end, position, window);
  const Scores scores{static_cast<float>(scale), static_cast<float>(softcap)};
  for_dtype("q", q, [&](auto element) {
    using T = decltype(element);
    const Keys keys(element, shape, tiles, k, v, false, threads);
    const auto run = [&](auto capped) {
      const auto make = [&] {
        return Forward<T, capped.value>(shape, keys, scores, q, sinks.data<const float>(), out, lse);
      };
      const int64_t units = shape.heads * shape.groups(), count = tiles.count();
      take_turns(units * count, threads, make, [&](auto& forward, int64_t i) {  // the last see most
        forward(i % units / shape.groups(), i % shape.groups(), count - 1 - i / units);
      });
    };
    softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
}

// dq, dk, dv: fp32. delta: (tokens, query heads), d_out . out.
void tree_attention_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end, const Tensor& position,
                        double scale, int64_t window, double softcap, const Tensor& lse, const Tensor& delta,
                        const Tensor& d_out, const Tensor& dq, const Tensor& dk, const Tensor& dv, int threads) {
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
  const int64_t groups = shape.groups(), units = shape.heads * groups, count = tiles.count();
  const auto bounds = tiles.ranges(std::clamp<int64_t>((2 * threads + units - 1) / units, 1, MOST_RANGES));
  const int64_t pieces = bounds.size() - 1;
  const int64_t k_size = count * shape.wide() * TILE, v_size = count * shape.wide_values() * TILE;
  const Floats k_sums(units * pieces * k_size), v_sums(units * pieces * v_size);
  for_dtype("q", q, [&](auto element) {
    using T = decltype(element);
    const Keys keys(element, shape, tiles, k, v, true, threads);
    const auto run = [&](auto capped) {
      const auto make = [&] {
        return Backward<T, capped.value>(shape, keys, scores, q, d_out, lse, delta, dq);
      };
      take_turns(units * pieces, threads, make, [&](auto& backward, int64_t i) {
        float *const k_sum = k_sums + i * k_size, *const v_sum = v_sums + i * v_size;
        std::fill(k_sum, k_sum + k_size, 0.0f);
        std::fill(v_sum, v_sum + v_size, 0.0f);
        const int64_t unit = i / pieces, piece = i % pieces;
        for (int64_t t = bounds[piece]; t < bounds[piece + 1]; ++t)
          backward(unit / groups, unit % groups, t, k_sum, v_sum);
      });
    };
    softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
  add_up(shape, tiles, k_sums, groups * pieces, shape.features, dk.data<float>(), threads);
  add_up(shape, tiles, v_sums, groups * pieces, shape.values, dv.data<float>(), threads);
}

}  // namespace flashpo::FLASHPO_ISA
