// A SIMD vector of floats for the instruction set for which this file is compiled, and its operations.
// It uses compiler vector extensions instead of intrinsics: the same source gives SSE2, AVX2, AVX-512 and NEON code.
// Everything is in a namespace of the instruction set: otherwise the linker could keep the AVX-512 form of a shared
// inline function for all of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef FLASHPO_ISA
#define FLASHPO_ISA baseline
#endif
#if defined(__AVX512BF16__) || defined(FLASHPO_EMULATE)
#define FLASHPO_PAIRS  // there are instructions for products of bfloat16
#if defined(__AMX_BF16__) || defined(FLASHPO_EMULATE_AMX)
#define FLASHPO_TILES  // and they compute them in tiles
#endif
#endif

namespace flashpo::FLASHPO_ISA {

#if defined(__AVX512F__) || defined(FLASHPO_EMULATE)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using vf = float __attribute__((vector_size(4 * W)));
using vi = int32_t __attribute__((vector_size(4 * W)));
using vu = uint32_t __attribute__((vector_size(4 * W)));
using vi64 = int64_t __attribute__((vector_size(8 * W)));
using vu16 = uint16_t __attribute__((vector_size(2 * W)));
using vi16 = int16_t __attribute__((vector_size(2 * W)));
using vi8 = int8_t __attribute__((vector_size(W)));
using vd = double __attribute__((vector_size(8 * W)));

struct bf16 { uint16_t bits; };
#if defined(__aarch64__)
using f16 = __fp16;  // GCC 12 has no _Float16 in C++ for this target
#else
using f16 = _Float16;
#endif
using vf16 = f16 __attribute__((vector_size(2 * W)));

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;
constexpr float LOWEST = -3.0e38f;  // replaces -inf where a difference is taken
constexpr float SMALLEST = -126.0f;  // 2^SMALLEST is fp32's smallest normal number
constexpr float NOTHING = -150.0f;   // 2^NOTHING is 0 in fp32

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return x - vi{}; }
static inline vi iota() {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }
// A NaN in x passes through, so that it is seen in the result.
static inline vf at_least(vf x, float low) { return splat(low) > x ? splat(low) : x; }

static inline bool any(vi mask) {
  uint64_t words[W / 2], bits = 0;
  std::memcpy(words, &mask, sizeof words);
  for (int i = 0; i < W / 2; ++i) bits |= words[i];
  return bits != 0;
}

// Load W elements as floats.
static inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline vf load(const bf16* p) {
  vu16 x;
  std::memcpy(&x, p, sizeof x);
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
static inline vf load(const f16* p) {
  vf16 x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vf);
}
static inline vi load_int(const int8_t* p) {
  vi8 x;
  std::memcpy(&x, p, sizeof x);
  // GCC converts lane by lane if it is done in one step
  return __builtin_convertvector(__builtin_convertvector(x, vi16), vi);
}
static inline vi load_int(const int32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline vi load_int(const int64_t* p) {
  vi64 x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vi);
}

// The bits of a T, rounded to nearest even, in the low half of each lane (for a float, in the whole lane). A NaN that
// an operation produced stays a NaN, as its low bits are 0 and do not carry.
static inline vu to_bits(vf x, float*) { return (vu)x; }
static inline vu to_bits(vf x, bf16*) {
  const vu bits = (vu)x;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline vu to_bits(vf x, f16*) {
  return __builtin_convertvector((vu16)__builtin_convertvector(x, vf16), vu);
}
static inline void store_bits(float* p, vu bits) { std::memcpy(p, &bits, sizeof bits); }
template <typename T>
static inline void store_bits(T* p, vu bits) {
  const vu16 half = __builtin_convertvector(bits, vu16);
  std::memcpy(p, &half, sizeof half);
}
template <typename T>
static inline void store(T* p, vf x) {
  store_bits(p, to_bits(x, p));
}

// Transpose: x[i][j] <-> x[j][i], by exchanging ever larger off-diagonal squares.
static inline void transpose(vu (&x)[W]) {
#pragma GCC unroll 4
  for (int size = 1; size < W; size *= 2) {
    vi upper, lower;
    for (int j = 0; j < W; ++j) {
      upper[j] = j & size ? W + j - size : j;
      lower[j] = j & size ? W + j : j + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & size) continue;
      const vu a = x[i], b = x[i + size];
      x[i] = __builtin_shuffle(a, b, (vu)upper);
      x[i + size] = __builtin_shuffle(a, b, (vu)lower);
    }
  }
}

// Load the first `count` < W elements; the other lanes are `fill`.
template <typename T>
static inline vf load_part(const T* p, int count, float fill) {
  alignas(64) T lanes[W] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  vf x = load(lanes);
  return iota() < splat_int(count) ? x : splat(fill);
}
template <typename T>
static inline void store_part(T* p, vf x, int count) {
  alignas(64) T lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(T));
}

// Load or store W numbers, or the `left` that exist.
template <typename T>
static inline vf load_some(const T* p, int64_t left) {
  return left >= W ? load(p) : load_part(p, static_cast<int>(left), 0.0f);
}
template <typename T>
static inline void store_some(T* p, vf x, int64_t left) {
  left >= W ? store(p, x) : store_part(p, x, static_cast<int>(left));
}

// Reduce all lanes to one number, by halves.
template <typename F>
static inline float reduce(vf x, F&& f) {
  for (int half = W / 2; half > 0; half /= 2) x = f(x, __builtin_shuffle(x, iota() ^ half));
  return x[0];
}

// Write `count` numbers of a row that consists of whole vectors.
template <typename T>
static inline void write_row(const float* row, float factor, int64_t count, T* out) {
  int64_t j = 0;
  for (; j + W <= count; j += W) store(out + j, load(row + j) * factor);
  if (j < count) store_part(out + j, load(row + j) * factor, static_cast<int>(count - j));
}

// Store the lanes for which `mask` holds next to each other at p, where W floats may be overwritten, and count them.
static inline int compress(float* p, vf x, vi mask) {
#if defined(__AVX512F__)  // the vector extensions cannot do this, and lane by lane it takes ten times as long
  const __mmask16 lanes = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(lanes, (__m512)x));
  return __builtin_popcount(lanes);
#else
  int count = 0;
  for (int i = 0; i < W; ++i) {
    p[count] = x[i];
    count -= mask[i];
  }
  return count;
#endif
}

// 2^y for -126 <= y <= 127. Relative error 1e-7 (minimax polynomial of degree 5 on [-1/2, 1/2], 2^0 exact).
static inline vf exp2_normal(vf y) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const vf shifted = y + magic;
  const vf r = y - (shifted - magic);
  vf p = splat(0.00132647273f) * r + 0.00967151299f;
  p = p * r + 0.0555073358f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.0f;
  return (vf)((vu)p + ((vu)shifted << 23));  // unsigned, because `exp2` passes any y and drops the result
}

// 2^y for all y <= 127; 0 below -126.
static inline vf exp2(vf y) { return y < splat(SMALLEST) ? vf{} : exp2_normal(y); }

// e^x for |x| <= 88. ln 2 is subtracted in two parts, so that the relative error stays 1e-7 however large x is (Cephes'
// expf).
static inline vf exp_normal(vf x) {
  const vf magic = splat(12582912.0f);
  const vf shifted = x * LOG2E + magic;
  const vf k = shifted - magic;
  const vf r = (x - k * 0.693359375f) + k * 2.12194440e-4f, r2 = r * r;
  const vf low = r * 1.6666665459e-1f + 5.0000001201e-1f;  // parts that do not depend on each other
  const vf middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const vf high = r * 1.9875691500e-4f + 1.3981999507e-3f;
  const vf p = ((high * r2 + middle) * r2 + low) * r2 + (r + 1.0f);
  return (vf)((vi)p + ((vi)shifted << 23));
}

// e^x for all x: 0 below fp32's normal numbers, inf above them.
static inline vf exp(vf x) {
  const vf e = exp_normal(at_least(x > splat(88.7228f) ? splat(88.7228f) : x, -87.3365f));
  return x < splat(-87.3365f) ? vf{} : x > splat(88.7228f) ? splat(INFINITY) : e;
}

// log x; -inf for 0 and for numbers below fp32's normal ones, NaN for negative numbers (Cephes' logf).
static inline vf log(vf x) {
  const vi bits = (vi)x, half = splat_int(0x3f000000);
  const vi small = ((bits & 0x7fffff) | half) < splat_int(0x3f3504f3);  // mantissa below sqrt(1/2)
  const vf e = __builtin_convertvector(((bits >> 23) & 0xff) - 126 + small, vf);
  const vf mantissa = (vf)((bits & 0x7fffff) | half);
  const vf r = (small ? mantissa + mantissa : mantissa) - 1.0f, z = r * r;
  vf p = splat(7.0376836292e-2f) * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const vf y = p * r * z - 2.12194440e-4f * e - 0.5f * z;
  const vf normal = (r + y) + 0.693359375f * e;
  const vf least = x < vf{} ? splat(NAN) : splat(-INFINITY);
  return x < splat(1.17549435e-38f) ? least : x < splat(INFINITY) ? normal : x;
}

// Near 0 it is a polynomial (Cephes' tanhf), because 1 - 2 / (e^2x + 1) would lose the digits of x there.
static inline vf tanh(vf x) {
  const vf e = exp2(at_least(x < splat(20.0f) ? x : splat(20.0f), -20.0f) * (2 * LOG2E));
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f) * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return z < splat(0.39f) ? p * z * x + x : 1.0f - 2.0f / (e + 1.0f);
}

// z = softcap tanh((x + b) logit_scale / softcap) / T, in bits y = z log2(e), is computed in two steps: value(x), then
// the product with unit(1 / T). Differences of values are exact, while differences of y would not be.
struct Transform {
  float logit_scale;
  float softcap;  // 0 means none

  template <bool CAPPED>
  vf value(vf x, float bias) const {
    if constexpr (CAPPED) {
      x = (x + bias) * logit_scale;
      if (softcap != 0) x = softcap * tanh(x * (1 / softcap));
    }
    return x;
  }
  template <bool CAPPED>
  vf unit(vf inv_temperature) const {
    return inv_temperature * (CAPPED ? LOG2E : logit_scale * LOG2E);
  }
  // dz/dx is logit_scale / T times this number.
  template <bool CAPPED>
  vf cap_slope(vf x, float bias) const {
    if constexpr (CAPPED) {
      if (softcap != 0) {
        const vf t = tanh((x + bias) * (logit_scale / softcap));
        return 1.0f - t * t;
      }
    }
    return splat(1.0f);
  }
};

}  // namespace flashpo::FLASHPO_ISA
