// Work shared over XLA's own intra-op threads, and per-thread scratch memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ternax {

struct ThreadPool {
  xla::ffi::ThreadPool& xla;
  int threads;  // the caller's own included
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls body(first, last) over [0, count) in chunks, on the caller and on helpers.
//
// The caller claims chunks like everyone else, then cancels helpers that have not begun
// and waits only for those that have: it cannot deadlock, whatever else the pool runs.
template <class Body>
void parallel_for(ThreadPool& pool, int64_t count, int64_t chunk, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t first; (first = next.fetch_add(chunk)) < count;)
      body(first, first + chunk < count ? first + chunk : count);
  };
  if (pool.threads <= 1 || count <= chunk) return work();
  enum State { kQueued, kRunning, kDone, kCancelled };
  using Flag = std::shared_ptr<std::atomic<int>>;
  std::vector<Flag> helpers;
  for (int i = 1; i < pool.threads; i++) {
    Flag flag = std::make_shared<std::atomic<int>>(kQueued);
    helpers.push_back(flag);
    // A cancelled helper may start after this frame is gone: it reads only its own flag.
    pool.xla.Schedule([flag, &work] {
      int queued = kQueued;
      if (!flag->compare_exchange_strong(queued, kRunning)) return;
      work();
      flag->store(kDone, std::memory_order_release);
    });
  }
  work();
  for (Flag& flag : helpers) {
    int queued = kQueued;
    if (flag->compare_exchange_strong(queued, kCancelled)) continue;
    while (flag->load(std::memory_order_acquire) != kDone) pause();
  }
}

// Memory of this thread that lives until the next call with the same slot and type.
template <class T>
T* scratch(int slot, int64_t count) {
  thread_local std::vector<T> memory[3];
  if (static_cast<int64_t>(memory[slot].size()) < count) memory[slot].resize(count);
  return memory[slot].data();
}

}  // namespace ternax
