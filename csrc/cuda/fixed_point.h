// Sums that do not depend on the order of their additions: 64-bit integers, whose additions commute. The unit of each
// plane is 2^-exponent; its caller knows how large the plane's sums can become and chooses it so that they stay within
// 2^60 units.
//
// A number that is not finite puts a mark where it would be added. The mark is -2^63, and what is added to it less than
// 2^61 units in all: wherever a mark was put, before, between or after additions, what stands there is beyond 2^62 and
// read as NaN.
#pragma once
#include <cmath>

#include "block.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int64_t kNotFinite = INT64_MIN;

// 2^exponent as a product of two, neither of which overflows for |exponent| <= 250.
struct PowerOf2 {
  float first, second;
  explicit CELLOPS_BODY PowerOf2(int exponent) : first(of(exponent / 2)), second(of(exponent - exponent / 2)) {}
  static CELLOPS_BODY float of(int exponent) { return bit_cast<float>(uint32_t(exponent + 127) << 23); }
};

CELLOPS_BODY int64_t nearest_integer(float value) {
#ifdef __CUDA_ARCH__
  return __float2ll_rn(value);
#else
  return int64_t(std::nearbyint(value));
#endif
}

template <class Block>
CELLOPS_BODY void add_fixed(const Block& block, int64_t* to, float value, int exponent) {
  const PowerOf2 units(exponent);
  const float number = value * units.first * units.second;
  if (number > -0x1p60f && number < 0x1p60f) {
    block.add(to, nearest_integer(number));
  } else {
    block.put(to, kNotFinite);
  }
}

CELLOPS_BODY float fixed_value(int64_t sum, int exponent) {
  const PowerOf2 unit(-exponent);
  const int64_t most = int64_t(1) << 62;
  return sum < most && sum > -most ? float(sum) * unit.first * unit.second : not_a_number();
}

// Sums as numbers of the storage type. A thread takes as many as 16 bytes of those hold.
template <class T>
struct FixedPointBody {
  static constexpr int kThreads = 128, kBlocks = 0, kCount = kPack<T>;
  static constexpr bool kBarriers = false;
  const int64_t* sums;
  const int32_t* exponents;  // [N, C]
  T* output;
  uint64_t elements, run;  // a run is a plane, in channels_last an image
  uint32_t channels;
  bool channels_last, packed;

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const uint64_t first = (uint64_t(block.index()) * kThreads + block.thread()) * kCount;
    if (first >= elements) return;
    const bool whole = packed && first + kCount <= elements;
    const int count = whole ? kCount : elements - first < kCount ? int(elements - first) : kCount;
    int64_t sum[kCount];
    if (whole) {
      CELLOPS_UNROLL
      for (int i = 0; i < kCount; i += 2) {
        const Words words = *reinterpret_cast<const Words*>(sums + first + i);
        sum[i] = int64_t(uint64_t(words.word[1]) << 32 | words.word[0]);
        sum[i + 1] = int64_t(uint64_t(words.word[3]) << 32 | words.word[2]);
      }
    } else {
      CELLOPS_UNROLL
      for (int i = 0; i < kCount; ++i) sum[i] = i < count ? sums[first + i] : 0;
    }
    uint64_t number = first / run, place = first % run;
    uint32_t channel = uint32_t(place % channels);
    float value[kCount];
    CELLOPS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i < count) value[i] = fixed_value(sum[i], exponents[channels_last ? number * channels + channel : number]);
      if (++place == run) place = 0, ++number;
      if (++channel == channels) channel = 0;
    }
    if (whole) {
      store_packs<kCount>(output + first, value);
    } else {
      CELLOPS_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (i < count) store_one(output + first + i, value[i]);
      }
    }
  }
};

template <class Launcher>
void fixed_point(const FixedPointParams& p, const FixedPoint& io, const Launcher& launcher) {
  with_storage_type("fixed_point", p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t elements = p.batch * p.channels * p.pixels;
    FixedPointBody<T> body{};
    body.sums = static_cast<const int64_t*>(io.sums), body.exponents = static_cast<const int32_t*>(io.exponents);
    body.output = static_cast<T*>(io.output);
    body.elements = uint64_t(elements), body.run = uint64_t(p.channels_last ? p.channels * p.pixels : p.pixels);
    body.channels = uint32_t(p.channels), body.channels_last = p.channels_last;
    body.packed = aligned(io.sums, io.output);
    launcher.run(blocks_of(elements, FixedPointBody<T>::kThreads * kPack<T>), 0, body);
  });
}

}  // namespace cellops::CELLOPS_ISA
