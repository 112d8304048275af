// What kernels share whose threads each have memory of their own and take the next piece of work when they are free.
#pragma once
#include <atomic>
#include <vector>

#include "../tensor.h"
#include "parallel.h"
#include "tree_math.h"

namespace flashpo::FLASHPO_ISA {

// Memory for floats, part by part out of a scratch tensor; without one, it counts how much is needed.
class Arena {
 public:
  explicit Arena(float* p = nullptr) : p_(p) {}
  float* take(int64_t count) {
    float* const part = p_ != nullptr ? p_ + used_ : nullptr;
    used_ += round_up(count, LANES);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* p_;
  int64_t used_ = 0;
};

// (tokens, heads, features)
template <typename T>
struct Array {
  const T* p;
  int64_t token, head;  // strides
  explicit Array(const Tensor& x) : p(x.data<const T>()), token(x.stride(0)), head(x.stride(1)) {}
  const T* at(int64_t i, int64_t h) const { return p + i * token + h * head; }
};

// f(i, thread) for all i < n: whichever thread is free takes the next.
template <typename F>
static inline void take_turns(int64_t n, int threads, F&& f) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t begin, int64_t stop) {
    for (int64_t thread = begin; thread < stop; ++thread)
      for (int64_t i; (i = next.fetch_add(1)) < n;) f(i, thread);
  });
}

// A worker for each thread.
template <typename Worker, typename... Arguments>
std::vector<Worker> crew(Arena& arena, int threads, const Arguments&... arguments) {
  std::vector<Worker> workers;
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i) workers.emplace_back(arena, arguments...);
  return workers;
}

}  // namespace flashpo::FLASHPO_ISA
