// Every plane sampled at its own offsets, clamped to the image: the bodies and how they are launched.
//
// These read and add in memory; offset_sample2d_region.h has what goes by way of shared memory, and the launches.
//
// A thread takes 16 bytes of the output: pixels of a plane in NCHW, channels of a pixel in channels_last, with their
// offsets beside each other in both. Where sizes or the offset's memory format forbid that, it takes as many elements
// that lie kThreads apart, so that neighbouring threads still read neighbours.
//
// For E bytes an element, forward must move 4 E a point (input, dy, dx, output), backward 7 E (input, dy, dx,
// grad_output and three gradients), beside four float32 additions a point to the input's gradient in the L2 cache, or
// as many of 64-bit integers.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "../common/bilinear.h"
#include "block.h"
#include "fixed_point.h"

namespace cellops::CELLOPS_ISA {

// Where dy and dx of an element lie.
enum class Pairs : int { planes = 0, by_pixel = 1, by_channel = 2, scattered = 3 };

// Sizes of a launch: `elements` of whole images, fewer than 2^32.
struct OffsetSample2dView {
  uint32_t elements, image_elements, channels, height, width, pixels;
  Pairs pairs;
  bool offset_channels_last;
  bool wide;    // the offset is float32 beside a half type
  bool packed;  // 16 bytes at a time
};

struct Position {
  uint32_t image, channel, pixel;
};

template <bool ChannelsLast>
CELLOPS_BODY Position position_of(const OffsetSample2dView& view, uint32_t element) {
  if constexpr (ChannelsLast) {
    const uint32_t pixel = element / view.channels;
    return {pixel / view.pixels, element - pixel * view.channels, pixel % view.pixels};
  } else {
    const uint32_t plane = element / view.pixels;
    return {plane / view.channels, plane % view.channels, element - plane * view.pixels};
  }
}

// Where the number at `position` of an image's offset in NCHW order lies in memory.
CELLOPS_BODY uint64_t offset_element(const OffsetSample2dView& view, uint64_t position) {
  if (!view.offset_channels_last) return position;
  return position % view.pixels * (2 * view.channels) + position / view.pixels;
}

struct ShiftElements {
  uint64_t dy, dx;
};

CELLOPS_BODY ShiftElements shift_elements(const OffsetSample2dView& view, const Position& at) {
  const uint64_t image = 2 * uint64_t(at.image) * view.image_elements;
  const uint64_t plane = uint64_t(at.channel) * view.pixels;
  switch (view.pairs) {
    case Pairs::planes:
      return {image + 2 * plane + at.pixel, image + 2 * plane + view.pixels + at.pixel};
    case Pairs::by_pixel:
      return {image + 2 * (plane + at.pixel), image + 2 * (plane + at.pixel) + 1};
    case Pairs::by_channel: {
      const uint64_t dy = image + 2 * (uint64_t(at.pixel) * view.channels + at.channel);
      return {dy, dy + 1};
    }
    default: {
      const uint64_t pair = 2 * (plane + at.pixel);
      return {image + offset_element(view, pair), image + offset_element(view, pair + 1)};
    }
  }
}

template <class T>
CELLOPS_BODY float load_shift(const void* offset, bool wide, uint64_t element) {
  return wide ? static_cast<const float*>(offset)[element] : to_compute(static_cast<const T*>(offset)[element]);
}
template <class T>
CELLOPS_BODY void store_shift(void* offset, bool wide, uint64_t element, float value) {
  if (wide) {
    static_cast<float*>(offset)[element] = value;
  } else {
    store_one(static_cast<T*>(offset) + element, value);
  }
}
template <int Count, class T>
CELLOPS_BODY void load_shifts(const void* offset, bool wide, uint64_t element, float* to) {
  if (wide) {
    load_packs<Count>(static_cast<const float*>(offset) + element, to);
  } else {
    load_packs<Count>(static_cast<const T*>(offset) + element, to);
  }
}
template <int Count, class T>
CELLOPS_BODY void store_shifts(void* offset, bool wide, uint64_t element, const float* from) {
  if (wide) {
    store_packs<Count>(static_cast<float*>(offset) + element, from);
  } else {
    store_packs<Count>(static_cast<T*>(offset) + element, from);
  }
}

// dy and dx of a pack, and their gradients; in `planes` first all dy, else in pairs.
template <int Count, class T>
CELLOPS_BODY void load_pack_shifts(const OffsetSample2dView& view, const void* offset, const Position& at, float* dy,
                                   float* dx) {
  const ShiftElements from = shift_elements(view, at);
  if (view.pairs == Pairs::planes) {
    load_shifts<Count, T>(offset, view.wide, from.dy, dy);
    load_shifts<Count, T>(offset, view.wide, from.dx, dx);
    return;
  }
  float both[2 * Count];
  load_shifts<2 * Count, T>(offset, view.wide, from.dy, both);
  CELLOPS_UNROLL
  for (int i = 0; i < Count; ++i) dy[i] = both[2 * i], dx[i] = both[2 * i + 1];
}
template <int Count, class T>
CELLOPS_BODY void store_pack_shifts(const OffsetSample2dView& view, void* offset, const Position& at, const float* dy,
                                    const float* dx) {
  const ShiftElements to = shift_elements(view, at);
  if (view.pairs == Pairs::planes) {
    store_shifts<Count, T>(offset, view.wide, to.dy, dy);
    store_shifts<Count, T>(offset, view.wide, to.dx, dx);
    return;
  }
  float both[2 * Count];
  CELLOPS_UNROLL
  for (int i = 0; i < Count; ++i) both[2 * i] = dy[i], both[2 * i + 1] = dx[i];
  store_shifts<2 * Count, T>(offset, view.wide, to.dy, both);
}

// A point, clamped; comparisons that keep NaN.
struct ClampedPoint {
  Sample<float, int32_t> sample;
  bool free_y, free_x;  // whether a shift would move it
};

CELLOPS_BODY ClampedPoint clamped_point(const OffsetSample2dView& view, uint32_t row, uint32_t column, float dy,
                                        float dx) {
  const float last_row = float(view.height - 1), last_column = float(view.width - 1);
  float y = float(row) + dy, x = float(column) + dx;
  const bool known = y == y && x == x;
  ClampedPoint point;
  point.free_y = known && y > 0 && y < last_row;
  point.free_x = known && x > 0 && x < last_column;
  y = y < 0 ? 0 : y > last_row ? last_row : y;
  x = x < 0 ? 0 : x > last_column ? last_column : x;
  point.sample = sample_point<float, int32_t>(y, x, float(view.height), float(view.width), int32_t(view.width),
                                              int32_t(view.height - 1), int32_t(view.width - 1), 0.f, not_a_number(),
                                              -1, ToInt(), ToReal());
  return point;
}

template <bool ChannelsLast, class T>
CELLOPS_BODY float corner_value(const OffsetSample2dView& view, const T* plane, int32_t index) {
  return index < 0 ? 0.f : to_compute(plane[ChannelsLast ? uint64_t(index) * view.channels : uint64_t(index)]);
}

// The plane's element of its pixel 0.
template <bool ChannelsLast>
CELLOPS_BODY uint64_t plane_element(const OffsetSample2dView& view, const Position& at) {
  return uint64_t(at.image) * view.image_elements + (ChannelsLast ? at.channel : uint64_t(at.channel) * view.pixels);
}

template <class T, bool ChannelsLast>
struct OffsetSample2dForwardBody {
  static constexpr int kThreads = 128, kBlocks = 0, kCount = kPack<T>;
  static constexpr bool kBarriers = false;
  OffsetSample2dView view;
  const T* input;
  const void* offset;
  T* output;

  CELLOPS_BODY float value(const Position& at, uint32_t row, uint32_t column, float dy, float dx) const {
    const auto sample = clamped_point(view, row, column, dy, dx).sample;
    const T* plane = input + plane_element<ChannelsLast>(view, at);
    float sum = 0;
    CELLOPS_UNROLL
    for (int k = 0; k < 4; ++k) sum += sample.weight[k] * corner_value<ChannelsLast>(view, plane, sample.index[k]);
    return sum;
  }

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    if (view.packed) {
      const uint32_t first = (block.index() * kThreads + block.thread()) * kCount;
      if (first >= view.elements) return;
      Position at = position_of<ChannelsLast>(view, first);
      float dy[kCount], dx[kCount], result[kCount];
      load_pack_shifts<kCount, T>(view, offset, at, dy, dx);
      uint32_t row = at.pixel / view.width, column = at.pixel % view.width;
      CELLOPS_UNROLL
      for (int i = 0; i < kCount; ++i) {
        result[i] = value(at, row, column, dy[i], dx[i]);
        step(at, row, column);
      }
      store_packs<kCount>(output + first, result);
      return;
    }
    const uint32_t first = block.index() * (kThreads * kCount) + block.thread();
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const uint32_t element = first + i * kThreads;
      if (element >= view.elements) return;
      const Position at = position_of<ChannelsLast>(view, element);
      const ShiftElements from = shift_elements(view, at);
      store_one(output + element,
                value(at, at.pixel / view.width, at.pixel % view.width, load_shift<T>(offset, view.wide, from.dy),
                      load_shift<T>(offset, view.wide, from.dx)));
    }
  }

  // To the next element of a pack.
  CELLOPS_BODY void step(Position& at, uint32_t& row, uint32_t& column) const {
    if (ChannelsLast) {
      ++at.channel;
    } else if (++column == view.width) {
      column = 0, ++row;
    }
  }
};

// Sum is the type that the gradient of the input is added up in: float, or int64_t for fixed point.
template <class T, class Sum, bool ChannelsLast>
struct OffsetSample2dBackwardBody {
  static constexpr int kThreads = 128, kBlocks = 0, kCount = kPack<T>;
  static constexpr bool kBarriers = false, kFixed = !std::is_same_v<Sum, float>;
  OffsetSample2dView view;
  const T* grad_output;
  const T* input;
  const void* offset;
  const int32_t* exponents;  // of fixed point
  Sum* grad_input;           // added to; or null
  void* grad_offset;         // or null

  template <class Block>
  CELLOPS_BODY void point(const Block& block, const Position& at, uint32_t row, uint32_t column, float dy, float dx,
                          float grad, float* grad_y, float* grad_x) const {
    const ClampedPoint p = clamped_point(view, row, column, dy, dx);
    const uint64_t plane = plane_element<ChannelsLast>(view, at);
    if (grad_offset) {
      float v[4];
      CELLOPS_UNROLL
      for (int k = 0; k < 4; ++k) v[k] = corner_value<ChannelsLast>(view, input + plane, p.sample.index[k]);
      *grad_y = p.free_y ? grad * derivative_y(p.sample.right, v[0], v[1], v[2], v[3]) : 0.f;
      *grad_x = p.free_x ? grad * derivative_x(p.sample.bottom, v[0], v[1], v[2], v[3]) : 0.f;
    }
    if (!grad_input) return;
    CELLOPS_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int32_t index = p.sample.index[k];
      if (index < 0) continue;
      const uint64_t element = plane + uint64_t(index) * (ChannelsLast ? view.channels : 1);
      const float share = grad * p.sample.weight[k];
      if constexpr (kFixed) {
        add_fixed(block, grad_input + element, share, exponents[uint64_t(at.image) * view.channels + at.channel]);
      } else {
        block.add(grad_input + element, share);
      }
    }
  }

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    if (view.packed) {
      const uint32_t first = (block.index() * kThreads + block.thread()) * kCount;
      if (first >= view.elements) return;
      Position at = position_of<ChannelsLast>(view, first);
      const Position start = at;
      float dy[kCount], dx[kCount], grad[kCount];
      load_pack_shifts<kCount, T>(view, offset, at, dy, dx);
      load_packs<kCount>(grad_output + first, grad);
      uint32_t row = at.pixel / view.width, column = at.pixel % view.width;
      CELLOPS_UNROLL
      for (int i = 0; i < kCount; ++i) {
        point(block, at, row, column, dy[i], dx[i], grad[i], dy + i, dx + i);
        if (ChannelsLast) {
          ++at.channel;
        } else if (++column == view.width) {
          column = 0, ++row;
        }
      }
      if (grad_offset) store_pack_shifts<kCount, T>(view, grad_offset, start, dy, dx);
      return;
    }
    const uint32_t first = block.index() * (kThreads * kCount) + block.thread();
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const uint32_t element = first + i * kThreads;
      if (element >= view.elements) return;
      const Position at = position_of<ChannelsLast>(view, element);
      const ShiftElements from = shift_elements(view, at);
      float dy = load_shift<T>(offset, view.wide, from.dy), dx = load_shift<T>(offset, view.wide, from.dx);
      point(block, at, at.pixel / view.width, at.pixel % view.width, dy, dx, to_compute(grad_output[element]), &dy,
            &dx);
      if (!grad_offset) continue;
      store_shift<T>(grad_offset, view.wide, from.dy, dy);
      store_shift<T>(grad_offset, view.wide, from.dx, dx);
    }
  }
};

inline constexpr int64_t kMostElements = 0xfff00000;  // of a launch: a thread's number stays below 2^32

// Calls work(view, first image) for as many images at a time as a launch can take.
template <class T, class Work>
void for_image_ranges(const OffsetSample2dParams& p, bool addresses_aligned, const Work& work) {
  const int64_t pixels = p.height * p.width, image_elements = p.channels * pixels;
  if (image_elements > kMostElements) {
    throw std::invalid_argument("offset_sample2d: the CUDA kernels take images of fewer than 2^32 elements");
  }
  OffsetSample2dView view{};
  view.image_elements = uint32_t(image_elements);
  view.channels = uint32_t(p.channels), view.height = uint32_t(p.height), view.width = uint32_t(p.width);
  view.pixels = uint32_t(pixels);
  view.offset_channels_last = p.offset_channels_last;
  view.wide = p.offset_dtype == Dtype::float32 && p.dtype != Dtype::float32;
  view.pairs = !p.interleaved ? (p.offset_channels_last ? Pairs::by_channel : Pairs::planes)
                              : (p.offset_channels_last ? Pairs::scattered : Pairs::by_pixel);
  const bool beside =
      p.channels_last ? view.pairs == Pairs::by_channel : view.pairs == Pairs::planes || view.pairs == Pairs::by_pixel;
  view.packed = addresses_aligned && beside && (p.channels_last ? p.channels : pixels) % kPack<T> == 0;
  const int64_t most = image_elements ? kMostElements / image_elements : 1;
  for (int64_t image = 0; image < p.batch; image += most) {
    const int64_t images = p.batch - image < most ? p.batch - image : most;
    view.elements = uint32_t(images * image_elements);
    work(view, image);
  }
}

template <class T>
const void* advanced(const void* address, bool wide, int64_t elements) {
  return static_cast<const char*>(address) + elements * int64_t(wide ? sizeof(float) : sizeof(T));
}

}  // namespace cellops::CELLOPS_ISA
