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

// Scratch memory of one call: aligned to a cache line, freed at the end of the scope.
// `failed` stays true where memory could not be had; callers check it before any thread starts.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : count_(count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  bool failed() const { return data_ == nullptr; }
  void zero() const { __builtin_memset(data_, 0, size_t(count_) * sizeof(T)); }

 private:
  T* data_;
  int64_t count_;
};

}  // namespace cellops::CELLOPS_ISA
