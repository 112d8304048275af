// The CUDA kernels are a shared library of their own, so that flashpo._C is the same with and without them.
#pragma once
#include "ops.h"

namespace flashpo {

// What the library hands over. Only a library of the same version has these members in this order; the first one is
// where it is in every version.
struct CudaKernels {
  const char* version;  // of FlashPO
  int architecture;     // the oldest that there are kernels for: 80 stands for sm_80
  decltype(&gae_fwd_cuda) gae_fwd;
  decltype(&gae_whiten_cuda) gae_whiten;
  decltype(&group_advantages_cuda) group_advantages;
  decltype(&sample_cuda) sample;
};

// Loads the library for the rest of the process. It needs neither a GPU nor a driver. Throws std::runtime_error, with
// the reason, where this file is no such library or one of another version.
const CudaKernels& load_cuda_library(const char* path);

// Those of the library that was loaded; throws std::runtime_error where none was.
const CudaKernels& cuda_kernels();

}  // namespace flashpo

extern "C" const flashpo::CudaKernels* flashpo_cuda_kernels();  // the one function that the library exports
