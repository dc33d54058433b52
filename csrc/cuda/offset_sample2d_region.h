// offset_sample2d in channels_last by way of shared memory.
//
// Every channel looks elsewhere, so that the 32 channels of a warp find their corners in up to 32 lines of the
// first-level cache, and it takes a clock for each: at 14,14 to 56,56 that bounds what reads corners in memory at three
// to five times what copying takes. Shared memory has no lines: in a region of pixels by 32 channels a thread that owns
// a channel finds each of its numbers in a bank of its own. A block copies the region around a rectangle of points,
// whole maps up to 16 x 16, and samples there. Points beyond it read memory.
//
// Backward's additions are as scattered, and slower: about 100 sectors of 32 bytes in a nanosecond on an H200, one for
// each corner. They are made in shared memory without atomics, since no other thread has the channel, and a pixel's
// 32 sums are added to memory together. A whole map's sums are written, in the storage type and always the same.
//
//   forward    moves 3 E a point, and its region: E for a whole map, 4 E for 16 x 16 pixels around 8 x 8 points
//   backward   moves 6 E a point, the region, and what it adds: 4 float32 additions a point, beside each other
#pragma once
#include <algorithm>
#include <type_traits>

#include "offset_sample2d.h"

namespace cellops::CELLOPS_ISA {

struct OffsetSample2dRegionElement {
  uint32_t row, column;  // of the rectangle
  uint64_t element;      // of the image's channel 0
  bool exists;
};

// A block's points and region, and its thread's channel.
struct OffsetSample2dPlace {
  uint32_t image, channel, top, left, height, width;  // of the points
  int32_t region_top, region_left;
  bool exists;  // the channel
};

struct OffsetSample2dRegions {
  static constexpr uint32_t kMost = 16, kSide = 8, kChannels = 32;
  uint32_t tile_height, tile_width, region_height, region_width;
  uint32_t rows, columns, channel_blocks;  // rectangles of an image, blocks of its channels
  Divisor by_tile_width, by_region_width;

  OffsetSample2dRegions() = default;
  explicit OffsetSample2dRegions(const OffsetSample2dView& view) {
    tile_height = view.height <= kMost ? view.height : kSide, tile_width = view.width <= kMost ? view.width : kSide;
    region_height = std::min(view.height, kMost), region_width = std::min(view.width, kMost);
    rows = (view.height + tile_height - 1) / tile_height, columns = (view.width + tile_width - 1) / tile_width;
    channel_blocks = (view.channels + kChannels - 1) / kChannels;
    by_tile_width = Divisor(tile_width), by_region_width = Divisor(region_width);
  }
  bool whole() const { return rows * columns == 1; }
  int64_t blocks(int64_t images) const { return images * rows * columns * channel_blocks; }
  // A region's, and those behind them, which stay 0.
  int64_t numbers() const { return int64_t(region_height * region_width + 1) * kChannels; }
  CELLOPS_BODY int32_t pixels() const { return int32_t(region_height * region_width); }
  CELLOPS_BODY OffsetSample2dRegionElement point(const OffsetSample2dView& view, const OffsetSample2dPlace& at,
                                                 uint32_t number) const;
};

// One of a block's points, numbered over the rows of a rectangle.
CELLOPS_BODY OffsetSample2dRegionElement OffsetSample2dRegions::point(const OffsetSample2dView& view,
                                                                      const OffsetSample2dPlace& at,
                                                                      uint32_t number) const {
  OffsetSample2dRegionElement p;
  p.row = by_tile_width.quotient(number), p.column = number - p.row * tile_width;
  p.exists = p.row < at.height && p.column < at.width;
  p.element = uint64_t((at.top + p.row) * view.width + at.left + p.column) * view.channels;
  return p;
}

CELLOPS_BODY OffsetSample2dPlace place_of(const OffsetSample2dView& view, const OffsetSample2dRegions& regions,
                                          uint32_t number, int lane) {
  OffsetSample2dPlace at;
  const uint32_t channel = number % regions.channel_blocks * OffsetSample2dRegions::kChannels + lane;
  number /= regions.channel_blocks;
  at.left = number % regions.columns * regions.tile_width, number /= regions.columns;
  at.top = number % regions.rows * regions.tile_height, at.image = number / regions.rows;
  at.exists = channel < view.channels;
  at.channel = at.exists ? channel : view.channels - 1;
  at.height = smaller(regions.tile_height, view.height - at.top);
  at.width = smaller(regions.tile_width, view.width - at.left);
  // As far beyond the points on each side, but within the image.
  const auto first = [](uint32_t start, uint32_t tile, uint32_t region, uint32_t size) {
    const int32_t wanted = int32_t(start) - int32_t(region - tile) / 2, last = int32_t(size - region);
    return wanted < 0 ? 0 : wanted > last ? last : wanted;
  };
  at.region_top = first(at.top, regions.tile_height, regions.region_height, view.height);
  at.region_left = first(at.left, regions.tile_width, regions.region_width, view.width);
  return at;
}

// Copies the region's numbers, 16 bytes at a time, to [pixels][32] in shared memory as Stored: T, or float32.
template <int Threads, class T, class Stored>
CELLOPS_BODY void load_region(const OffsetSample2dView& view, const OffsetSample2dRegions& regions,
                              const OffsetSample2dPlace& at, int thread, const T* input, Stored* to) {
  constexpr int kParts = OffsetSample2dRegions::kChannels / kPack<T>;
  const uint32_t first = at.channel / OffsetSample2dRegions::kChannels * OffsetSample2dRegions::kChannels;
  const uint32_t channel = first + thread % kParts * kPack<T>;
  const T* const image = input + uint64_t(at.image) * view.image_elements + channel;
  const int pixels = regions.region_height * regions.region_width;
  if (thread < OffsetSample2dRegions::kChannels) to[pixels * OffsetSample2dRegions::kChannels + thread] = Stored();
  if (channel >= view.channels) return;
  CELLOPS_UNROLL_BY(4)
  for (int i = thread / kParts; i < pixels; i += Threads / kParts) {
    const uint32_t row = regions.by_region_width.quotient(i), column = i - row * regions.region_width;
    const T* const from =
        image + uint64_t((at.region_top + row) * view.width + at.region_left + column) * view.channels;
    Stored* const target = to + i * OffsetSample2dRegions::kChannels + thread % kParts * kPack<T>;
    if constexpr (std::is_same_v<T, Stored>) {
      *reinterpret_cast<Words*>(target) = *reinterpret_cast<const Words*>(from);
    } else {
      float values[kPack<T>];
      load_packs<kPack<T>>(from, values);
      store_packs<kPack<T>>(target, values);
    }
  }
}

// dy and dx of a point, beside each other.
struct alignas(8) FloatPair {
  float first, second;
};
template <class T>
CELLOPS_BODY FloatPair load_pair(const void* offset, bool wide, uint64_t element) {
  if constexpr (sizeof(T) == 2) {
    if (!wide) {
      const uint32_t both = static_cast<const uint32_t*>(offset)[element];
      return {to_compute(T{uint16_t(both)}), to_compute(T{uint16_t(both >> 16)})};
    }
  }
  return static_cast<const FloatPair*>(offset)[element];
}
template <class T>
CELLOPS_BODY void store_pair(void* offset, bool wide, uint64_t element, FloatPair pair) {
  if constexpr (sizeof(T) == 2) {
    if (!wide) {
      T first, second;
      from_compute(&first, pair.first);
      from_compute(&second, pair.second);
      static_cast<uint32_t*>(offset)[element] = uint32_t(first.bits) | uint32_t(second.bits) << 16;
      return;
    }
  }
  static_cast<FloatPair*>(offset)[element] = pair;
}

// A point, clamped, as clamped_point finds it in more instructions, and its corners in the region. The numbers of a
// corner beyond the last row or column are those behind the region's, which are 0.
struct OffsetSample2dRegionPoint {
  bool known, free_y, free_x;  // not NaN; whether a shift would move it
  bool near;                   // every corner lies in the region
  bool has_bottom, has_right;
  int32_t top, left;
  float bottom, right;
  int32_t pixel[4];  // of the region, if near

  CELLOPS_BODY OffsetSample2dRegionPoint(const OffsetSample2dView& view, const OffsetSample2dRegions& regions,
                                         const OffsetSample2dPlace& at, uint32_t row, uint32_t column,
                                         FloatPair shift) {
    const float last_row = float(view.height - 1), last_column = float(view.width - 1);
    float y = float(at.top + row) + shift.first, x = float(at.left + column) + shift.second;
    known = y == y && x == x;
    free_y = known && y > 0 && y < last_row, free_x = known && x > 0 && x < last_column;
    y = y > 0 ? y : 0, x = x > 0 ? x : 0;  // NaN too
    y = y < last_row ? y : last_row, x = x < last_column ? x : last_column;
    top = int32_t(y), left = int32_t(x);
    bottom = y - float(top), right = x - float(left);
    has_bottom = y < last_row, has_right = x < last_column;
    const int32_t first_row = top - at.region_top, first_column = left - at.region_left;
    near = uint32_t(first_row) < regions.region_height - has_bottom &&
           uint32_t(first_column) < regions.region_width - has_right;
    const int32_t first = first_row * int32_t(regions.region_width) + first_column;
    const int32_t below = first + int32_t(regions.region_width), none = regions.pixels();
    pixel[0] = first, pixel[1] = has_right ? first + 1 : none;
    pixel[2] = has_bottom ? below : none, pixel[3] = has_bottom && has_right ? below + 1 : none;
  }
  CELLOPS_BODY float weight(int corner) const {
    return (corner / 2 ? bottom : 1 - bottom) * (corner % 2 ? right : 1 - right);
  }
  // The values at the corners: the thread's own of the region, or those of the image's channel.
  template <class Stored, class T>
  CELLOPS_BODY void load(const OffsetSample2dView& view, const Stored* own, const T* channel, float* to) const {
    CELLOPS_UNROLL
    for (int k = 0; k < 4; ++k) to[k] = near ? to_compute(own[pixel[k] * int(OffsetSample2dRegions::kChannels)]) : 0.f;
    if (!near) each(view.width, [&](int k, uint64_t pixel) { to[k] = to_compute(channel[pixel * view.channels]); });
  }
  // Calls work(corner, its pixel of the image) for those that there are.
  template <class Work>
  CELLOPS_BODY void each(uint32_t width, const Work& work) const {
    for (int k = 0; k < 4; ++k) {
      if ((k < 2 || has_bottom) && (k % 2 == 0 || has_right)) {
        work(k, uint64_t(top + k / 2) * width + uint32_t(left + k % 2));
      }
    }
  }
};

template <class T>
struct OffsetSample2dRegionForwardBody {
  static constexpr int kThreads = 128, kBlocks = 0, kAhead = 4;
  static constexpr bool kBarriers = true;
  OffsetSample2dView view;
  OffsetSample2dRegions regions;
  const T* input;
  const void* offset;
  T* output;

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    constexpr int kChannels = OffsetSample2dRegions::kChannels, kWarps = kThreads / kChannels;
    float* const region = block.template shared<float>();
    const int lane = block.thread() % kChannels;
    const OffsetSample2dPlace at = place_of(view, regions, block.index(), lane);
    load_region<kThreads>(view, regions, at, block.thread(), input, region);
    block.sync();
    if (!at.exists) return;
    const uint64_t image = uint64_t(at.image) * view.image_elements + at.channel;
    const uint32_t points = at.height * regions.tile_width;
    for (uint32_t start = block.thread() / kChannels; start < points; start += kAhead * kWarps) {
      FloatPair shift[kAhead];
      CELLOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const auto p = regions.point(view, at, start + k * kWarps);
        if (p.exists) shift[k] = load_pair<T>(offset, view.wide, image + p.element);
      }
      CELLOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const auto p = regions.point(view, at, start + k * kWarps);
        if (p.exists) store_one(output + image + p.element, value(at, p.row, p.column, shift[k], region + lane, image));
      }
    }
  }

  CELLOPS_BODY float value(const OffsetSample2dPlace& at, uint32_t row, uint32_t column, FloatPair shift,
                           const float* own, uint64_t image) const {
    const OffsetSample2dRegionPoint p(view, regions, at, row, column, shift);
    if (!p.known) return not_a_number();
    float v[4];
    p.load(view, own, input + image, v);
    return (1 - p.bottom) * ((1 - p.right) * v[0] + p.right * v[1]) +
           p.bottom * ((1 - p.right) * v[2] + p.right * v[3]);
  }
};

template <class T>
struct OffsetSample2dRegionBackwardBody {
  static constexpr int kThreads = 32, kBlocks = 0, kAhead = 4;
  static constexpr bool kBarriers = true;
  OffsetSample2dView view;
  OffsetSample2dRegions regions;
  const T* grad_output;
  const T* input;
  const void* offset;
  float* grad_input;  // added to; or null
  T* grad_whole;      // written, of a whole map; or null
  void* grad_offset;  // or null

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    constexpr int kRow = kThreads * sizeof(float);
    float* const sums = block.template shared<float>();
    const bool adds = grad_input || grad_whole;
    const int pixels = regions.pixels(), lane = block.thread();
    T* const region = reinterpret_cast<T*>(sums + (adds ? (pixels + 1) * kThreads : 0));
    const OffsetSample2dPlace at = place_of(view, regions, block.index(), lane);
    if (grad_offset) load_region<kThreads>(view, regions, at, lane, input, region);
    if (adds) {
      CELLOPS_UNROLL_BY(4)
      for (int i = lane; i < (pixels + 1) * kThreads / 4; i += kThreads) reinterpret_cast<Words*>(sums)[i] = Words{};
    }
    block.sync();
    if (!at.exists) return;
    const auto own = block.own(sums + lane);
    const uint64_t image = uint64_t(at.image) * view.image_elements + at.channel;
    const uint32_t points = at.height * regions.tile_width;

    // What the next points need is read before those at hand are worked on.
    FloatPair shift[kAhead] = {}, next_shift[kAhead] = {};
    float grad[kAhead] = {}, next_grad[kAhead] = {};
    const auto load = [&](uint32_t start) {
      CELLOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const auto p = regions.point(view, at, start + k);
        if (!p.exists) continue;
        next_shift[k] = load_pair<T>(offset, view.wide, image + p.element);
        next_grad[k] = to_compute(grad_output[image + p.element]);
      }
    };
    load(0);
    for (uint32_t start = 0; start < points; start += kAhead) {
      CELLOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) shift[k] = next_shift[k], grad[k] = next_grad[k];
      load(start + kAhead);
      CELLOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const auto p = regions.point(view, at, start + k);
        if (p.exists) give(block, at, p.row, p.column, shift[k], grad[k], region + lane, own, adds, image, p.element);
      }
    }
    if (!adds) return;
    CELLOPS_UNROLL_BY(4)
    for (int i = 0; i < pixels; ++i) {
      const uint32_t row = regions.by_region_width.quotient(i), column = i - row * regions.region_width;
      const uint64_t pixel = uint64_t(at.region_top + row) * view.width + at.region_left + column;
      const float sum = block.get(own, i * kRow);
      if (grad_whole) {
        store_one(grad_whole + image + pixel * view.channels, sum);
      } else if (sum != 0) {
        block.add(grad_input + image + pixel * view.channels, sum);
      }
    }
  }

  template <class Block, class Own>
  CELLOPS_BODY void give(const Block& block, const OffsetSample2dPlace& at, uint32_t row, uint32_t column,
                         FloatPair shift, float grad, const T* values, Own own, bool adds, uint64_t image,
                         uint64_t element) const {
    constexpr int kRow = kThreads * sizeof(float);
    const OffsetSample2dRegionPoint p(view, regions, at, row, column, shift);
    if (!p.known) grad = 0;
    if (grad_offset) {
      float v[4];
      p.load(view, values, input + image, v);
      store_pair<T>(grad_offset, view.wide, image + element,
                    {p.free_y ? grad * derivative_y(p.right, v[0], v[1], v[2], v[3]) : 0.f,
                     p.free_x ? grad * derivative_x(p.bottom, v[0], v[1], v[2], v[3]) : 0.f});
    }
    if (!adds) return;
    if (p.near) {
      float sum[4];
      CELLOPS_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] = block.get(own, p.pixel[k] * kRow) + grad * p.weight(k);
      CELLOPS_UNROLL
      for (int k = 0; k < 4; ++k) block.set(own, p.pixel[k] * kRow, sum[k]);
    } else {
      p.each(view.width,
             [&](int k, uint64_t pixel) { block.add(grad_input + image + pixel * view.channels, grad * p.weight(k)); });
    }
  }
};

// Whether the launches take the regions: channels that packs divide, half a warp of them at least, beside their pairs;
// and rows and columns that float32 tells apart, or a clamped point may lie behind the last.
inline bool takes_regions(const OffsetSample2dParams& p, const OffsetSample2dView& view, const void* input) {
  const bool told_apart = p.height <= 1 << 24 && p.width <= 1 << 24;
  return p.channels_last && view.packed && p.channels >= 16 && aligned(input) && told_apart;
}

template <class Launcher>
void offset_sample2d_forward(const OffsetSample2dParams& p, const OffsetSample2dForward& io, const Launcher& launcher) {
  with_storage_type("offset_sample2d", p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool fits = aligned(io.input, io.offset, io.output);
    for_image_ranges<T>(p, fits, [&](const OffsetSample2dView& view, int64_t image) {
      const int64_t first = image * view.image_elements;
      const int64_t blocks = blocks_of(view.elements, 128 * kPack<T>);
      const T* input = static_cast<const T*>(io.input) + first;
      const void* offset = advanced<T>(io.offset, view.wide, 2 * first);
      T* output = static_cast<T*>(io.output) + first;
      if (takes_regions(p, view, io.input)) {
        const OffsetSample2dRegions regions(view);
        launcher.run(regions.blocks(view.elements / view.image_elements), regions.numbers() * int64_t(sizeof(float)),
                     OffsetSample2dRegionForwardBody<T>{view, regions, input, offset, output});
      } else if (p.channels_last) {
        launcher.run(blocks, 0, OffsetSample2dForwardBody<T, true>{view, input, offset, output});
      } else {
        launcher.run(blocks, 0, OffsetSample2dForwardBody<T, false>{view, input, offset, output});
      }
    });
  });
}

template <class Launcher>
void offset_sample2d_backward(const OffsetSample2dParams& p, const OffsetSample2dGradients& io,
                              const Launcher& launcher) {
  with_storage_type("offset_sample2d_backward", p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool fits = aligned(io.grad_output, io.offset, io.grad_offset);
    for_image_ranges<T>(p, fits, [&](const OffsetSample2dView& view, int64_t image) {
      const int64_t first = image * view.image_elements;
      const auto launch = [&](auto body, int64_t blocks, int64_t shared_bytes) {
        body.view = view;
        body.grad_output = static_cast<const T*>(io.grad_output) + first;
        body.input = static_cast<const T*>(io.input) + first;
        body.offset = advanced<T>(io.offset, view.wide, 2 * first);
        if (io.grad_input) body.grad_input = static_cast<decltype(body.grad_input)>(io.grad_input) + first;
        if (io.grad_offset) body.grad_offset = const_cast<void*>(advanced<T>(io.grad_offset, view.wide, 2 * first));
        launcher.run(blocks, shared_bytes, body);
      };
      const OffsetSample2dRegions regions(view);
      const bool regional = takes_regions(p, view, io.input) && !io.exponents;
      if (io.grad_whole && !(regional && regions.whole())) {
        throw std::invalid_argument(
            "offset_sample2d_backward: grad_whole is for small maps whose channels packs divide");
      }
      const auto by_points = [&](auto body) {
        if (io.exponents) body.exponents = static_cast<const int32_t*>(io.exponents) + image * p.channels;
        launch(body, blocks_of(view.elements, 128 * kPack<T>), 0);
      };
      if (regional) {
        OffsetSample2dRegionBackwardBody<T> body{};
        body.regions = regions;
        if (io.grad_whole) body.grad_whole = static_cast<T*>(io.grad_whole) + first;
        const int64_t bytes = (io.grad_input || io.grad_whole ? 4 : 0) + (io.grad_offset ? int64_t(sizeof(T)) : 0);
        launch(body, regions.blocks(view.elements / view.image_elements), regions.numbers() * bytes);
      } else if (p.channels_last) {
        io.exponents ? by_points(OffsetSample2dBackwardBody<T, int64_t, true>{})
                     : by_points(OffsetSample2dBackwardBody<T, float, true>{});
      } else {
        io.exponents ? by_points(OffsetSample2dBackwardBody<T, int64_t, false>{})
                     : by_points(OffsetSample2dBackwardBody<T, float, false>{});
      }
    });
  });
}

}  // namespace cellops::CELLOPS_ISA
