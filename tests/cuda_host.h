// Runs the bodies of csrc/cuda on the CPU: grid, blocks, threads, shared memory and barriers, one thread at a time.
//
// The threads of a block are contexts of one CPU thread that take turns: each runs to its next barrier, then the next
// one does. Shared memory is NaN when a block begins. What depends on the order of threads between two barriers shows
// when they run in the opposite order (`set_reversed`).
#pragma once
#include <ucontext.h>

#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../csrc/cuda/block.h"

namespace cellops::CELLOPS_ISA {

inline bool& reversed() {
  static bool value = false;
  return value;
}

// The threads of a block that is running.
class HostThreads {
 public:
  static constexpr size_t kStack = 64 << 10;

  HostThreads(int threads, int64_t shared_bytes)
      : shared_(shared_bytes / 4 + 4), values_(threads), contexts_(threads), stacks_(threads), done_(threads) {
    for (auto& stack : stacks_) stack.reset(new char[kStack]);
  }

  template <class Body>
  void run(uint32_t index, const Body& body);

  // To the scheduler, which comes back when every other thread has reached a barrier too.
  void wait() { swapcontext(&contexts_[current_], &scheduler_); }

  int current_ = 0;
  uint32_t index_ = 0;
  std::vector<float> shared_, values_;

 private:
  void start(std::function<void()> entry) {
    const int count = int(contexts_.size());
    entry_ = std::move(entry);
    active() = this;
    for (int i = 0; i < count; ++i) {
      done_[i] = false;
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get();
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &scheduler_;
      makecontext(&contexts_[i], run_current, 0);
    }
    for (int finished = 0; finished < count;) {
      finished = 0;
      for (int i = 0; i < count; ++i) {
        current_ = reversed() ? count - 1 - i : i;
        if (!done_[current_]) swapcontext(&scheduler_, &contexts_[current_]);
        finished += done_[current_];
      }
      if (failure_) std::rethrow_exception(failure_);
      if (finished != 0 && finished != count) throw std::logic_error("threads of a block part at a barrier");
    }
  }
  static HostThreads*& active() {
    static HostThreads* threads = nullptr;
    return threads;
  }
  static void run_current() {
    HostThreads* threads = active();
    try {
      threads->entry_();
    } catch (...) {
      threads->failure_ = std::current_exception();
    }
    threads->done_[threads->current_] = true;
  }

  std::function<void()> entry_;
  std::exception_ptr failure_;
  ucontext_t scheduler_;
  std::vector<ucontext_t> contexts_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<char> done_;
};

struct HostBlock {
  HostThreads* threads;
  int thread() const { return threads->current_; }
  uint32_t index() const { return threads->index_; }
  void sync() const { threads->wait(); }
  template <class T>
  T* shared() const {
    const auto address = (reinterpret_cast<uintptr_t>(threads->shared_.data()) + 15) / 16 * 16;
    return reinterpret_cast<T*>(address);
  }
  char* own(void* address) const { return static_cast<char*>(address); }
  float get(const char* own, int32_t byte) const { return *reinterpret_cast<const float*>(own + byte); }
  void set(char* own, int32_t byte, float value) const { *reinterpret_cast<float*>(own + byte) = value; }
  float sum(float value, int count) const {
    const int self = thread();
    threads->values_[self] = value;
    sync();
    float total = 0;
    for (int i = 0; i < count; ++i) total += threads->values_[self / count * count + i];
    sync();
    return total;
  }
  void add(float* to, float value) const { *to += value; }
  void add(int64_t* to, int64_t value) const { *to = int64_t(uint64_t(*to) + uint64_t(value)); }
  void put(int64_t* to, int64_t value) const { *to = value; }
  void add4(float* to, const float* values) const {
    if (reinterpret_cast<uintptr_t>(to) % 16) throw std::logic_error("an addition of 16 bytes is not aligned");
    for (int i = 0; i < 4; ++i) to[i] += values[i];
  }
};

template <class Body>
void HostThreads::run(uint32_t index, const Body& body) {
  index_ = index;
  std::memset(shared_.data(), 0xff, shared_.size() * sizeof(float));
  if constexpr (Body::kBarriers) {
    start([this, &body] { body(HostBlock{this}); });
  } else {
    for (int i = 0; i < Body::kThreads; ++i) {
      current_ = reversed() ? Body::kThreads - 1 - i : i;
      body(HostBlock{this});
    }
  }
}

// Stands in for the launcher of csrc/cuda/launch.h.
struct HostLauncher {
  template <class Body>
  void run(int64_t blocks, int64_t shared_bytes, const Body& body) const {
    HostThreads threads(Body::kThreads, shared_bytes);
    for (int64_t i = 0; i < blocks; ++i) threads.run(uint32_t(reversed() ? blocks - 1 - i : i), body);
  }
};

}  // namespace cellops::CELLOPS_ISA
