// Teams of threads on OpenMP, which PyTorch's own kernels use too: one pool, no oversubscription.
#pragma once
#include <cstdint>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cellops::CELLOPS_ISA {

struct Team {
  int index, size;
  void barrier() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  // Whether `ok` holds for every member; meets at a barrier. `failed` is the team's, false at first.
  bool all(bool ok, bool* failed) const {
    if (!ok) __atomic_store_n(failed, true, __ATOMIC_RELAXED);
    barrier();
    return !__atomic_load_n(failed, __ATOMIC_RELAXED);
  }
  // Runs body on one member after the other, in their order.
  template <class Body>
  void in_order(const Body& body) const {
    for (int i = 0; i < size; ++i) {
      if (i == index) body();
      barrier();
    }
  }
  // The share [begin, end) of `count` items that falls to this member, in whole steps.
  void share(int64_t count, int64_t* begin, int64_t* end) const {
    *begin = count * index / size;
    *end = count * (index + 1) / size;
  }
};

// Runs body(Team) on `threads` threads at once; they may meet at team.barrier().
// A parallel region may be given fewer threads than asked for, so the team's size is read inside.
template <class Body>
inline void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Team{0, 1});
}

// Scratch memory of one call: aligned to a cache line, freed at the end of the scope. Where memory cannot be had,
// failed() says so and nothing may be touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void allocate(int64_t count) {
    count_ = count;
    if (count > 0) data_ = static_cast<T*>(aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64));
  }
  T* get() const { return data_; }
  int64_t count() const { return count_; }
  bool failed() const { return count_ > 0 && !data_; }
  void zero() const {
    if (count_ > 0) __builtin_memset(static_cast<void*>(data_), 0, size_t(count_) * sizeof(T));
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace cellops::CELLOPS_ISA
