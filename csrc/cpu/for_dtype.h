#pragma once
#include "../tensor.h"
#include "isa.h"

namespace flashpo::FLASHPO_ISA {

// Call run(T{}), where T is the type of x's elements.
template <typename F>
static inline void for_dtype(const char* name, const Tensor& x, F&& run) {
  switch (x.dtype()) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(bf16{});
    case DType::f16: return run(f16{});
    default: refuse_dtype(name);
  }
}

}  // namespace flashpo::FLASHPO_ISA
