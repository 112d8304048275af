// x W^T + b for the rows of a decode step. W is stored in panels of WIDTH columns of the result, one panel after the
// other.
//
// A step reads every weight once and computes little with it. While the rows go over a block of a panel, software
// prefetches every line of the next block into the cache, because hardware prefetching stops at every page.
#include <algorithm>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "product.h"
#ifdef FLASHPO_PAIRS
#include "product_pairs.h"
#endif

namespace flashpo::FLASHPO_ISA {
namespace {

constexpr int64_t ROW_BLOCK = 192;  // rows of x that stay in the second-level cache while all panels are read

template <typename T>
struct Problem {
  const T *x, *packed, *bias;  // (rows, depth), (panels, depth * WIDTH), (columns) or null
  T* out;                      // (rows, columns)
  int64_t rows, depth, columns, x_stride;
};

// Write those columns of a panel that exist, from sums in fp32.
template <typename T>
void write(const Problem<T>& p, const float* sums, int64_t sums_stride, int64_t row, int64_t rows, int64_t column,
           int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    T* out = p.out + (row + r) * p.columns + column;
    for (int64_t j = 0; j < std::min(width, p.columns - column); j += W) {
      const int count = static_cast<int>(std::min<int64_t>(W, p.columns - column - j));
      vf y = load(sums + r * sums_stride + j);
      if (p.bias) y += count == W ? load(p.bias + column + j) : load_part(p.bias + column + j, count, 0);
      count == W ? store(out + j, y) : store_part(out + j, y, count);
    }
  }
}

#ifndef FLASHPO_PAIRS

// float32: a panel is (depth, 48).
class Panels {
 public:
  using Element = float;
  static constexpr int64_t WIDTH = 48;

  explicit Panels(const Problem<float>& p) : p_(p) {}

  void operator()(int64_t panel, int64_t row, int64_t rows) {
    const float* weights = p_.packed + panel * p_.depth * WIDTH;
    const int64_t passes = (rows + ROWS - 1) / ROWS;
    for (int64_t k = 0; k < p_.depth; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, p_.depth - k);
      const float* block = weights + k * WIDTH;
      for (int64_t i = 0, pass = 0; i < rows; i += ROWS, ++pass) {
        const char* next = reinterpret_cast<const char*>(block + depth * WIDTH);
        const auto go = [&](auto ahead) {
          const float* x = p_.x + (row + i) * p_.x_stride + k;
          for (int64_t j = 0; j < WIDTH; j += VECTORS * W)
            tile<ROWS>(rows - i, x, p_.x_stride, block + j, depth, sums_ + i * WIDTH + j, k > 0, ahead);
        };
        if (passes == 1)
          go(Lines<3>{next, 192});
        else if (passes > 2)
          go(Lines<1>{next + depth * 192 * pass / passes, 192 / passes});
        else
          pass == 0 ? go(Lines<1>{next, 64}) : go(Lines<2>{next + depth * 64, 128});
      }
    }
    write(p_, sums_, WIDTH, row, rows, panel * WIDTH, WIDTH);
  }

 private:
  static constexpr int VECTORS = 3, ROWS = W == 16 ? 8 : 4;  // sums take 24 of 32 registers, or 12 of 16
  static constexpr int64_t DEPTH = 128;                      // 24 KB of a panel, half of the first-level cache

  // N of the 3 lines of a block per step of its depth: those that one pass of rows prefetches.
  template <int N>
  struct Lines {
    const char* p;
    int64_t step;  // bytes
    void fetch() {
      for (int i = 0; i < N; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
      p += step;
    }
  };

  template <int R, typename Ahead>
  static void tile(int64_t rows, const float* x, int64_t x_stride, const float* b, int64_t depth, float* c, bool add,
                   Ahead ahead) {
    if (rows >= R)
      product_tile<R, VECTORS>(x, x_stride, b, WIDTH, depth, c, WIDTH, add, ahead);
    else if constexpr (R > 1)
      tile<R - 1>(rows, x, x_stride, b, depth, c, add, ahead);
  }

  const Problem<float>& p_;
  alignas(64) float sums_[ROW_BLOCK * WIDTH];
};

#else

// bfloat16: a panel is (depth / 32, 2, 16, 16, 2): tiles of 16 pairs of rows and 16 columns, two tiles next to each
// other.
#ifdef FLASHPO_TILES

class Panels {
 public:
  using Element = bf16;
  static constexpr int64_t WIDTH = 32;

  explicit Panels(const Problem<bf16>& p) : p_(p) {}

  void operator()(int64_t panel, int64_t row, int64_t rows) {
    const bf16* weights = p_.packed + panel * p_.depth * WIDTH;
    for (int64_t i = 0; i < rows; i += 32) {
      const int64_t here = std::min<int64_t>(rows - i, 32);
      tiles_.use(std::min<int64_t>(here, 16), here - std::min<int64_t>(here, 16));
      const bf16* x = p_.x + (row + i) * p_.x_stride;
      i > 0 ? here > 16 ? multiply<true, false>(x, weights) : multiply<false, false>(x, weights)
            : here > 16 ? multiply<true, true>(x, weights) : multiply<false, true>(x, weights);
      write(p_, sums_, WIDTH, row + i, here, panel * WIDTH, WIDTH);
    }
  }

 private:
  static constexpr int64_t AHEAD = 8192;  // bytes

  template <bool TWO, bool FETCH>
  void multiply(const bf16* x, const bf16* weights) {
    const int64_t stride = p_.x_stride * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < p_.depth; k += 32, weights += 1024) {
      if constexpr (FETCH) {
        const char* next = reinterpret_cast<const char*>(weights) + AHEAD;
        for (int64_t line = 0; line < 2048; line += 64) __builtin_prefetch(next + line, 0, 2);
      }
      _tile_loadd(4, x + k, stride);
      _tile_loadd(6, weights, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weights + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TWO) {
        _tile_loadd(5, x + 16 * p_.x_stride + k, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums_, 4 * WIDTH);
    _tile_stored(1, sums_ + 16, 4 * WIDTH);
    if constexpr (TWO) {
      _tile_stored(2, sums_ + 16 * WIDTH, 4 * WIDTH);
      _tile_stored(3, sums_ + 16 * WIDTH + 16, 4 * WIDTH);
    }
  }

  const Problem<bf16>& p_;
  TileRegisters tiles_;
  alignas(64) float sums_[32 * WIDTH];
};

#else

class Panels {
 public:
  using Element = bf16;
  static constexpr int64_t WIDTH = 32;

  explicit Panels(const Problem<bf16>& p) : p_(p) {}

  void operator()(int64_t panel, int64_t row, int64_t rows) {
    const Pairs weights{p_.packed + panel * p_.depth * WIDTH, 32, 512, 1024};
    for (int64_t i = 0; i < rows; i += ROWS) {
      const bf16* x = p_.x + (row + i) * p_.x_stride;
      const auto go = [&](auto ahead) {
        multiply_rows<ROWS, 2>(rows - i, x, p_.x_stride, weights, p_.depth / 32, sums_, WIDTH, false, ahead);
      };
      i == 0 ? go(Ahead{reinterpret_cast<const char*>(weights.p) + AHEAD}) : go(Near{});
      write(p_, sums_, WIDTH, row + i, std::min(ROWS, rows - i), panel * WIDTH, WIDTH);
    }
  }

 private:
  static constexpr int64_t ROWS = 12, AHEAD = 8192;  // the sums take 24 of 32 registers; bytes

  const Problem<bf16>& p_;
  alignas(64) float sums_[ROWS * WIDTH];
};

#endif
#endif

}  // namespace

#ifndef FLASHPO_PAIRS

// Both layouts consist of words of 4 bytes, which are a float or a pair of bfloat16. Word (k, column) of a panel goes
// to (k, column) of a tile with `tile_columns` adjacent columns and `tile_depth` words k.
void pack_linear(const Tensor& weight, const Tensor& packed, int threads) {
  const bool pairs = weight.dtype() == DType::bf16;
  const int64_t columns = weight.size(0), words = weight.size(1) / (pairs ? 2 : 1);
  const int64_t width = pairs ? 32 : Panels::WIDTH, panels = (columns + width - 1) / width;
  const int64_t tile_columns = pairs ? 16 : width, tile_depth = pairs ? 16 : words;
  if (pairs)
    expect_dense("packed", packed, DType::bf16, {panels, words / 16, 2, 16, 16, 2});
  else
    expect_dense("packed", packed, DType::f32, {panels, words, width});
  expect_dense("weight", weight, packed.dtype(), {columns, pairs ? words / 16 * 32 : words});
  const uint32_t* from = weight.data<const uint32_t>();
  uint32_t* to = packed.data<uint32_t>();
  parallel_for(panels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin * width; column < end * width; column += W) {
      uint32_t* panel = to + column / width * width * words;
      for (int64_t k = 0; k < words; k += W) {
        const int64_t count = std::min<int64_t>(W, words - k);
        vu block[W] = {};
        for (int64_t i = 0; i < std::min<int64_t>(W, columns - column); ++i)
          std::memcpy(&block[i], from + (column + i) * words + k, count * sizeof(uint32_t));
        transpose(block);
        const int64_t tile = k / tile_depth * (width / tile_columns) + column % width / tile_columns;
        uint32_t* at = panel + (tile * tile_depth + k % tile_depth) * tile_columns + column % width % tile_columns;
        for (int64_t i = 0; i < count; ++i) std::memcpy(at + i * tile_columns, &block[i], sizeof(vu));
      }
    }
  });
}

#endif

// packed is (panels, depth, 48) for float32 and (panels, depth / 32, 2, 16, 16, 2) for bfloat16.
void packed_linear(const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& out, int threads) {
#ifdef FLASHPO_PAIRS
  if (x.dtype() != DType::bf16) return without_pairs::packed_linear(x, packed, bias, out, threads);
  constexpr DType dtype = DType::bf16;
  expect(packed.dim() == 6, "packed must have 6 dimensions");
  const int64_t depth = packed.size(1) * 32;
  expect_dense("packed", packed, dtype, {packed.size(0), packed.size(1), 2, 16, 16, 2});
#else
  constexpr DType dtype = DType::f32;
  expect(packed.dim() == 3, "packed must have 3 dimensions");
  const int64_t depth = packed.size(1);
  expect_dense("packed", packed, dtype, {packed.size(0), depth, Panels::WIDTH});
#endif
  expect(x.dim() == 2 && x.dtype() == dtype && x.size(1) == depth && (x.stride(1) == 1 || depth == 1),
         "x must be (rows, depth), dense along depth");
  const int64_t rows = x.size(0), columns = out.size(1), panels = packed.size(0);
  expect_dense("out", out, dtype, {rows, columns});
  expect_dense("bias", bias, dtype, {columns}, true);
  expect(panels == (columns + Panels::WIDTH - 1) / Panels::WIDTH, "packed holds another number of columns");
  using T = Panels::Element;
  const Problem<T> p{x.data<const T>(), packed.data<const T>(), bias.data<const T>(), out.data<T>(),
                     rows, depth, columns, x.stride(0)};
  parallel_for(panels, threads, [&](int64_t begin, int64_t end) {
    Panels multiply(p);
    for (int64_t row = 0; row < rows; row += ROW_BLOCK)
      for (int64_t panel = begin; panel < end; ++panel) multiply(panel, row, std::min(ROW_BLOCK, rows - row));
  });
}

}  // namespace flashpo::FLASHPO_ISA
