// One SIMD vector of floats, for the instruction set that this file is compiled for, and what the kernels do with it.
// Compiler vector extensions instead of intrinsics: the same source gives SSE2, AVX2 and AVX-512 (and NEON) code.
// Everything lives in the ISA's own namespace: a shared inline function could be kept in its AVX-512 form for all.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef FLASHPO_ISA
#define FLASHPO_ISA baseline
#endif

namespace flashpo::FLASHPO_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using vf = float __attribute__((vector_size(4 * W)));
using vi = int32_t __attribute__((vector_size(4 * W)));
using vu = uint32_t __attribute__((vector_size(4 * W)));
using vu16 = uint16_t __attribute__((vector_size(2 * W)));
using vf16 = _Float16 __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };
using f16 = _Float16;

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;
constexpr float LOWEST = -3.0e38f;  // stands for -inf where a difference is taken
constexpr float NOTHING = -150.0f;  // 2^NOTHING is 0 in fp32

static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return x - vi{}; }
static inline vi iota() {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }
// A NaN in x passes through, so that a poisoned logit shows in the result.
static inline vf at_least(vf x, float low) { return x < splat(low) ? splat(low) : x; }

static inline bool any(vi mask) {
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= mask[i];
  return bits != 0;
}

// W elements from memory as floats, and back with round-to-nearest-even.
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
static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline void store(bf16* p, vf x) {
  vu bits = (vu)x;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = x == x ? bits : (vu)splat_int(0x7fc0);
  const vu16 half = __builtin_convertvector(bits, vu16);
  std::memcpy(p, &half, sizeof half);
}
static inline void store(f16* p, vf x) {
  const vf16 half = __builtin_convertvector(x, vf16);
  std::memcpy(p, &half, sizeof half);
}

// The first `count` < W elements; the other lanes are `fill`.
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

// 2^y for y <= 127; 0 below -126. Relative error 1e-7 (minimax polynomial of degree 5 on [-1/2, 1/2], 2^0 exact).
static inline vf exp2(vf y) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const vf shifted = y + magic;
  const vf r = y - (shifted - magic);
  vf p = splat(0.00132647273f) * r + 0.00967151299f;
  p = p * r + 0.0555073358f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.0f;
  const vf result = (vf)((vi)p + ((vi)shifted << 23));
  return y < splat(-126.0f) ? vf{} : result;
}

static inline vf tanh(vf x) {
  const vf e = exp2(at_least(x < splat(20.0f) ? x : splat(20.0f), -20.0f) * (2 * LOG2E));
  return 1.0f - 2.0f / (e + 1.0f);
}

// z = softcap tanh((x + b) logit_scale / softcap) / T, in bits: y = z log2(e).
struct Transform {
  float logit_scale;
  float softcap;  // 0: none

  template <bool CAPPED>
  vf bits(vf x, float bias, vf inv_temperature) const {
    if constexpr (CAPPED) {
      x = (x + bias) * logit_scale;
      if (softcap != 0) x = softcap * tanh(x * (1 / softcap));
      return x * (inv_temperature * LOG2E);
    }
    return x * (inv_temperature * (logit_scale * LOG2E));
  }
  // dz/dx for the same x
  template <bool CAPPED>
  vf slope(vf x, float bias, vf inv_temperature) const {
    vf s = inv_temperature * logit_scale;
    if constexpr (CAPPED) {
      if (softcap != 0) {
        const vf t = tanh((x + bias) * (logit_scale / softcap));
        s *= 1.0f - t * t;
      }
    }
    return s;
  }
};

}  // namespace flashpo::FLASHPO_ISA
