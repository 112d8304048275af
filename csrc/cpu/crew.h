// For kernels whose threads each have their own memory and take the next piece of work when they are free.
#pragma once
#include <atomic>
#include <vector>

#include "../tensor.h"
#include "parallel.h"
#include "tree_math.h"

namespace flashpo::FLASHPO_ISA {

// Hands out memory for floats from a scratch tensor. Without a tensor it only counts how much is needed.
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

// A view of a (tokens, heads, features) tensor.
template <typename T>
struct Array {
  const T* p;
  int64_t token, head;  // strides
  explicit Array(const Tensor& x) : p(x.data<const T>()), token(x.stride(0)), head(x.stride(1)) {}
  const T* at(int64_t i, int64_t h) const { return p + i * token + h * head; }
};

// Call f(i, thread) for all i < n; a free thread takes the next i.
template <typename F>
static inline void take_turns(int64_t n, int threads, F&& f) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t begin, int64_t stop) {
    for (int64_t thread = begin; thread < stop; ++thread)
      for (int64_t i; (i = next.fetch_add(1)) < n;) f(i, thread);
  });
}

// Make one worker per thread.
template <typename Worker, typename... Arguments>
std::vector<Worker> crew(Arena& arena, int threads, const Arguments&... arguments) {
  std::vector<Worker> workers;
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i) workers.emplace_back(arena, arguments...);
  return workers;
}

}  // namespace flashpo::FLASHPO_ISA
