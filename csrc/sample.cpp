#include "sample.h"

#include "ops.h"

namespace flashpo {

sampling::Problem expect_sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& offset,
                                const Tensor& token, const Tensor& numbers, DLDeviceType device) {
  const DType dtype = logits.dtype();
  expect(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
         "logits must be float32, bfloat16 or float16");
  expect(logits.dim() == 2 && logits.dl.device.device_type == device && (logits.size(1) == 1 || logits.stride(1) == 1),
         "logits must be (B, V), dense along V");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  expect(vocab > 0 && vocab < INT32_MAX, "logits must have a vocabulary of 1 to 2^31 - 2 entries");
  expect_dense("temperature", temperature, DType::f32, {rows}, false, device);
  expect_dense("top_k", top_k, DType::i64, {rows}, true, device);
  expect_dense("top_p", top_p, DType::f32, {rows}, true, device);
  expect_dense("min_p", min_p, DType::f32, {rows}, true, device);
  expect_dense("seed", seed, DType::i64, {rows}, false, device);
  expect_dense("offset", offset, DType::i64, {rows}, false, device);
  expect_dense("token", token, DType::i64, {rows}, false, device);
  expect_dense("numbers", numbers, DType::f32, {3, rows}, false, device);
  return {rows,
          vocab,
          logits.stride(0),
          temperature.data<const float>(),
          top_k.data<const int64_t>(),
          top_p.data<const float>(),
          min_p.data<const float>(),
          seed.data<const int64_t>(),
          offset.data<const int64_t>(),
          token.data<int64_t>(),
          numbers.data<float>()};
}

}  // namespace flashpo
