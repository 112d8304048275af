// A borrowed view of a torch tensor, as DLPack describes it. It uses neither pybind11 nor torch, because kernels
// include it.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "dlpack.h"

namespace flashpo {

enum class DType { f64, f32, bf16, f16, i64, i32, boolean, other };

struct Tensor {
  DLTensor dl{};         // data == nullptr and ndim == -1 mean None
  Tensor() { dl.ndim = -1; }

  bool defined() const { return dl.ndim >= 0; }
  int dim() const { return dl.ndim; }
  int64_t size(int i) const { return dl.shape[i < 0 ? i + dl.ndim : i]; }
  int64_t stride(int i) const { return dl.strides[i < 0 ? i + dl.ndim : i]; }  // in elements
  DType dtype() const;

  template <typename T>
  T* data() const {
    return defined() ? reinterpret_cast<T*>(static_cast<char*>(dl.data) + dl.byte_offset) : nullptr;
  }
};

// The checks of kernels' arguments. Each throws std::invalid_argument, which Python sees as ValueError. They are not
// inline: the linker must not keep a copy that was compiled for AVX-512 for every machine.
void expect(bool fine, const char* message);
// Check that `x` is a contiguous tensor of that dtype and shape; an undefined one is accepted if it is optional.
void expect_dense(const char* name, const Tensor& x, DType dtype, std::initializer_list<int64_t> shape,
                  bool optional = false, DLDeviceType device = kDLCPU);

[[noreturn]] void refuse_dtype(const char* name);

}  // namespace flashpo
