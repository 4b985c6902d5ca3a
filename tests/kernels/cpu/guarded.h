// Memory in which every byte outside a buffer is out of bounds, and a stand-in for XLA's pool.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__has_feature)
#define TERNAX_HAS(feature) __has_feature(feature)
#else
#define TERNAX_HAS(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || TERNAX_HAS(address_sanitizer)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

// Where a buffer lies. XLA aligns its own to 64 bytes and rounds their size up, which would
// hide a short overread; nothing in the kernels may need either.
enum Place {
  kFront,  // right behind a forbidden page, poisoned after its last byte
  kBack,   // its last byte right before a forbidden page: an address as odd as its size
  kOdd,    // between poisoned bytes, at an odd multiple of its element
  kPlaces
};

// One buffer at a time. Poison stops what ASan instruments, plain loads and stores; forbidden
// pages stop the rest as well: masked loads, which GCC's ASan does not look at.
class Guarded {
 public:
  Guarded() {
    char* all = static_cast<char*>(
        mmap(nullptr, kCapacity + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (all == MAP_FAILED || mprotect(all + kPage, kCapacity, PROT_READ | PROT_WRITE)) {
      std::perror("mmap");
      std::exit(2);
    }
    base_ = at_ = all + kPage;
    ASAN_POISON_MEMORY_REGION(base_, kCapacity);
  }
  Guarded(const Guarded&) = delete;

  // `bytes` bytes of which each element takes `element`; what was taken before is gone.
  char* take(int64_t bytes, int64_t element, Place place) {
    if (bytes > kCapacity - 2 * kMargin * 8) {
      std::fprintf(stderr, "no room for a buffer of %lld bytes\n", static_cast<long long>(bytes));
      std::exit(2);
    }
    ASAN_POISON_MEMORY_REGION(at_, bytes_);
    odd_ = (odd_ + 2) % kMargin;
    at_ = base_;
    if (place == kBack) at_ += kCapacity - bytes;
    if (place == kOdd) at_ += (odd_ + 1) * element;
    bytes_ = bytes;
    mark_beside();
    ASAN_UNPOISON_MEMORY_REGION(at_, bytes_);
    return at_;
  }

  // Whether the bytes beside the buffer are as take() left them: stores through a mask.
  __attribute__((no_sanitize_address)) bool intact() const {
    bool same = true;
    for (volatile char* c = before(); c < at_; c++) same &= *c == kMark;
    for (volatile char* c = at_ + bytes_; c < after(); c++) same &= *c == kMark;
    return same;
  }

 private:
  static constexpr int64_t kPage = 1 << 16, kCapacity = 16 << 20, kMargin = 64;
  static constexpr char kMark = 0x5a;

  char* before() const { return std::max(base_, at_ - kMargin); }
  char* after() const { return std::min(base_ + kCapacity, at_ + bytes_ + kMargin); }
  // Volatile: as a call of memset this would be looked at after all.
  __attribute__((no_sanitize_address)) void mark_beside() {
    for (volatile char* c = before(); c < at_; c++) *c = kMark;
    for (volatile char* c = at_ + bytes_; c < after(); c++) *c = kMark;
  }

  char* base_;
  char* at_;
  int64_t bytes_ = 0, odd_ = 0;
};

// What the handlers know of XLA's pool: Schedule. XLA promises nothing about when a task
// runs, so all three ways must do.
class Pool {
 public:
  enum Mode {
    kThreads,  // on other threads, soon
    kInline,   // before Schedule returns
    kLate,     // after the handler has returned: its frame is gone
    kModes
  };

  explicit Pool(int threads) {
    api_.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api_.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) {
      reinterpret_cast<Pool*>(args->ctx)->schedule({args->task, args->data});
      return static_cast<XLA_FFI_Error*>(nullptr);
    };
    for (int i = 0; i < threads; i++) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Runs `call(xla's pool)` on a thread of its own, so that its scratch memory starts empty
  // and an index past what this call asked for is past the end.
  template <class Call>
  void run(Mode mode, const Call& call) {
    mode_ = mode;
    std::thread([&] {
      xla::ffi::DiagnosticEngine diagnostic;
      auto* context = reinterpret_cast<XLA_FFI_ExecutionContext*>(this);
      call(*xla::ffi::CtxDecoding<xla::ffi::ThreadPool>::Decode(&api_, context, diagnostic));
    }).join();
    for (; !late_.empty(); late_.pop_front()) late_.front().run(late_.front().data);
  }

 private:
  struct Task {
    XLA_FFI_Task* run;
    void* data;
  };

  void schedule(Task task) {
    if (mode_ == kInline) return task.run(task.data);
    if (mode_ == kLate) return late_.push_back(task);
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(task);
    wake_.notify_one();
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Task task = queue_.front();
      queue_.pop_front();
      lock.unlock();
      task.run(task.data);
      lock.lock();
    }
  }

  XLA_FFI_Api api_{};
  Mode mode_ = kThreads;
  std::deque<Task> queue_, late_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};
