// Storage types of tensors, and single values as the numbers that are computed with: one truth for every backend.
#pragma once
#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifdef __CUDACC__
#define CELLOPS_HD __host__ __device__ inline
#else
#define CELLOPS_HD inline __attribute__((always_inline))
#endif
#ifndef CELLOPS_ISA
#define CELLOPS_ISA device
#endif

namespace cellops::CELLOPS_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that values of a storage type are computed in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class To, class From>
CELLOPS_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

CELLOPS_HD float to_compute(float value) { return value; }
CELLOPS_HD double to_compute(double value) { return value; }
CELLOPS_HD float to_compute(bfloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
CELLOPS_HD float to_compute(float16 value) {
#if defined(__CUDA_ARCH__)
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(value.bits));
  return number;
#elif defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  return float(bit_cast<__fp16>(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 rebiases the exponent and makes subnormals exact.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
#endif
}

CELLOPS_HD void from_compute(float* to, float value) { *to = value; }
CELLOPS_HD void from_compute(double* to, double value) { *to = value; }
CELLOPS_HD void from_compute(bfloat16* to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  to->bits = value == value ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(bits >> 16 | 0x40u);
#endif
}
CELLOPS_HD void from_compute(float16* to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#elif defined(__F16C__)
  to->bits = uint16_t(_cvtss_sh(value, 0));
#elif defined(__aarch64__)
  to->bits = bit_cast<uint16_t>(__fp16(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the normal range: let the float adder round at 2^-24
    magnitude = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    magnitude = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | magnitude);
#endif
}

}  // namespace cellops::CELLOPS_ISA
