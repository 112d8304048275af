#include "cuda_library.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flashpo {
namespace {

std::atomic<const CudaKernels*> loaded{nullptr};

}  // namespace

const CudaKernels& load_cuda_library(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto ask = reinterpret_cast<decltype(&flashpo_cuda_kernels)>(dlsym(library, "flashpo_cuda_kernels"));
  if (ask == nullptr) throw std::runtime_error(dlerror());
  const CudaKernels& kernels = *ask();
  if (std::strcmp(kernels.version, FLASHPO_VERSION) != 0)
    throw std::runtime_error("it is of FlashPO " + std::string(kernels.version) + ", flashpo._C of " FLASHPO_VERSION);
  loaded = &kernels;
  return kernels;
}

const CudaKernels& cuda_kernels() {
  const CudaKernels* kernels = loaded;
  if (kernels == nullptr) throw std::runtime_error("the CUDA kernels of FlashPO are not loaded");
  return *kernels;
}

}  // namespace flashpo
