// The sampling side of deformable convolution: columns forward, and backward what the four corners of every sample give
// and receive. The products are the caller's: columns of a tile of output pixels stand in scratch that stays in the L2
// cache.
//
// `lanes` neighbouring threads share one tap of one offset group at one output pixel; each takes 16 bytes of channels
// at a time, of the columns and of the four corners, which lie in channels_last images.
//
//   forward    reads four corners, 4 E bytes a column element (nearly all from caches), writes the column
//   backward   reads the column's gradient and the corners, writes the gradients of offset and mask and, in the place
//   of
//              the column's, the column, of which the weight's gradient is made. The input's is added up by
//              deform_conv2d_scatter.h; here in fixed point alone, four integers for each column element
#pragma once
#include <stdexcept>
#include <type_traits>

#include "../common/bilinear.h"
#include "block.h"
#include "fixed_point.h"

namespace cellops::CELLOPS_ISA {

struct DeformConv2dView {
  uint32_t items;  // taps of offset groups at the tile's pixels
  uint32_t taps, offset_groups, channels, height, width, out_width, out_pixels;
  Divisor by_taps, by_offset_groups, by_column_group, by_kernel_width, by_out_width, by_out_pixels;
  uint32_t kernel_width, stride_height, stride_width, pad_height, pad_width, dilation_height, dilation_width;
  uint32_t column_group;  // channels that lie beside each other in a column
  uint64_t first_image;   // of the tile
  uint32_t first_pixel;   // in that image
  uint64_t pixels;        // of the tile
  int lanes;
  bool offset_channels_last, mask_channels_last, wide, packed;
  bool large;  // an image's pixels, or those up to the tile's end, are beyond what a Divisor divides
};

// One tap of one offset group at one output pixel: where its numbers lie, and the point.
struct DeformConv2dPoint {
  uint32_t pixel;          // of the tile
  uint64_t number, image;  // of the image, and its first element
  uint32_t tap, channel;
  uint64_t dy, dx, mask;
  Sample<float, int32_t> sample;
  float factor;
};

CELLOPS_BODY uint64_t element_of(uint64_t image, uint32_t channels, uint32_t channel, uint32_t pixel, uint32_t pixels,
                                 bool channels_last) {
  const uint64_t within = channels_last ? uint64_t(pixel) * channels + channel : uint64_t(channel) * pixels + pixel;
  return image * channels * pixels + within;
}

// Where a tap looks without an offset.
CELLOPS_BODY int64_t undisturbed_row(const DeformConv2dView& view, uint32_t row, uint32_t tap) {
  return int64_t(row) * view.stride_height - view.pad_height +
         view.by_kernel_width.quotient(tap) * view.dilation_height;
}
CELLOPS_BODY int64_t undisturbed_column(const DeformConv2dView& view, uint32_t column, uint32_t tap) {
  const uint32_t within = tap - view.by_kernel_width.quotient(tap) * view.kernel_width;
  return int64_t(column) * view.stride_width - view.pad_width + within * view.dilation_width;
}

// The point of a tap of an offset group at a pixel of an image.
template <class T>
CELLOPS_BODY DeformConv2dPoint point_at(const DeformConv2dView& view, uint64_t image, uint32_t row, uint32_t column,
                                        uint32_t tap, uint32_t group, uint32_t group_channels, const void* offset,
                                        const T* mask) {
  DeformConv2dPoint p;
  p.number = image, p.tap = tap;
  p.channel = group * group_channels;
  p.image = image * view.channels * view.height * view.width;
  const uint32_t pixel = row * view.out_width + column;
  p.pixel = uint32_t((image - view.first_image) * view.out_pixels + pixel - view.first_pixel);

  const uint32_t points = view.offset_groups * view.taps, point = group * view.taps + p.tap;
  p.dy = element_of(image, 2 * points, 2 * point, pixel, view.out_pixels, view.offset_channels_last);
  p.dx = element_of(image, 2 * points, 2 * point + 1, pixel, view.out_pixels, view.offset_channels_last);
  p.mask = element_of(image, points, point, pixel, view.out_pixels, view.mask_channels_last);
  const auto shift = [&](uint64_t element) {
    return view.wide ? static_cast<const float*>(offset)[element] : to_compute(static_cast<const T*>(offset)[element]);
  };
  p.sample = sample_point<float, int32_t>(
      float(undisturbed_row(view, row, tap)) + shift(p.dy), float(undisturbed_column(view, column, tap)) + shift(p.dx),
      float(view.height), float(view.width), int32_t(view.width), int32_t(view.height - 1), int32_t(view.width - 1),
      0.f, not_a_number(), -1, ToInt(), ToReal());
  p.factor = mask ? to_compute(mask[p.mask]) : 1.f;
  return p;
}

// Items are numbered by pixel, tap and offset group.
template <class T>
CELLOPS_BODY DeformConv2dPoint point_of(const DeformConv2dView& view, uint32_t item, const void* offset,
                                        const T* mask) {
  const uint32_t sample = view.by_offset_groups.quotient(item), group = item - sample * view.offset_groups;
  const uint32_t number = view.by_taps.quotient(sample), tap = sample - number * view.taps;
  const uint64_t place = uint64_t(view.first_pixel) + number;
  const uint32_t images = uint32_t(view.large ? place / view.out_pixels : view.by_out_pixels.quotient(uint32_t(place)));
  const uint32_t pixel = uint32_t(place - uint64_t(images) * view.out_pixels);
  const uint32_t row = view.large ? pixel / view.out_width : view.by_out_width.quotient(pixel);
  return point_at(view, view.first_image + images, row, pixel - row * view.out_width, tap, group,
                  view.channels / view.offset_groups, offset, mask);
}

// The element of a tile's columns, [groups][pixels][taps][channels of a group], for a channel of the input.
CELLOPS_BODY uint64_t column_element(const DeformConv2dView& view, uint32_t pixel, uint32_t tap, uint32_t channel) {
  const uint32_t group = view.by_column_group.quotient(channel);
  return ((group * view.pixels + pixel) * view.taps + tap) * view.column_group + (channel - group * view.column_group);
}

template <int Count, class T>
CELLOPS_BODY void load_channels(const T* from, float* to) {
  if constexpr (Count == 1) {
    *to = to_compute(*from);
  } else {
    load_packs<Count>(from, to);
  }
}

template <int Count, class T>
CELLOPS_BODY void store_channels(T* to, const float* from) {
  if constexpr (Count == 1) {
    store_one(to, *from);
  } else {
    store_packs<Count>(to, from);
  }
}

// Calls work(number of channels as a constant, channel) for the thread's share of the point's channels.
template <class T>
struct DeformConv2dChannels {
  template <class Work>
  static CELLOPS_BODY void each(const DeformConv2dView& view, int lane, const Work& work) {
    const uint32_t count = view.channels / view.offset_groups;
    if (view.packed) {
      for (uint32_t c = lane * kPack<T>; c < count; c += view.lanes * kPack<T>) work(Packed(), c);
    } else {
      for (uint32_t c = lane; c < count; c += view.lanes) work(Single(), c);
    }
  }
  struct Packed {
    static constexpr int count = kPack<T>;
  };
  struct Single {
    static constexpr int count = 1;
  };
};

template <class T>
struct DeformConv2dColumnsBody {
  static constexpr int kThreads = 128, kBlocks = 8;  // 64 registers; by itself the compiler takes 56 and spills one
  static constexpr bool kBarriers = false;
  DeformConv2dView view;
  const T* input;
  const void* offset;
  const T* mask;
  T* columns;

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const uint32_t item = (uint64_t(block.index()) * kThreads + block.thread()) / view.lanes;
    if (item >= view.items) return;
    const DeformConv2dPoint p = point_of(view, item, offset, mask);
    const T* image = input + p.image + p.channel;
    DeformConv2dChannels<T>::each(view, block.thread() % view.lanes, [&](auto constant, uint32_t c) {
      constexpr int count = decltype(constant)::count;
      float sum[count] = {};
      CELLOPS_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float weight = p.sample.weight[k] * p.factor;
        float value[count] = {};
        if (p.sample.index[k] >= 0)
          load_channels<count>(image + uint64_t(p.sample.index[k]) * view.channels + c, value);
        CELLOPS_UNROLL
        for (int i = 0; i < count; ++i) sum[i] += weight * value[i];
      }
      store_channels<count>(columns + column_element(view, p.pixel, p.tap, p.channel + c), sum);
    });
  }
};

// The gradients of offset and mask, and the input's where Sum is int64_t, in fixed point; it is float where there is
// none to add. Writes columns over their gradients.
template <class T, class Sum>
struct DeformConv2dCornersBody {
  static constexpr bool kFixed = std::is_same_v<Sum, int64_t>;
  static constexpr int kThreads = 128, kBlocks = kFixed ? 5 : 0;
  static constexpr bool kBarriers = true;  // threads add up among neighbours
  DeformConv2dView view;
  const T* input;
  const void* offset;
  const T* mask;
  const T* grad_columns;
  const int32_t* exponents;
  int64_t* grad_input;  // added to
  void* grad_offset;    // or null
  T* grad_mask;         // or null
  T* columns;           // or null

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const uint64_t number = (uint64_t(block.index()) * kThreads + block.thread()) / view.lanes;
    const bool exists = number < view.items;
    const int lane = block.thread() % view.lanes;
    const DeformConv2dPoint p = point_of(view, exists ? uint32_t(number) : 0, offset, mask);
    float dots[4] = {};
    if (exists) {
      DeformConv2dChannels<T>::each(view, lane, [&](auto constant, uint32_t c) {
        constexpr int count = decltype(constant)::count;
        const uint64_t place = column_element(view, p.pixel, p.tap, p.channel + c);
        float grad[count], sum[count] = {};
        load_channels<count>(grad_columns + place, grad);
        CELLOPS_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float weight = p.sample.weight[k] * p.factor;
          const uint64_t element = p.image + uint64_t(p.sample.index[k]) * view.channels + p.channel + c;
          float value[count] = {};
          if (p.sample.index[k] >= 0) load_channels<count>(input + element, value);
          CELLOPS_UNROLL
          for (int i = 0; i < count; ++i) {
            if (p.sample.index[k] >= 0) dots[k] += grad[i] * value[i];
            sum[i] += weight * value[i];
          }
          if constexpr (kFixed) {
            const uint64_t plane = p.number * view.channels + p.channel + c;
            if (p.sample.index[k] < 0) continue;
            CELLOPS_UNROLL
            for (int i = 0; i < count; ++i) {
              add_fixed(block, grad_input + element + i, grad[i] * weight, exponents[plane + i]);
            }
          }
        }
        if (columns) store_channels<count>(columns + place, sum);
      });
    }
    if (!grad_offset && !grad_mask) return;
    CELLOPS_UNROLL
    for (int k = 0; k < 4; ++k) dots[k] = block.sum(dots[k], view.lanes);
    if (!exists || lane != 0) return;
    const auto& s = p.sample;
    if (grad_offset) {
      put_shift(p.dy, p.factor * derivative_y(s.right, dots[0], dots[1], dots[2], dots[3]));
      put_shift(p.dx, p.factor * derivative_x(s.bottom, dots[0], dots[1], dots[2], dots[3]));
    }
    if (grad_mask) {
      store_one(grad_mask + p.mask,
                s.weight[0] * dots[0] + s.weight[1] * dots[1] + s.weight[2] * dots[2] + s.weight[3] * dots[3]);
    }
  }

  CELLOPS_BODY void put_shift(uint64_t element, float value) const {
    if (view.wide) {
      static_cast<float*>(grad_offset)[element] = value;
    } else {
      store_one(static_cast<T*>(grad_offset) + element, value);
    }
  }
};

template <class T>
DeformConv2dView deform_conv2d_view(const DeformConv2dTileParams& p, bool addresses_aligned) {
  DeformConv2dView view{};
  const int64_t taps = p.kernel_height * p.kernel_width, items = p.count * taps * p.offset_groups;
  if (items * 32 >= int64_t(1) << 32) {
    throw std::invalid_argument("deform_conv2d: the CUDA kernels take fewer than 2^27 samples in one tile");
  }
  view.items = uint32_t(items), view.taps = uint32_t(taps), view.offset_groups = uint32_t(p.offset_groups);
  view.channels = uint32_t(p.in_channels), view.height = uint32_t(p.in_height), view.width = uint32_t(p.in_width);
  view.out_width = uint32_t(p.out_width), view.out_pixels = uint32_t(p.out_height * p.out_width);
  view.kernel_width = uint32_t(p.kernel_width);
  view.stride_height = uint32_t(p.stride_height), view.stride_width = uint32_t(p.stride_width);
  view.pad_height = uint32_t(p.pad_height), view.pad_width = uint32_t(p.pad_width);
  view.dilation_height = uint32_t(p.dilation_height), view.dilation_width = uint32_t(p.dilation_width);
  view.column_group = uint32_t(p.in_channels / p.column_groups);
  view.by_taps = Divisor(view.taps), view.by_offset_groups = Divisor(view.offset_groups);
  view.by_column_group = Divisor(view.column_group), view.by_kernel_width = Divisor(view.kernel_width);
  view.by_out_width = Divisor(view.out_width), view.by_out_pixels = Divisor(view.out_pixels);
  view.first_image = uint64_t(p.first) / view.out_pixels, view.first_pixel = uint32_t(p.first % view.out_pixels);
  view.pixels = uint64_t(p.count);
  view.large = uint64_t(view.first_pixel) + view.pixels > uint64_t(1) << 31 || view.out_pixels > 1u << 31;
  view.offset_channels_last = p.offset_channels_last, view.mask_channels_last = p.mask_channels_last;
  view.wide = p.offset_dtype == Dtype::float32 && p.dtype != Dtype::float32;
  const int64_t channels = p.in_channels / p.offset_groups;
  view.packed = addresses_aligned && channels % kPack<T> == 0 && view.column_group % kPack<T> == 0;
  const int64_t steps = view.packed ? channels / kPack<T> : channels;
  view.lanes = 1;
  while (view.lanes < 32 && view.lanes < steps) view.lanes *= 2;
  return view;
}

template <class Launcher>
void deform_conv2d_columns(const DeformConv2dTileParams& p, const DeformConv2dColumns& io, const Launcher& launcher) {
  with_storage_type("deform_conv2d", p.dtype, [&](auto type) {
    using T = decltype(type);
    const DeformConv2dView view = deform_conv2d_view<T>(p, aligned(io.input, io.columns));
    launcher.run(blocks_of(int64_t(view.items) * view.lanes, 128), 0,
                 DeformConv2dColumnsBody<T>{view, static_cast<const T*>(io.input), io.offset,
                                            static_cast<const T*>(io.mask), static_cast<T*>(io.columns)});
  });
}

template <class Launcher>
void deform_conv2d_corners(const DeformConv2dTileParams& p, const DeformConv2dCorners& io, const Launcher& launcher) {
  with_storage_type("deform_conv2d", p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto body) {
      body.view = deform_conv2d_view<T>(p, aligned(io.input, io.grad_columns, io.grad_input));
      body.input = static_cast<const T*>(io.input), body.offset = io.offset;
      body.mask = static_cast<const T*>(io.mask), body.grad_columns = static_cast<const T*>(io.grad_columns);
      body.exponents = static_cast<const int32_t*>(io.exponents);
      body.grad_input = static_cast<int64_t*>(io.grad_input), body.columns = static_cast<T*>(io.columns);
      body.grad_offset = io.grad_offset, body.grad_mask = static_cast<T*>(io.grad_mask);
      launcher.run(blocks_of(int64_t(body.view.items) * body.view.lanes, 128), 0, body);
    };
    io.grad_input ? launch(DeformConv2dCornersBody<T, int64_t>{}) : launch(DeformConv2dCornersBody<T, float>{});
  });
}

}  // namespace cellops::CELLOPS_ISA
