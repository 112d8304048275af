// Borrows the OpenMP pool that torch has loaded (looked up at run time, never linked): torch's idle workers spin for
// milliseconds after a GEMM, and a second pool would fight them for the cores. Without one, or in a forked child,
// where libgomp's pool is gone, threads are started for the call.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace flashpo {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> in_forked_child{false};

GompParallel find_gomp() {
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

struct Work {
  int64_t n;
  int parts;
  Body body;
  void* context;
  std::atomic<int> next{0};

  void run() {
    for (int part; (part = next.fetch_add(1)) < parts;) body(context, n * part / parts, n * (part + 1) / parts);
  }
};

}  // namespace

void parallel_for(int64_t n, int threads, Body body, void* context) {
  if (n <= 0) return;
  const int parts = static_cast<int>(std::min<int64_t>(n, std::max(threads, 1)));
  if (parts == 1) return body(context, 0, n);
  Work work{n, parts, body, context};
  static const GompParallel gomp = find_gomp();
  if (gomp != nullptr && !in_forked_child) {
    gomp([](void* w) { static_cast<Work*>(w)->run(); }, &work, parts, 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < parts; ++i) others.emplace_back([&work] { work.run(); });
  work.run();
  for (auto& thread : others) thread.join();
}

}  // namespace flashpo
