// parallel_for(n, threads, body) calls body(begin, end) for `threads` contiguous parts of [0, n).
// together(threads, f) calls f() on this thread and keeps the others awake for each parallel_for inside of f.
#pragma once
#include <cstdint>

namespace flashpo {

using Body = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t n, int threads, Body body, void* context);
void together(int threads, void (*f)(void* context), void* context);

template <typename F>
static inline void parallel_for(int64_t n, int threads, F&& f) {
  parallel_for(
      n, threads, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &f);
}

template <typename F>
static inline void together(int threads, F&& f) {
  together(threads, [](void* context) { (*static_cast<F*>(context))(); }, &f);
}

}  // namespace flashpo
