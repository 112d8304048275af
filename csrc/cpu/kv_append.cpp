// kv_append on the CPU. It copies bit patterns, and writes consecutive slots of one block together.
#include <algorithm>
#include <cstring>

#include "../decode_plan.h"
#include "../ops.h"
#include "parallel.h"

namespace flashpo {
namespace {

using decode::BLOCK;

template <typename Bits>
void append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot,
            int threads) {
  const int64_t heads = k_cache.size(1), features = k_cache.size(2), value_features = v_cache.size(3);
  const int64_t* slots = slot.data<int64_t>();
  parallel_for(slot.size(0), threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin, count; n < end; n += count) {
      count = 1;
      if (slots[n] < 0) continue;
      const int64_t block = slots[n] / BLOCK, offset = slots[n] % BLOCK;
      while (n + count < end && offset + count < BLOCK && slots[n + count] == slots[n] + count) ++count;
      for (int64_t h = 0; h < heads; ++h) {
        const Bits* key = k.data<Bits>() + n * k.stride(0) + h * k.stride(1);
        Bits* keys = k_cache.data<Bits>() + (block * heads + h) * features * BLOCK + offset;
        for (int64_t d = 0; d < features; ++d)
          for (int64_t i = 0; i < count; ++i) keys[d * BLOCK + i] = key[i * k.stride(0) + d];
        const Bits* value = v.data<Bits>() + n * v.stride(0) + h * v.stride(1);
        Bits* values = v_cache.data<Bits>() + ((block * heads + h) * BLOCK + offset) * value_features;
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(values + i * value_features, value + i * v.stride(0), value_features * sizeof(Bits));
      }
    }
  });
}

}  // namespace

void kv_append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot,
               int threads) {
  expect(k_cache.dim() == 4 && v_cache.dim() == 4, "the caches must have 4 dimensions");
  const DType dtype = k_cache.dtype();
  const int64_t blocks = k_cache.size(0), heads = k_cache.size(1), tokens = slot.dim() == 1 ? slot.size(0) : 0;
  expect_dense("k_cache", k_cache, dtype, {blocks, heads, k_cache.size(2), BLOCK});
  expect_dense("v_cache", v_cache, dtype, {blocks, heads, BLOCK, v_cache.size(3)});
  expect_dense("slot", slot, DType::i64, {tokens});
  const auto fits = [&](const Tensor& x, int64_t features) {
    return x.dtype() == dtype && x.dim() == 3 && x.dl.device.device_type == kDLCPU && x.size(0) == tokens &&
           x.size(1) == heads && x.size(2) == features && (features <= 1 || x.stride(2) == 1);
  };
  expect(fits(k, k_cache.size(2)), "k must be (N, Hkv, D) in the caches' dtype, dense along D");
  expect(fits(v, v_cache.size(3)), "v must be (N, Hkv, Dv) in the caches' dtype, dense along Dv");
  for (int64_t n = 0; n < tokens; ++n)
    expect(slot.data<int64_t>()[n] < blocks * BLOCK, "slot holds values beyond the cache");
  if (dtype == DType::f32)
    append<uint32_t>(k, v, k_cache, v_cache, slot, threads);
  else if (dtype == DType::bf16 || dtype == DType::f16)
    append<uint16_t>(k, v, k_cache, v_cache, slot, threads);
  else
    expect(false, "the caches must be float32, bfloat16 or float16");
}

}  // namespace flashpo
