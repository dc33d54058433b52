// What a kernel's body sees of its block of threads, and how it moves numbers.
//
// A body is a struct of sizes and addresses with `template <class Block> operator()(const Block&) const`: what one
// thread does. It runs as it stands in a kernel (DeviceBlock, below) and on the CPU, where tests/cuda_host.h gives it a
// block whose threads take turns from one barrier to the next.
//
// Its kThreads are those of a block. With kBlocks, that many must fit on a multiprocessor: a limit on registers below
// which the compiler may take more than it would by itself, which keeps those of FReLU's bodies from spilling that sum
// up and makes others spill (nvcc 13.0); they have 0. kBarriers says whether a thread waits for others.
//
//   block.thread()         number of this thread in the block, below the body's kThreads
//   block.index()          number of the block
//   block.shared<T>()      the block's shared memory
//   block.own(address)     shared memory that this thread alone reads and writes until a barrier; its floats by their
//                          bytes from there are block.get(own, byte) and block.set(own, byte, value)
//   block.sync()           the barrier of all its threads
//   block.sum(value, n)    sum of the values of n neighbouring threads, n a power of two up to 32; for all of a warp
//   block.add(to, value)   an addition that other threads may do to the same number at the same time
//   block.put(to, value)   a store that may come between such additions
#pragma once
#include <cstdint>

#include <stdexcept>
#include <string>

#include "../cellops.h"
#include "../common/dtype.h"

#ifdef __CUDACC__
#define CELLOPS_BODY __device__ __forceinline__
#define CELLOPS_UNROLL _Pragma("unroll")
#define CELLOPS_PRAGMA(text) _Pragma(#text)
#define CELLOPS_UNROLL_BY(count) CELLOPS_PRAGMA(unroll count)
#else
#define CELLOPS_BODY inline
#define CELLOPS_UNROLL
#define CELLOPS_UNROLL_BY(count)
#endif

namespace cellops::CELLOPS_ISA {

// Elements that one thread moves at once: 16 bytes.
template <class T>
inline constexpr int kPack = 16 / int(sizeof(T));

struct alignas(16) Words {
  uint32_t word[4];
};

CELLOPS_BODY void unpack(const Words& words, const float*, float* to) {
  CELLOPS_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = bit_cast<float>(words.word[i]);
}
template <class T>
CELLOPS_BODY void unpack(const Words& words, const T*, float* to) {
  static_assert(sizeof(T) == 2);
  CELLOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = to_compute(T{uint16_t(words.word[i])});
    to[2 * i + 1] = to_compute(T{uint16_t(words.word[i] >> 16)});
  }
}

CELLOPS_BODY Words pack(const float*, const float* from) {
  Words words;
  CELLOPS_UNROLL
  for (int i = 0; i < 4; ++i) words.word[i] = bit_cast<uint32_t>(from[i]);
  return words;
}
template <class T>
CELLOPS_BODY Words pack(const T*, const float* from) {
  Words words;
  CELLOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    T low, high;
    from_compute(&low, from[2 * i]);
    from_compute(&high, from[2 * i + 1]);
    words.word[i] = uint32_t(low.bits) | uint32_t(high.bits) << 16;
  }
  return words;
}

// Count numbers, a multiple of kPack<T>, at an address that is a multiple of 16 bytes.
template <int Count, class T>
CELLOPS_BODY void load_packs(const T* from, float* to) {
  CELLOPS_UNROLL
  for (int i = 0; i < Count; i += kPack<T>) {
    const Words words = *reinterpret_cast<const Words*>(from + i);  // as a whole, or nvcc reads word by word
    unpack(words, from, to + i);
  }
}
template <int Count, class T>
CELLOPS_BODY void store_packs(T* to, const float* from) {
  CELLOPS_UNROLL
  for (int i = 0; i < Count; i += kPack<T>) *reinterpret_cast<Words*>(to + i) = pack(to, from + i);
}

template <class T>
CELLOPS_BODY void store_one(T* to, float value) {
  from_compute(to, value);
}

// Count neighbouring float32 additions at an address that is a multiple of 16 bytes.
template <int Count, class Block>
CELLOPS_BODY void add_packs(const Block& block, float* to, const float* values) {
  CELLOPS_UNROLL
  for (int i = 0; i < Count; i += 4) block.add4(to + i, values + i);
}

// Whether each address is a multiple of 16 bytes; null is.
template <class... Addresses>
inline bool aligned(Addresses... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

CELLOPS_BODY uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls work(T()) with T the storage type; the kernels have no float64.
template <class Work>
void with_storage_type(const char* name, Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::float32:
      return work(float());
    case Dtype::bfloat16:
      return work(bfloat16());
    case Dtype::float16:
      return work(float16());
    default:
      throw std::invalid_argument(std::string(name) + ": the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Division of numbers below 2^31 by one that is the same for all threads: a multiplication and a shift, where a
// division takes some twenty instructions.
struct Divisor {
  uint32_t value, multiplier, shift;
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor), multiplier(0), shift(0) {
    if (divisor > uint32_t(1) << 31) return;  // every quotient is 0
    while ((uint64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t(((uint64_t(1) << (31 + shift)) + divisor - 1) / divisor);
  }
  CELLOPS_BODY uint32_t quotient(uint32_t number) const {
#ifdef __CUDA_ARCH__
    return __umulhi(2 * number, multiplier) >> shift;
#else
    return uint32_t(uint64_t(2 * number) * multiplier >> 32) >> shift;
#endif
  }
};

struct ToInt {
  CELLOPS_HD int32_t operator()(float value) const { return int32_t(value); }
};
struct ToReal {
  CELLOPS_HD float operator()(int32_t value) const { return float(value); }
};
CELLOPS_HD float not_a_number() { return bit_cast<float>(uint32_t(0x7fc00000)); }

#ifdef __CUDACC__
struct DeviceBlock {
  __device__ int thread() const { return int(threadIdx.x); }
  __device__ uint32_t index() const { return blockIdx.x; }
  __device__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ T* shared() const {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<T*>(memory);
  }
  // Addresses of 32 bits, which the compiler would find again for every access from the thread's number.
  __device__ uint32_t own(void* address) const {
    uint32_t start = uint32_t(__cvta_generic_to_shared(address));
    asm volatile("" : "+r"(start));
    return start;
  }
  __device__ float get(uint32_t own, int32_t byte) const {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(own + byte));
    return value;
  }
  __device__ void set(uint32_t own, int32_t byte, float value) const {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(own + byte), "f"(value));
  }
  __device__ float sum(float value, int threads) const {
    for (int distance = threads / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
  }
  __device__ void add(float* to, float value) const {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value) : "memory");
  }
  __device__ void add(int64_t* to, int64_t value) const {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(value) : "memory");
  }
  __device__ void put(int64_t* to, int64_t value) const {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(value) : "memory");
  }
  __device__ void add4(float* to, const float* values) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) add(to + i, values[i]);
#endif
  }
};
#endif

}  // namespace cellops::CELLOPS_ISA
