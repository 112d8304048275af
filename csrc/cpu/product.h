// Small matrix products in registers, on rows of vectors: c (rows x columns) = a (rows x depth) b, or c += a b.
//
// Each element is one chain of multiply-adds over the depth, whatever the size of its tile is.
#pragma once
#include <algorithm>
#include <type_traits>

#include "isa.h"

namespace flashpo::FLASHPO_ISA {

// The tile of c in registers. It takes 24 of 32 registers with AVX-512, and 12 of 16 without.
constexpr int TILE_ROWS = 6, TILE_VECTORS = W == 16 ? 4 : 2;

// Memory to prefetch while a product is computed: `pairs` pairs of cache lines, `step` bytes apart.
struct Ahead {
  const char* p = nullptr;
  int64_t pairs = 0, step = 128;

  void fetch() {
    __builtin_prefetch(p, 0, 2);
    __builtin_prefetch(p + 64, 0, 2);
    p += step;
  }
  // Prefetch what `steps` calls of fetch() would not reach, so that `pairs` is at most `steps`.
  void fetch_all_but(int64_t steps) {
    for (; pairs > steps; --pairs) fetch();
  }
  Ahead next(int64_t steps, const void* near) {
    if (pairs <= 0) return {static_cast<const char*>(near), 0, 0};
    const Ahead these = *this;
    p += steps * step;
    pairs -= steps;
    return these;
  }
};

// In place of Ahead where nothing has to be prefetched, because the operands are in the caches.
struct Near {
  void fetch() {}
  Near next(int64_t, const void*) { return {}; }
};

using One = std::integral_constant<int64_t, 1>;

// a_stride leads to the next row of a, a_step to the next number along the depth. One of the two is One.
template <int R, int V, typename T, typename Fetches, typename Stride, typename Step = One>
static inline void product_tile(const float* a, Stride a_stride, const T* b, int64_t b_stride, int64_t depth,
                                float* c, int64_t c_stride, bool add, Fetches ahead, Step a_step = {}) {
  vf sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    ahead.fetch();
    vf row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * b_stride + v * W);
    for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * a_stride + k * a_step]);
      for (int v = 0; v < V; ++v) sum[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + v * W;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int V, typename T, typename Fetches, typename Stride, typename Step = One>
static inline void product_vectors(int64_t rows, const float* a, Stride a_stride, const T* b, int64_t b_stride,
                                   int64_t depth, float* c, int64_t c_stride, bool add, Fetches& ahead,
                                   Step a_step = {}) {
  while (rows > 0) {
    const int64_t tile = std::min<int64_t>(rows, TILE_ROWS);
    const Fetches near = ahead.next(depth, b);
    switch (tile) {
      case 1: product_tile<1, V>(a, a_stride, b, b_stride, depth, c, c_stride, add, near, a_step); break;
      case 2: product_tile<2, V>(a, a_stride, b, b_stride, depth, c, c_stride, add, near, a_step); break;
      case 3: product_tile<3, V>(a, a_stride, b, b_stride, depth, c, c_stride, add, near, a_step); break;
      case 4: product_tile<4, V>(a, a_stride, b, b_stride, depth, c, c_stride, add, near, a_step); break;
      case 5: product_tile<5, V>(a, a_stride, b, b_stride, depth, c, c_stride, add, near, a_step); break;
      default: product_tile<TILE_ROWS, V>(a, a_stride, b, b_stride, depth, c, c_stride, add, near, a_step);
    }
    rows -= tile;
    a += tile * a_stride;
    c += tile * c_stride;
  }
}

// b is a tile of T in memory whose rows [first, last) are used. a has a column for each row of b, from row 0.
template <typename T>
class VectorProduct {
 public:
  using Operand = float;
  explicit VectorProduct(float* scratch) : wide_(scratch) {}

  // The rows of c have room for whole vectors. b is first converted to float if that is cheaper, or if
  // its rows have no such room.
  void operator()(int64_t rows, int64_t columns, int64_t first, int64_t last, const float* a, int64_t a_stride,
                  const T* b, int64_t b_stride, float* c, int64_t c_stride, bool add, Ahead ahead) {
    const int64_t depth = last - first, padded = (columns + W - 1) / W * W;
    const bool whole = padded <= b_stride;
    a += first;
    b += first * b_stride;
    if (whole && (sizeof(T) == 4 || rows <= TILE_ROWS))
      return multiply(rows, padded, depth, a, a_stride, b, b_stride, c, c_stride, add, ahead);
    for (int64_t k = 0; k < depth; ++k) operand(b + k * b_stride, whole ? padded : columns, wide_ + k * padded);
    multiply(rows, padded, depth, a, a_stride, wide_, padded, c, c_stride, add, ahead);
  }

  static void operand(const T* from, int64_t count, float* to) {
    int64_t j = 0;
    for (; j + W <= count; j += W) store(to + j, load(from + j));
    const int rest = static_cast<int>(count - j);
    if (rest > 0) store_part(to + j, load_part(from + j, rest, 0.0f), rest);
  }

 private:
  template <typename B>
  static void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const B* b,
                       int64_t b_stride, float* c, int64_t c_stride, bool add, Ahead ahead) {
    ahead.fetch_all_but(depth * ((rows + TILE_ROWS - 1) / TILE_ROWS) * (columns / (TILE_VECTORS * W)));
    int64_t j = 0;
    for (; j + TILE_VECTORS * W <= columns; j += TILE_VECTORS * W)
      product_vectors<TILE_VECTORS>(rows, a, a_stride, b + j, b_stride, depth, c + j, c_stride, add, ahead);
    for (; j < columns; j += W)
      product_vectors<1>(rows, a, a_stride, b + j, b_stride, depth, c + j, c_stride, add, ahead);
  }

  float* wide_;
};

}  // namespace flashpo::FLASHPO_ISA
