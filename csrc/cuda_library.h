// The CUDA kernels are in a separate shared library, so that flashpo._C is the same with and without them.
#pragma once
#include "ops.h"

namespace flashpo {

// What the library exports. Only in a library of the same version are all members in this order. The first member is at
// the same place in every version.
struct CudaKernels {
  const char* version;  // of FlashPO
  int architecture;     // the oldest architecture for which there are kernels; 80 stands for sm_80
  decltype(&gae_fwd_cuda) gae_fwd;
  decltype(&gae_whiten_cuda) gae_whiten;
  decltype(&group_advantages_cuda) group_advantages;
  decltype(&sample_cuda) sample;
};

// Load the library for the rest of the process. This needs neither a GPU nor a driver. Throws std::runtime_error with
// the reason if the file is no such library or belongs to another version.
const CudaKernels& load_cuda_library(const char* path);

// The kernels of the loaded library. Throws std::runtime_error if none is loaded.
const CudaKernels& cuda_kernels();

}  // namespace flashpo

extern "C" const flashpo::CudaKernels* flashpo_cuda_kernels();  // the only function that the library exports
