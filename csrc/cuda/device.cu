// What the CUDA driver says of a device: for `flashpo doctor` and for choosing tiles by shared memory.
#include "common.cuh"

namespace flashpo {

CudaDevice cuda_device(int index) {
  CudaDevice device{};
  const auto ask = [&](cudaDeviceAttr attribute, int& into) {
    cuda_check(cudaDeviceGetAttribute(&into, attribute, index));
  };
  cuda_check(cudaDriverGetVersion(&device.driver));
  cuda_check(cudaRuntimeGetVersion(&device.runtime));
  ask(cudaDevAttrComputeCapabilityMajor, device.major);
  ask(cudaDevAttrComputeCapabilityMinor, device.minor);
  ask(cudaDevAttrMultiProcessorCount, device.multiprocessors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_memory_per_block);
  return device;
}

}  // namespace flashpo
