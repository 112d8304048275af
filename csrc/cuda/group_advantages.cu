// group_advantages on a GPU: one launch of one block. Each thread takes every 1024th row, so 65,536 rows are 64 steps
// of a pass. A grid would need a barrier of all blocks after each pass, and batches are seldom that large.
#undef NDEBUG  // makes <cassert> declare what assert() calls, in release builds too
#include <cassert>

#include "../group_advantages.h"
#include "common.cuh"

namespace flashpo {
namespace {

struct Block {
  static constexpr bool IN_ORDER = false;
  __device__ int64_t rank() const { return threadIdx.x; }
  __device__ int64_t size() const { return blockDim.x; }
  __device__ void wait() const { __syncthreads(); }
  __device__ int32_t claim(int32_t* slot, int32_t row) const { return atomicCAS(slot, advantages::FREE, row); }
  __device__ int32_t count(int32_t* n) const { return atomicAdd(n, 1); }
  __device__ void add(int64_t* sum, int64_t x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(x));
  }
  __device__ void add(int32_t* sum, int32_t x) const { atomicAdd(sum, x); }
  __device__ void lower(int32_t* least, int32_t x) const { atomicMin(least, x); }
  __device__ void raise(int32_t* most, int32_t x) const { atomicMax(most, x); }
  __device__ void require(bool fine, const char* message) const {
    if (!fine) __assert_fail(message, __FILE__, __LINE__, "group_advantages");
  }
};

template <bool NORMALIZE_FIRST>
__global__ void __launch_bounds__(1024) kernel(const advantages::Problem p) {
  advantages::Run<Block, NORMALIZE_FIRST>{p, {}}();
}

}  // namespace

void group_advantages_cuda(const advantages::Problem& p, bool normalize_first, int64_t stream) {
  const int threads = p.rows >= 1024 ? 1024 : static_cast<int>((p.rows + 31) / 32 * 32);
  (normalize_first ? kernel<true> : kernel<false>)<<<1, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(p);
  cuda_check(cudaGetLastError());
}

}  // namespace flashpo
