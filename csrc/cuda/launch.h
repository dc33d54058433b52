// Launching bodies on the caller's device and stream. Included by .cu files alone.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "block.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int kMostSharedBytes = 66 << 10;  // that a launch asks for; what every GPU from sm_80 on has

inline void check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it would be the next launch's otherwise
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kBlocks) kernel(const Body body) {
  body(DeviceBlock{});
}

// Makes a device the current one of this thread until the end of the scope.
class Launcher {
 public:
  Launcher(const char* name, int device, void* stream) : name_(name), stream_(static_cast<cudaStream_t>(stream)) {
    check(name_, cudaGetDevice(&before_));
    if (device != before_) check(name_, cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~Launcher() {
    if (changed_) cudaSetDevice(before_);
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Blocks of Body::kThreads threads. Throws std::runtime_error where the launch fails.
  template <class Body>
  void run(int64_t blocks, int64_t shared_bytes, const Body& body) const {
    if (blocks == 0) return;
    // More than a kernel has without asking. As much for every launch: the limit is the kernel's, and threads may
    // launch it with other sizes at the same time.
    if (shared_bytes > 48 << 10) {
      check(name_, cudaFuncSetAttribute(kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes));
    }
    kernel<<<uint32_t(blocks), Body::kThreads, size_t(shared_bytes), stream_>>>(body);
    check(name_, cudaGetLastError());
  }

 private:
  const char* name_;
  cudaStream_t stream_;
  int before_ = 0;
  bool changed_ = false;
};

// Defines the entry point of a line of ops.inc: the template `launch` of the op's header, run on the caller's stream.
#define CELLOPS_CUDA_ENTRY(name, Params, Tensors)                                            \
  void name##_cuda(const Params& params, const Tensors& tensors, int device, void* stream) { \
    CELLOPS_ISA::name(params, tensors, CELLOPS_ISA::Launcher(#name, device, stream));        \
  }

}  // namespace cellops::CELLOPS_ISA
