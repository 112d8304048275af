// sample on the GPU: a block samples one row. The whole block runs sampling::draw, with the same numbers in every
// thread. Sums over the row are computed together, in a fixed order or in integers, so that runs agree bit for bit.
#undef NDEBUG  // makes <cassert> declare what assert() calls, in release builds too
#include "../sample.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <climits>
#include <type_traits>

#include "common.cuh"

namespace flashpo {
namespace {

using sampling::All;
using sampling::Kept;
using sampling::Ties;
using sampling::Weight;

constexpr int THREADS = 1024, WARPS = THREADS / 32, AHEAD = 8;  // AHEAD: loads in flight
// Chunks of the vocabulary; each lane handles SHARE of them
constexpr int SHARE = 4, CHUNKS = SHARE * 32;
constexpr int CANDIDATES = 8192, PIVOTS = 3;
constexpr double ONE = 1099511627776.0;  // 2^40: a weight of 1 in fixed point; 2^22 of them can be added
constexpr int64_t LARGEST_VOCABULARY = 1 << 22;
constexpr unsigned EVERYONE = 0xffffffffu;

struct Shared {
  float maximum[CHUNKS];
  double part[CHUNKS], of_warps[WARPS];
  unsigned long long mass[PIVOTS];
  int count[PIVOTS], candidates, first, last;
  float candidate[CANDIDATES];
};

__device__ float value(float x) { return x; }
__device__ float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float value(__half x) { return __half2float(x); }

// 2^y; 0 below fp32's normal numbers.
__device__ float power(float y) { return y < -126 ? 0 : exp2f(y); }

template <typename X>
__device__ X sum_of_warp(X x) {  // gives the same bits in every lane
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(EVERYONE, x, by);
  return x;
}
__device__ float max_of_warp(float x) {
  for (int by = 16; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(EVERYONE, x, by));
  return x;
}
// The sum over the lanes up to this one.
__device__ double scan_of_warp(double x) {
  for (int by = 1; by < 32; by *= 2) {
    const double before = __shfl_up_sync(EVERYONE, x, by);
    if (threadIdx.x % 32 >= by) x += before;
  }
  return x;
}

template <typename T>
class Row {
 public:
  static constexpr int PIVOTS = flashpo::PIVOTS, SHIFT = sizeof(T) == 4 ? 0 : std::is_same_v<T, __half> ? 13 : 16;
  const int64_t size;
  float top = -FLT_MAX, unit = 1;

  __device__ Row(const T* logits, int64_t size, Shared& shared)
      : size(size), logits(logits), length((size + CHUNKS - 1) / CHUNKS), s(shared) {}

  __device__ float at(int64_t i) const { return value(logits[i]); }
  __device__ float weight(float x) const { return power((x - top) * unit); }

  // Find `top`. Return the sum of all weights, as sums(All) in one pass; NaN or 0 if there is nothing to sample from.
  __device__ double begin() {
    for (int c = warp; c < CHUNKS; c += WARPS) {
      float highest = -FLT_MAX, sum = 0;
      for (int64_t i = c * length + lane; i < end_of(c); i += 32 * AHEAD) {
        float x[AHEAD], here = -INFINITY;
        for (int j = 0; j < AHEAD; ++j) {
          x[j] = i + 32 * j < end_of(c) ? at(i + 32 * j) : -INFINITY;
          here = fmaxf(here, x[j]);
        }
        if (here > highest) {
          sum *= power((highest - here) * unit);
          highest = here;
        }
        for (int j = 0; j < AHEAD; ++j) sum += power((x[j] - highest) * unit);
      }
      const float of_all = max_of_warp(highest);
      const double in_chunk = sum_of_warp(static_cast<double>(sum * power((highest - of_all) * unit)));
      if (lane == 0) s.maximum[c] = of_all, s.part[c] = in_chunk;
    }
    __syncthreads();
    for (int j = 0; j < SHARE; ++j) top = fmaxf(top, s.maximum[lane * SHARE + j]);
    top = max_of_warp(top);
    if (threadIdx.x < CHUNKS) s.part[threadIdx.x] *= weight(s.maximum[threadIdx.x]);
    __syncthreads();
    return sum_of_parts();
  }

  // Sum what `measure` gives for each logit. The sums of the chunks are kept for `locate`.
  template <typename Measure>
  __device__ double sums(Measure measure) {
    __syncthreads();
    for (int c = warp; c < CHUNKS; c += WARPS) {
      float sum = 0;
#pragma unroll AHEAD
      for (int64_t i = c * length + lane; i < end_of(c); i += 32) sum += measured(measure, at(i), i);
      const double in_chunk = sum_of_warp(static_cast<double>(sum));
      if (lane == 0) s.part[c] = in_chunk;
    }
    __syncthreads();
    return sum_of_parts();
  }

  // The first logit at which the cumulative sum exceeds `target`; never one for which `measure` gives 0.
  template <typename Measure>
  __device__ int64_t locate(Measure measure, double target) {
    double mine = 0;
    for (int j = 0; j < SHARE; ++j) mine += s.part[lane * SHARE + j];
    double sum = scan_of_warp(mine) - mine, before = 0, before_last = 0;  // each warp finds the chunk by itself
    int chunk = -1, last = -1;
    for (int j = 0; j < SHARE; ++j) {
      const double part = s.part[lane * SHARE + j];
      if (part > 0) {
        last = lane * SHARE + j, before_last = sum;
        if (chunk < 0 && sum + part > target) chunk = last, before = sum;
      }
      sum += part;
    }
    const unsigned exceed = __ballot_sync(EVERYONE, chunk >= 0), some = __ballot_sync(EVERYONE, last >= 0);
    const int from = exceed != 0 ? __ffs(exceed) - 1 : 31 - __clz(some);
    chunk = __shfl_sync(EVERYONE, exceed != 0 ? chunk : last, from);
    before = __shfl_sync(EVERYONE, exceed != 0 ? before : before_last, from);

    __syncthreads();
    if (threadIdx.x == 0) s.first = INT_MAX, s.last = -1;
    for (int64_t start = chunk * length; start < end_of(chunk); start += THREADS) {
      const int64_t i = start + threadIdx.x;
      const float here = i < end_of(chunk) ? measured(measure, at(i), i) : 0;
      double up_to = scan_of_warp(here);
      if (lane == 31) s.of_warps[warp] = up_to;
      __syncthreads();
      const double of_warp = s.of_warps[lane];
      up_to += before + sum_of_warp(lane < warp ? of_warp : 0.0);
      const unsigned exceeding = __ballot_sync(EVERYONE, here > 0 && up_to > target);
      const unsigned positive = __ballot_sync(EVERYONE, here > 0);
      const int begin = static_cast<int>(i) - lane;
      if (lane == 0 && exceeding != 0) atomicMin(&s.first, begin + __ffs(exceeding) - 1);
      if (lane == 0 && positive != 0) atomicMax(&s.last, begin + 31 - __clz(positive));
      before += sum_of_warp(of_warp);
      __syncthreads();
      if (s.first != INT_MAX) return s.first;
    }
    return s.last;  // because of rounding, the chunk's sum was larger
  }

  // From now on pivots lie between low and high. If few logits do, these are copied, in any order, and later passes
  // read only the copy.
  __device__ void unfocus() { candidates = -1; }
  __device__ void focus(float low, float high, Weight at_high, int64_t inside) {
    if (candidates >= 0 || inside > CANDIDATES) return;
    low = fmaxf(low, -FLT_MAX);
    __syncthreads();
    if (threadIdx.x == 0) s.candidates = 0;
    __syncthreads();
#pragma unroll AHEAD
    for (int64_t start = 0; start < size; start += THREADS) {
      const int64_t i = start + threadIdx.x;
      const float x = i < size ? at(i) : -INFINITY;
      const unsigned chosen = __ballot_sync(EVERYONE, x >= low && x < high);
      if (chosen == 0) continue;
      int place = lane == 0 ? atomicAdd(&s.candidates, __popc(chosen)) : 0;
      place = __shfl_sync(EVERYONE, place, 0) + __popc(chosen & ((1u << lane) - 1));
      if (chosen >> lane & 1) s.candidate[place] = x;
    }
    __syncthreads();
    candidates = s.candidates;
    above = at_high;
  }

  // The weights of all logits >= pivots[i]; the pivots increase with i.
  template <bool COUNTED>
  __device__ void weigh(const float* pivots, Weight* out) {
    float sum[PIVOTS] = {};
    int64_t mass[PIVOTS] = {};
    int count[PIVOTS] = {};
    const auto add = [&](float x, auto add_weight) {
      const float w = COUNTED ? 0 : weight(x);
      for (int p = 0; p < PIVOTS; ++p)
        if (x >= pivots[p]) count[p] += 1, add_weight(p, w);
    };
    if (candidates < 0) {
#pragma unroll AHEAD
      for (int64_t i = threadIdx.x; i < size; i += THREADS) add(at(i), [&](int p, float w) { sum[p] += w; });
      for (int p = 0; p < PIVOTS; ++p) mass[p] = static_cast<int64_t>(sum[p] * ONE);
    } else {
      for (int i = threadIdx.x; i < candidates; i += THREADS)
        add(s.candidate[i], [&](int p, float w) { mass[p] += static_cast<int64_t>(w * ONE); });
    }
    __syncthreads();
    if (threadIdx.x < PIVOTS) s.mass[threadIdx.x] = 0, s.count[threadIdx.x] = 0;
    __syncthreads();
    for (int p = 0; p < PIVOTS; ++p) {
      const auto of_warp = static_cast<unsigned long long>(sum_of_warp(mass[p]));
      const int counted = sum_of_warp(count[p]);
      if (lane == 0) atomicAdd(&s.mass[p], of_warp), atomicAdd(&s.count[p], counted);
    }
    __syncthreads();
    for (int p = 0; p < PIVOTS; ++p) {
      out[p].count = s.count[p] + (candidates < 0 ? 0 : above.count);
      out[p].mass = COUNTED ? out[p].count : s.mass[p] / ONE + (candidates < 0 ? 0 : above.mass);
    }
  }

 private:
  const T* logits;
  const int64_t length;  // of a chunk
  Shared& s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int candidates = -1;  // -1: none were copied
  Weight above{0, 0};   // the weight of the logits above the candidates

  __device__ int64_t end_of(int chunk) const { return min(size, (chunk + 1) * length); }
  __device__ double sum_of_parts() const {
    double sum = 0;
    for (int j = 0; j < SHARE; ++j) sum += s.part[lane * SHARE + j];
    return sum_of_warp(sum);
  }

  __device__ float measured(Ties ties, float x, int64_t) const { return x == ties.value ? 1 : 0; }
  __device__ float measured(Kept kept, float x, int64_t i) const {
    return x > kept.threshold || (x == kept.threshold && i < kept.limit) ? weight(x) : 0;
  }
};

__device__ void require(bool fine, const char* message) {
  if (!fine) __assert_fail(message, __FILE__, __LINE__, "sample");
}

template <typename T>
__global__ void __launch_bounds__(THREADS) sample_kernel(const T* logits, const sampling::Problem p) {
  __shared__ Shared shared;
  const int64_t r = blockIdx.x;
  if (threadIdx.x == 0) {
    require(sampling::fine_temperature(p.temperature[r]), sampling::TEMPERATURE);
    require(p.top_k == nullptr || p.top_k[r] >= 0, sampling::TOP_K);
    require(p.top_p == nullptr || sampling::is_share(p.top_p[r]), sampling::TOP_P);
    require(p.min_p == nullptr || sampling::is_share(p.min_p[r]), sampling::MIN_P);
  }
  Row<T> row(logits + r * p.stride, p.vocab, shared);
  const sampling::Drawn drawn = sampling::draw(row, p, r);
  if (threadIdx.x > 0) return;
  p.token[r] = drawn.token;
  p.numbers[r] = drawn.logprob;
  p.numbers[p.rows + r] = drawn.logprob_full;
  p.numbers[2 * p.rows + r] = drawn.kept_mass;
}

template <typename T>
void launch(const Tensor& logits, const sampling::Problem& p, int64_t stream) {
  sample_kernel<<<static_cast<unsigned>(p.rows), THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      logits.data<const T>(), p);
  cuda_check(cudaGetLastError());
}

}  // namespace

void sample_cuda(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                 const Tensor& min_p, const Tensor& seed, const Tensor& offset, const Tensor& token,
                 const Tensor& numbers, int64_t stream) {
  const sampling::Problem p =
      expect_sample(logits, temperature, top_k, top_p, min_p, seed, offset, token, numbers, kDLCUDA);
  expect(p.vocab <= LARGEST_VOCABULARY, "logits: too large a vocabulary");
  if (p.rows == 0) return;
  switch (logits.dtype()) {
    case DType::f32: return launch<float>(logits, p, stream);
    case DType::bf16: return launch<__nv_bfloat16>(logits, p, stream);
    default: return launch<__half>(logits, p, stream);
  }
}

}  // namespace flashpo
