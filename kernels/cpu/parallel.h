// Work shared over XLA's own intra-op threads, and per-thread scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "processor.h"
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

// Memory that will be read.
struct Stretch {
  const uint8_t* from = nullptr;
  int64_t bytes = 0;

  // Asks for the next few lines; false where none is left.
  bool ask() {
    constexpr int64_t kLine = 64, kFew = 8;
    if (bytes <= 0) return false;
    for (int64_t i = 0; i < kFew; i++) __builtin_prefetch(from + i * kLine, 0, 2);
    from += kFew * kLine, bytes -= kFew * kLine;
    return true;
  }
};

// One helper's part of a call, in the frame of that call.
struct Job {
  void (*run)(void* call, int thread);
  void* call;
  int thread;
  int processor;  // where the caller runs
  Stretch next;  // what this thread will read behind the call, as far as that is known
  std::atomic<bool> done;
};

// Where a helper looks for work. Waking a thread takes as long as a short product, so a helper
// stays awake for a moment behind its work and finds the next call's here. The memory would have
// nothing to do meanwhile: the helper asks for what it will read then.
class alignas(64) Seat {
 public:
  // Leaves a job here and sees to it that a helper comes; false where another call's job lies.
  bool offer(Job* job, xla::ffi::ThreadPool& pool) {
    Job* none = nullptr;
    if (!job_.compare_exchange_strong(none, job)) return false;
    if (taken_.exchange(true)) return true;
    // A pool that is full runs a task at once, on the caller, which cannot help itself.
    pool.Schedule([this, caller = std::this_thread::get_id()] {
      if (std::this_thread::get_id() == caller)
        taken_ = false;
      else
        serve();
    });
    return true;
  }

  // Takes a job back; false where a helper has begun it.
  bool withdraw(Job* job) { return job_.compare_exchange_strong(job, nullptr); }

 private:
  static constexpr std::chrono::microseconds kMoment{200};

  void serve() {
    Stretch next;
    do {
      auto leave = std::chrono::steady_clock::now() + kMoment;
      while (std::chrono::steady_clock::now() < leave) {
        Job* job = job_.load(std::memory_order_relaxed) ? job_.exchange(nullptr) : nullptr;
        if (!job) {
          if (!next.ask()) pause();
          continue;
        }
        processor_ = current_processor();
        if (processor_ == job->processor && processor_ >= 0) part_from(job->processor);
        job->run(job->call, job->thread);
        if (job->next.bytes) next = job->next;
        job->done.store(true, std::memory_order_release);  // the frame may be gone behind this
        leave = std::chrono::steady_clock::now() + kMoment;
      }
      processor_ = -1;
      taken_ = false;
    } while (job_.load() && !taken_.exchange(true));  // left here since the last look
  }

  void part_from(int caller);

  std::atomic<Job*> job_{nullptr};
  std::atomic<bool> taken_{false};
  std::atomic<int> processor_{-1};  // where a helper works
};

constexpr int kSeats = 255;

inline Seat& seat(int i) {
  static Seat seats[kSeats];
  return seats[i];
}

// A thread that is woken is often put on the processor of the one that wakes it. There they take
// turns of 4 ms, while another processor idles, until the system balances its load: such calls
// took a tenth of the time of decoding in short loops.
inline void Seat::part_from(int caller) {
  move_to_processor([&](int processor) {
    for (int i = 0; i < kSeats; i++)
      if (seat(i).processor_.load(std::memory_order_relaxed) == processor) return true;
    return processor == caller;
  });
  processor_ = current_processor();
}

// The first chunk of thread i's range.
inline int64_t range_start(int64_t chunks, int i, int threads) { return chunks * i / threads; }

// Calls before(), then body(first, last) over [0, count) in chunks, on the caller and on helpers.
//
// before() runs on the caller. Helpers are called first, and each calls meanwhile(i, begin),
// i = 0, 1, ... with where its range begins, until before() is done; so does the caller, once.
// next(thread, threads) is the Stretch that a helper asks for behind the call.
//
// Each thread has a contiguous range of its own and takes chunks of the others' once that
// is done: what a thread asks for ahead of its use is then what it uses next.
//
// The caller works like everyone else, then takes back what no helper has begun and waits
// only for those that have: it cannot deadlock, whatever else the pool runs.
template <class Body, class Before, class Meanwhile, class Next>
void parallel_for(ThreadPool& pool, int64_t count, int64_t chunk, const Body& body, const Before& before,
                  const Meanwhile& meanwhile, const Next& next) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int threads = static_cast<int>(std::min<int64_t>({pool.threads, chunks, kSeats + 1}));
  if (threads <= 1) {
    before();
    if (count > 0) body(0, count);
    return;
  }
  struct alignas(64) Thread {  // cache lines of its own
    std::atomic<int64_t> next;
    int64_t end;
    Job job;
  };
  std::vector<Thread> all(threads);
  for (int i = 0; i < threads; i++) {
    all[i].next = range_start(chunks, i, threads) * chunk;
    all[i].end = std::min(count, range_start(chunks, i + 1, threads) * chunk);
  }
  std::atomic<bool> ready{false};
  auto work = [&](int own) {
    const int64_t begin = all[own].next.load(std::memory_order_relaxed);
    for (int64_t i = 0; !ready.load(std::memory_order_acquire); i++) meanwhile(i, begin);
    for (int i = 0; i < threads; i++) {
      Thread& thread = all[(own + i) % threads];
      for (int64_t first; (first = thread.next.fetch_add(chunk)) < thread.end;)
        body(first, std::min(first + chunk, thread.end));
    }
  };
  const int processor = current_processor();
  for (int i = 1; i < threads; i++) {
    Job& job = all[i].job;
    job.run = [](void* call, int thread) { (*static_cast<decltype(work)*>(call))(thread); };
    job.call = &work, job.thread = i, job.processor = processor, job.next = next(i, threads), job.done = false;
    if (!seat(i - 1).offer(&job, pool.xla)) job.done = true;
  }
  meanwhile(0, 0);
  before();
  ready.store(true, std::memory_order_release);
  work(0);
  for (int i = 1; i < threads; i++) {
    Job& job = all[i].job;
    if (seat(i - 1).withdraw(&job)) continue;
    while (!job.done.load(std::memory_order_acquire)) pause();
  }
}

// The same with nothing before.
template <class Body>
void parallel_for(ThreadPool& pool, int64_t count, int64_t chunk, const Body& body) {
  parallel_for(pool, count, chunk, body, [] {}, [](int64_t, int64_t) {}, [](int, int) { return Stretch{}; });
}

// Memory of this thread that lives until the next call with the same slot and type.
template <class T>
T* scratch(int slot, int64_t count) {
  thread_local std::vector<T> memory[4];
  if (static_cast<int64_t>(memory[slot].size()) < count) memory[slot].resize(count);
  return memory[slot].data();
}

}  // namespace ternax
