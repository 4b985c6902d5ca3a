// Work shared over XLA's own intra-op threads, and per-thread scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
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

// The first chunk of thread i's range.
inline int64_t range_start(int64_t chunks, int i, int threads) { return chunks * i / threads; }

// Calls before(), then body(first, last) over [0, count) in chunks, on the caller and on helpers.
//
// before() runs on the caller. Waking a helper takes as long as a short product, so helpers
// are woken first, and each calls meanwhile(i, begin), i = 0, 1, ... with where its range
// begins, until before() is done; so does the caller, once.
//
// Each thread has a contiguous range of its own and takes chunks of the others' once that
// is done: what a thread asks for ahead of its use is then what it uses next.
//
// The caller works like everyone else, then cancels helpers that have not begun and waits
// only for those that have: it cannot deadlock, whatever else the pool runs.
template <class Body, class Before, class Meanwhile>
void parallel_for(ThreadPool& pool, int64_t count, int64_t chunk, const Body& body, const Before& before,
                  const Meanwhile& meanwhile) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int threads = static_cast<int>(std::min<int64_t>(pool.threads, chunks));
  if (threads <= 1) {
    before();
    if (count > 0) body(0, count);
    return;
  }
  struct alignas(64) Range {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(threads);
  for (int i = 0; i < threads; i++) {
    ranges[i].next = range_start(chunks, i, threads) * chunk;
    ranges[i].end = std::min(count, range_start(chunks, i + 1, threads) * chunk);
  }
  std::atomic<bool> ready{false};
  auto work = [&](int own) {
    const int64_t begin = ranges[own].next.load(std::memory_order_relaxed);
    for (int64_t i = 0; !ready.load(std::memory_order_acquire); i++) meanwhile(i, begin);
    for (int i = 0; i < threads; i++) {
      Range& range = ranges[(own + i) % threads];
      for (int64_t first; (first = range.next.fetch_add(chunk)) < range.end;)
        body(first, std::min(first + chunk, range.end));
    }
  };
  enum State { kQueued, kRunning, kDone, kCancelled };
  using Flag = std::shared_ptr<std::atomic<int>>;
  std::vector<Flag> helpers;
  for (int i = 1; i < threads; i++) {
    Flag flag = std::make_shared<std::atomic<int>>(kQueued);
    helpers.push_back(flag);
    // A cancelled helper may start after this frame is gone: it reads only its own flag.
    // A pool that is full runs a task at once, on the caller, which cannot wait for itself.
    pool.xla.Schedule([flag, i, &work, caller = std::this_thread::get_id()] {
      if (std::this_thread::get_id() == caller) return;
      int queued = kQueued;
      if (!flag->compare_exchange_strong(queued, kRunning)) return;
      work(i);
      flag->store(kDone, std::memory_order_release);
    });
  }
  meanwhile(0, 0);
  before();
  ready.store(true, std::memory_order_release);
  work(0);
  for (Flag& flag : helpers) {
    int queued = kQueued;
    if (flag->compare_exchange_strong(queued, kCancelled)) continue;
    while (flag->load(std::memory_order_acquire) != kDone) pause();
  }
}

// The same with nothing before.
template <class Body>
void parallel_for(ThreadPool& pool, int64_t count, int64_t chunk, const Body& body) {
  parallel_for(pool, count, chunk, body, [] {}, [](int64_t, int64_t) {});
}

// Memory of this thread that lives until the next call with the same slot and type.
template <class T>
T* scratch(int slot, int64_t count) {
  thread_local std::vector<T> memory[4];
  if (static_cast<int64_t>(memory[slot].size()) < count) memory[slot].resize(count);
  return memory[slot].data();
}

}  // namespace ternax
