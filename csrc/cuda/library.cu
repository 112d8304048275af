// What this library exports to flashpo._C.
#include "../cuda_library.h"

constexpr int ARCHITECTURES[] = {__CUDA_ARCH_LIST__};  // in ascending order; 800 stands for sm_80

extern "C" __attribute__((visibility("default"))) const flashpo::CudaKernels* flashpo_cuda_kernels() {
  static constexpr flashpo::CudaKernels kernels{
      FLASHPO_VERSION,           ARCHITECTURES[0] / 10,           &flashpo::gae_fwd_cuda,
      &flashpo::gae_whiten_cuda, &flashpo::group_advantages_cuda, &flashpo::sample_cuda};
  return &kernels;
}
