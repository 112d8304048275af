#include <stdexcept>
#include <string>

#include "tensor.h"

namespace flashpo {

DType Tensor::dtype() const {
  if (dl.dtype.lanes != 1) return DType::other;
  switch (dl.dtype.code * 256 + dl.dtype.bits) {
    case kDLFloat * 256 + 64: return DType::f64;
    case kDLFloat * 256 + 32: return DType::f32;
    case kDLFloat * 256 + 16: return DType::f16;
    case kDLBfloat * 256 + 16: return DType::bf16;
    case kDLInt * 256 + 64: return DType::i64;
    case kDLInt * 256 + 32: return DType::i32;
    case kDLBool * 256 + 8: return DType::boolean;
    default: return DType::other;
  }
}

void expect(bool fine, const char* message) {
  if (!fine) throw std::invalid_argument(message);
}

void refuse_dtype(const char* name) {
  throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16");
}

void expect_dense(const char* name, const Tensor& x, DType dtype, std::initializer_list<int64_t> shape,
                  bool optional, DLDeviceType device) {
  if (!x.defined()) {
    if (optional) return;
    throw std::invalid_argument(std::string(name) + " must be a tensor, got None");
  }
  bool fine = x.dtype() == dtype && x.dim() == static_cast<int>(shape.size()) && x.dl.device.device_type == device;
  int64_t elements = 1;
  for (const int64_t wanted : shape) elements *= wanted;
  int64_t stride = 1;
  for (int i = x.dim() - 1; fine && i >= 0; --i) {
    const int64_t wanted = shape.begin()[i];
    fine = x.size(i) == wanted && (wanted == 1 || elements == 0 || x.stride(i) == stride);
    stride *= wanted;
  }
  if (!fine) throw std::invalid_argument(std::string(name) + " has the wrong dtype, shape, strides or device");
}

}  // namespace flashpo
