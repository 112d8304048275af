// gae on the GPU: a block scans a sequence from its end, tile by tile; whitening is a second launch.
//
// A token is a step from the state after it to its own. It turns the advantage x after it into b + a x, where a = 1 and
// b = 0 if it is masked. A live token also replaces the value by its own. Steps can be composed, so they are scanned in
// parallel. Everything is added in a fixed order, so the results do not change from run to run.
#include <algorithm>

#include "common.cuh"

namespace flashpo {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, ITEMS = 4, TILE = THREADS * ITEMS;
constexpr unsigned ALL = 0xffffffffu;

struct Values {  // the first live value of some consecutive tokens
  float value;
  bool found;
};
struct Steps {  // in fp64, because a factor of 0.999 rounded to fp32 is off by 1e-5 after a thousand tokens
  double a, b;
};
__device__ Values operator+(Values x, Values later) { return x.found ? x : later; }
__device__ Steps operator+(Steps x, Steps later) { return {x.a * later.a, x.b + x.a * later.b}; }

__device__ Values down(Values x, int by) {
  return {__shfl_down_sync(ALL, x.value, by), __shfl_down_sync(ALL, static_cast<int>(x.found), by) != 0};
}
__device__ Steps down(Steps x, int by) { return {__shfl_down_sync(ALL, x.a, by), __shfl_down_sync(ALL, x.b, by)}; }

// Combine everything after this thread's part, up to `carry`. Then `carry` becomes everything from the block's first
// part.
template <typename T>
__device__ T after(T mine, T nothing, T& carry, T* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T from_here = mine;
  for (int by = 1; by < 32; by *= 2) {
    const T later = down(from_here, by);
    if (lane + by < 32) from_here = from_here + later;
  }
  T rest = down(from_here, 1);
  if (lane == 31) rest = nothing;
  if (lane == 0) of_warps[warp] = from_here;
  __syncthreads();
  T outside = carry;
  for (int w = WARPS - 1; w > warp; --w) outside = of_warps[w] + outside;
  rest = rest + outside;
  for (int w = warp; w >= 0; --w) outside = of_warps[w] + outside;
  carry = outside;
  return rest;
}

struct Moments {  // merged by the update of Chan et al.
  double n, mean, squares;
};
__device__ Moments operator+(Moments x, Moments y) {
  if (x.n == 0) return y;
  if (y.n == 0) return x;
  const double n = x.n + y.n, difference = y.mean - x.mean, share = y.n / n;
  return {n, x.mean + difference * share, x.squares + y.squares + difference * difference * x.n * share};
}
__device__ Moments down(Moments x, int by) {
  return {__shfl_down_sync(ALL, x.n, by), __shfl_down_sync(ALL, x.mean, by), __shfl_down_sync(ALL, x.squares, by)};
}

// The sum over the block; valid in its first thread.
__device__ Moments sum(Moments mine, Moments* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const Moments other = down(mine, by);
    if (lane + by < 32) mine = mine + other;
  }
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < WARPS; ++w) mine = mine + of_warps[w];
  return mine;
}

struct Rows {
  const float *rewards, *values;
  const uint8_t* mask;
  int64_t rewards_stride, values_stride, mask_stride, length;
  const int64_t* starts;  // of flat sequences; null if each sequence is a row
};

__global__ void __launch_bounds__(THREADS) gae_kernel(Rows rows, double gamma, double decay, float* advantages,
                                                      float* returns, double* moments) {
  // Between two writes of one of these arrays there is always the barrier in the use of the other
  __shared__ Values values_of_warps[WARPS];
  __shared__ Steps steps_of_warps[WARPS];
  __shared__ Moments moments_of_warps[WARPS];
  const int64_t sequence = blockIdx.x, row = rows.starts ? 0 : sequence;
  const int64_t start = rows.starts ? rows.starts[sequence] : 0;
  const int64_t tokens = rows.starts ? rows.starts[sequence + 1] - start : rows.length;
  const float* rewards = rows.rewards + row * rows.rewards_stride + start;
  const float* values = rows.values + row * rows.values_stride + start;
  const uint8_t* mask = rows.mask + row * rows.mask_stride + start;
  advantages += row * rows.length + start;
  returns += row * rows.length + start;

  const Values no_value{0, false};
  const Steps no_step{1, 0};
  Values value_after = no_value;
  Steps step_after{0, 0};
  double n = 0, centre = 0, total = 0, squares = 0;  // of this thread's advantages, relative to its first one
  for (int64_t tile = (tokens - 1) / TILE * TILE; tile >= 0; tile -= TILE) {
    const int64_t begin = tile + threadIdx.x * ITEMS;
    bool live[ITEMS];
    float v[ITEMS];
    double r[ITEMS];
    Values mine = no_value;
    for (int i = ITEMS - 1; i >= 0; --i) {
      const int64_t t = begin + i;
      live[i] = t < tokens && mask[t] != 0;
      r[i] = live[i] ? rewards[t] : 0;
      v[i] = live[i] ? values[t] : 0;
      mine = Values{v[i], live[i]} + mine;
    }
    Values next = after(mine, no_value, value_after, values_of_warps);
    Steps steps = no_step;
    for (int i = ITEMS - 1; i >= 0; --i) {
      if (!live[i]) continue;
      r[i] += gamma * next.value - v[i];  // r[i] is now delta
      next.value = v[i];
      steps = Steps{decay, r[i]} + steps;
    }
    double advantage_after = after(steps, no_step, step_after, steps_of_warps).b;
    for (int i = ITEMS - 1; i >= 0; --i) {
      const int64_t t = begin + i;
      float advantage = 0;
      if (live[i]) {
        advantage_after = r[i] + decay * advantage_after;
        advantage = static_cast<float>(advantage_after);
        if (n == 0) centre = advantage;
        const double deviation = advantage - centre;
        n += 1;
        total += deviation;
        squares += deviation * deviation;
      }
      if (t < tokens) {
        advantages[t] = advantage;
        returns[t] = live[i] ? static_cast<float>(advantage_after + v[i]) : 0;
      }
    }
  }
  if (moments == nullptr) return;
  const double mean = n > 0 ? total / n : 0;
  const Moments all = sum({n, centre + mean, max(squares - total * mean, 0.0)}, moments_of_warps);
  if (threadIdx.x == 0) {
    moments += 3 * sequence;
    moments[0] = all.n, moments[1] = all.mean, moments[2] = all.squares;
  }
}

__global__ void __launch_bounds__(THREADS) whiten_kernel(float* x, const uint8_t* mask, int64_t tokens,
                                                         const double* moments, int64_t parts, double eps) {
  __shared__ Moments of_warps[WARPS];
  __shared__ double mean, scale;
  Moments mine{0, 0, 0};
  for (int64_t i = threadIdx.x; i < parts; i += THREADS)
    mine = mine + Moments{moments[3 * i], moments[3 * i + 1], moments[3 * i + 2]};
  mine = sum(mine, of_warps);
  if (threadIdx.x == 0) {
    mean = mine.mean;
    scale = 1 / sqrt(mine.squares / max(mine.n - 1, 1.0) + eps);
  }
  __syncthreads();
  for (int64_t t = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; t < tokens;
       t += static_cast<int64_t>(gridDim.x) * THREADS)
    x[t] = mask[t] ? static_cast<float>((x[t] - mean) * scale) : 0;
}

}  // namespace

void gae_fwd_cuda(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,
                  double gamma, double lam, const Tensor& advantages, const Tensor& returns, const Tensor& moments,
                  int64_t stream) {
  const int64_t sequences = expect_gae(rewards, values, mask, cu_seqlens, advantages, returns, moments, kDLCUDA);
  const int64_t length = rewards.size(1);
  if (sequences == 0) return;
  const Rows in{rewards.data<const float>(), values.data<const float>(), mask.data<const uint8_t>(),
                rewards.stride(0), values.stride(0), mask.stride(0), length, cu_seqlens.data<const int64_t>()};
  gae_kernel<<<sequences, THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      in, gamma, gamma * lam, advantages.data<float>(), returns.data<float>(), moments.data<double>());
  cuda_check(cudaGetLastError());
}

void gae_whiten_cuda(const Tensor& advantages, const Tensor& mask, const Tensor& moments, double eps, int64_t stream) {
  const int64_t tokens = advantages.size(0), parts = moments.size(0);
  expect_dense("advantages", advantages, DType::f32, {tokens}, false, kDLCUDA);
  expect_dense("mask", mask, DType::boolean, {tokens}, false, kDLCUDA);
  expect_dense("moments", moments, DType::f64, {parts, 3}, false, kDLCUDA);
  if (tokens == 0) return;
  const int64_t blocks = std::min<int64_t>((tokens + TILE - 1) / TILE, 2048);
  whiten_kernel<<<blocks, THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      advantages.data<float>(), mask.data<const uint8_t>(), tokens, moments.data<const double>(), parts, eps);
  cuda_check(cudaGetLastError());
}

}  // namespace flashpo
