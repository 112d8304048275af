#include "ops.h"

namespace flashpo {

int64_t expect_gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,
                   const Tensor& advantages, const Tensor& returns, const Tensor& moments, DLDeviceType device) {
  const auto rows = [&](const Tensor& x, DType dtype) {
    return x.dtype() == dtype && x.dim() == 2 && x.dl.device.device_type == device &&
           (x.size(1) <= 1 || x.stride(1) == 1);
  };
  expect(rows(rewards, DType::f32), "rewards must be (B, T) float32, dense along T");
  const int64_t batch = rewards.size(0), length = rewards.size(1);
  const auto like_rewards = [&](const Tensor& x) { return x.size(0) == batch && x.size(1) == length; };
  expect(rows(values, DType::f32) && like_rewards(values), "values must look like rewards");
  expect(rows(mask, DType::boolean) && like_rewards(mask), "mask must look like rewards, in bool");
  expect_dense("advantages", advantages, DType::f32, {batch, length}, false, device);
  expect_dense("returns", returns, DType::f32, {batch, length}, false, device);
  const bool flat = cu_seqlens.defined();
  const int64_t sequences = flat ? cu_seqlens.size(0) - 1 : batch;
  expect_dense("moments", moments, DType::f64, {sequences, 3}, true, device);
  if (flat) {
    expect_dense("cu_seqlens", cu_seqlens, DType::i64, {sequences + 1}, false, device);
    expect(batch == 1, "flat tensors must be (1, N)");
  }
  return sequences;
}

}  // namespace flashpo
