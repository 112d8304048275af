// What the CUDA sources share.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

namespace flashpo {

inline void cuda_check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

}  // namespace flashpo
