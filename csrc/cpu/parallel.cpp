// Threads for the kernels come from the OpenMP pool that torch has loaded (looked up at run time, never linked).
// torch's idle workers spin for milliseconds after a GEMM, and a second pool would compete with them for the cores.
// Without such a pool, and in a forked child, where libgomp's pool no longer exists, threads are started for each call.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace flashpo {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> in_forked_child{false};

void relax() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

GompParallel find_gomp() {
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

struct Work {
  int64_t n;
  int parts;
  Body body;
  void* context;

  void run(int part) const { body(context, n * part / parts, n * (part + 1) / parts); }
};

// Run f(context) on this thread and, if they are available, on `threads` - 1 others at the same time.
void on_threads(int threads, void (*f)(void*), void* context) {
  static const GompParallel gomp = find_gomp();
  if (gomp != nullptr && !in_forked_child) return gomp(f, context, threads, 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(f, context);
  f(context);
  for (auto& thread : others) thread.join();
}

// Wait for a condition that another thread will soon make true. If it takes long, yield the core.
template <typename F>
void wait_until(F&& done) {
  for (int looks = 0; !done(); ++looks) {
    if (looks < 2000)
      relax();
    else
      std::this_thread::yield();
  }
}

// The threads of a `together`. One of them leads: it hands out work, takes part in it and waits for its end. The others
// look for parts to do. A thread takes a part by advancing `turn_`, which holds the number of the current work, the
// number of its parts and the number of those taken in one atomic value. A thread that succeeds therefore has a part of
// exactly that work, and the work cannot end before this part has.
class Team {
 public:
  Team(int threads, void (*f)(void*), void* context) : threads_(threads), f_(f), context_(context) {}

  void run() {
    leads = this;
    on_threads(threads_, [](void* team) { static_cast<Team*>(team)->join(); }, this);
    leads = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

  void share(const Work& work) {
    work_.store(&work, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    turn_.store(Turn{++works_, static_cast<uint16_t>(work.parts), 0}, std::memory_order_release);
    leads = nullptr;  // a parallel_for inside of the work must not use this team
    while (take_part()) {
    }
    wait_until([&] { return done_.load(std::memory_order_acquire) == work.parts; });
    leads = this;
  }

  static thread_local Team* leads;  // the team that this thread leads, if any

 private:
  void join() {
    if (leads != this) {
      for (bool took = true; took;)
        wait_until([&] { return (took = take_part()) || over_.load(std::memory_order_acquire); });
      return;
    }
    try {
      f_(context_);
    } catch (...) {
      error_ = std::current_exception();
    }
    over_.store(true, std::memory_order_release);
  }

  // Do a part; false if none is left. It must not throw, because the others count on every part.
  bool take_part() noexcept {
    Turn turn = turn_.load(std::memory_order_acquire), next;
    do {
      if (turn.taken == turn.parts) return false;
      next = turn;
      ++next.taken;
    } while (!turn_.compare_exchange_weak(turn, next));
    work_.load(std::memory_order_relaxed)->run(turn.taken);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  struct Turn {
    uint32_t work;
    uint16_t parts, taken;
  };
  static_assert(std::atomic<Turn>::is_always_lock_free);
  const int threads_;
  void (*const f_)(void*);
  void* const context_;
  std::atomic<const Work*> work_{nullptr};
  std::atomic<int> done_{0};
  std::atomic<Turn> turn_{Turn{0, 0, 0}};
  uint32_t works_ = 0;
  std::atomic<bool> over_{false};
  std::exception_ptr error_;
};

thread_local Team* Team::leads = nullptr;

}  // namespace

void parallel_for(int64_t n, int threads, Body body, void* context) {
  if (n <= 0) return;
  constexpr int64_t MOST = 1 << 15;  // parts; Team counts them in 16 bits
  const Work work{n, static_cast<int>(std::min({n, std::max<int64_t>(threads, 1), MOST})), body, context};
  if (work.parts == 1) return work.run(0);
  if (Team::leads != nullptr) return Team::leads->share(work);
  struct Shared {
    const Work& work;
    std::atomic<int> next{0};
  } shared{work};
  on_threads(
      work.parts,
      [](void* context) {
        auto& s = *static_cast<Shared*>(context);
        for (int part; (part = s.next.fetch_add(1)) < s.work.parts;) s.work.run(part);
      },
      &shared);
}

void together(int threads, void (*f)(void*), void* context) {
  if (threads <= 1 || Team::leads != nullptr) return f(context);
  Team(threads, f, context).run();
}

}  // namespace flashpo
