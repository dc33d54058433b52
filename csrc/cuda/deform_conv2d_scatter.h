// The input's gradient of deformable convolution: every sample gives its column's gradient, shared out by the bilinear
// weights, to four pixels.
//
// Added in memory one by one that would be four float32 additions for each column element, and the caches' additions,
// about 100 sectors of 32 bytes in a nanosecond on an H200, would be the bound of the whole backward pass: 9 ms for
// 1024,64,56,56 with nine taps. So a block adds up in shared memory what a rectangle of output pixels gives, all taps,
// and adds its region in memory once: 256 pixels at most for 64 with 36 corners each.
//
// A thread owns a channel. The shared memory that it adds to is its own, so that no addition waits for another and none
// is atomic (shared memory has no float32 addition; it would be a loop). The threads of a block, one warp, first find
// the points of a tap, two pixels each, then walk through them together: two reads of what all share, the gradient,
// four reads, four multiply-adds and four writes.
//
//   must move  a column's gradient once, E bytes; 32 bytes of shared memory read and written in float32, the bound:
//              2.3 ms for the above at 128 bytes a clock of each multiprocessor
//   waits      a sample's writes follow its reads by some 45 clocks, and the region, 33 KiB, leaves room for six blocks
#pragma once
#include <algorithm>
#include <stdexcept>

#include "deform_conv2d.h"

namespace cellops::CELLOPS_ISA {

template <class T>
struct DeformConv2dScatterBody {
  static constexpr int kThreads = 32, kBlocks = 0;
  static constexpr bool kBarriers = true;
  static constexpr int kSide = 8, kRegion = 16, kPixels = kRegion * kRegion;
  static constexpr int kRow = kThreads * sizeof(float);  // of a pixel; the one behind the region's is for what is lost

  // What all channels share of a sample. A corner is a byte of the region, or -1 - pixel where it lies beyond.
  struct alignas(16) Corners {
    int32_t place[4];
  };
  struct alignas(16) Weights {
    float weight[4];
  };
  static constexpr int64_t kSharedBytes =
      (kPixels + 1) * kThreads * sizeof(float) + kSide * kSide * (sizeof(Corners) + sizeof(Weights));

  DeformConv2dView view;
  uint32_t side;                                      // of a rectangle of output pixels, up to kSide
  uint32_t channel_blocks, columns, rows, first_row;  // blocks of an offset group's channels; rectangles of an image
  uint32_t out_rows;
  const void* offset;
  const T* mask;
  const T* grad_columns;
  float* grad_input;

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    float* region = block.template shared<float>();
    Corners* corners = reinterpret_cast<Corners*>(region + (kPixels + 1) * kThreads);
    Weights* weights = reinterpret_cast<Weights*>(corners + kSide * kSide);
    const int thread = block.thread();

    uint32_t number = block.index();
    const uint32_t channel_block = number % channel_blocks;
    number /= channel_blocks;
    const uint32_t group = number % view.offset_groups;
    number /= view.offset_groups;
    const uint32_t left = number % columns * side;
    number /= columns;
    const uint32_t top = (first_row + number % rows) * side;
    const uint64_t image = view.first_image + number / rows;

    // The rectangle's rows that are the tile's.
    const int64_t before = int64_t(image - view.first_image) * view.out_pixels - view.first_pixel;  // the tile's pixel
    const auto held = [&](uint32_t row) {
      const int64_t pixel = before + int64_t(row) * view.out_width;
      return row < out_rows && pixel >= 0 && pixel < int64_t(view.pixels);
    };
    uint32_t begin = 0, end = side;
    while (begin < side && !held(top + begin)) ++begin;
    while (end > begin && !held(top + end - 1)) --end;
    if (begin == end) return;
    const uint32_t wide = smaller(side, view.out_width - left);

    const uint32_t group_channels = view.channels / view.offset_groups;
    const uint32_t within = channel_block * kThreads + thread;
    const bool exists = within < group_channels;
    const uint32_t channel = group * group_channels + (exists ? within : 0);
    CELLOPS_UNROLL_BY(4)
    for (int i = thread; i < (kPixels + 1) * kThreads / 4; i += kThreads) reinterpret_cast<Words*>(region)[i] = Words{};

    const auto own = block.own(region + thread);

    // Calls work(number, row, column, point) for a tap of the rectangle's pixels that are the thread's.
    const auto each = [&](uint32_t tap, const auto& work) {
      for (uint32_t i = thread; i < side * side; i += kThreads) {
        const uint32_t row = i / side, column = i % side;
        if (row < begin || row >= end || column >= wide) continue;
        work(i, top + row, left + column,
             point_at(view, image, top + row, left + column, tap, group, group_channels, offset, mask));
      }
    };

    // The region's first pixel: around the undisturbed samples, moved by what the middle tap's are moved on average.
    const uint32_t kernel_height = view.by_kernel_width.quotient(view.taps);
    float moved_y = 0, moved_x = 0, inside = 0;
    each(view.taps / 2, [&](uint32_t, uint32_t row, uint32_t column, const DeformConv2dPoint& p) {
      if (!is_inside(p.sample)) return;
      moved_y += float(p.sample.top - undisturbed_row(view, row, p.tap));
      moved_x += float(p.sample.left - undisturbed_column(view, column, p.tap));
      inside += 1;
    });
    inside = block.sum(inside, kThreads), moved_y = block.sum(moved_y, kThreads);
    moved_x = block.sum(moved_x, kThreads);
    const float of = inside > 0 ? 1 / inside : 0;
    const int32_t region_y = first_of(undisturbed_row(view, top, 0), (side - 1) * view.stride_height, kernel_height,
                                      view.dilation_height, moved_y * of);
    const int32_t region_x = first_of(undisturbed_column(view, left, 0), (side - 1) * view.stride_width,
                                      view.kernel_width, view.dilation_width, moved_x * of);

    const T* const grads = grad_columns + column_element(view, 0, 0, channel);
    const uint64_t of_pixel = uint64_t(view.taps) * view.column_group;
    const auto load = [&](uint32_t tap, uint32_t row, float* to) {
      const uint64_t pixel = uint64_t(before + int64_t(top + row) * view.out_width) + left;
      const T* const from = grads + pixel * of_pixel + uint64_t(tap) * view.column_group;
      CELLOPS_UNROLL
      for (uint32_t i = 0; i < kSide; ++i) {
        if (i >= wide) break;
        to[i] = to_compute(from[i * of_pixel]);
      }
    };
    float grad[kSide] = {}, next[kSide] = {};
    load(0, begin, next);
    for (uint32_t tap = 0; tap < view.taps; ++tap) {
      block.sync();
      each(tap, [&](uint32_t i, uint32_t, uint32_t, const DeformConv2dPoint& p) {
        const int32_t y = p.sample.top - region_y, x = p.sample.left - region_x;
        Corners found;
        Weights shares;
        CELLOPS_UNROLL
        for (int k = 0; k < 4; ++k) {
          const uint32_t row = uint32_t(y + k / 2), column = uint32_t(x + k % 2);
          const bool near = row < kRegion && column < kRegion;
          shares.weight[k] = p.sample.weight[k] * p.factor;
          found.place[k] = p.sample.index[k] < 0 ? kPixels * kRow
                           : near                ? int32_t(row * kRegion + column) * kRow
                                                 : -1 - p.sample.index[k];
        }
        corners[i] = found, weights[i] = shares;
      });
      block.sync();
      for (uint32_t row = begin; row < end; ++row) {
        CELLOPS_UNROLL
        for (int i = 0; i < kSide; ++i) grad[i] = next[i];
        if (row + 1 < end) {
          load(tap, row + 1, next);
        } else if (tap + 1 < view.taps) {
          load(tap + 1, begin, next);
        }
        Corners to[kSide];  // read before any sum is written, which might be where they are for all the compiler knows
        Weights shares[kSide];
        CELLOPS_UNROLL
        for (uint32_t i = 0; i < kSide; ++i) {
          if (i >= wide) break;
          to[i] = corners[row * side + i], shares[i] = weights[row * side + i];
        }
        CELLOPS_UNROLL
        for (uint32_t i = 0; i < kSide; ++i) {
          if (i >= wide) break;
          give(block, to[i], shares[i], grad[i], own, image, channel, exists);
        }
      }
    }

    if (!exists) return;
    float* const of_image = grad_input + image * view.height * view.width * view.channels + channel;
    CELLOPS_UNROLL_BY(4)
    for (int i = 0; i < kPixels; ++i) {
      const int32_t y = region_y + i / kRegion, x = region_x + i % kRegion;
      const float sum = block.get(own, i * kRow);
      if (uint32_t(y) < view.height && uint32_t(x) < view.width && sum != 0) {
        block.add(of_image + (uint64_t(y) * view.width + x) * view.channels, sum);
      }
    }
  }

  template <class Block, class Own>
  CELLOPS_BODY void give(const Block& block, const Corners& to, const Weights& shares, float grad, Own own,
                         uint64_t image, uint32_t channel, bool exists) const {
    const int32_t beyond = to.place[0] | to.place[1] | to.place[2] | to.place[3];
    if (beyond < 0) {  // so for all threads
      for (int k = 0; k < 4; ++k) {
        const float share = grad * shares.weight[k];
        if (to.place[k] >= 0) {
          block.set(own, to.place[k], block.get(own, to.place[k]) + share);
        } else if (exists) {
          const uint64_t pixel = image * view.height * view.width + uint32_t(-1 - to.place[k]);
          block.add(grad_input + pixel * view.channels + channel, share);
        }
      }
      return;
    }
    float sum[4];
    CELLOPS_UNROLL
    for (int k = 0; k < 4; ++k) sum[k] = block.get(own, to.place[k]) + grad * shares.weight[k];
    CELLOPS_UNROLL
    for (int k = 0; k < 4; ++k) block.set(own, to.place[k], sum[k]);
  }

  static CELLOPS_BODY bool is_inside(const Sample<float, int32_t>& s) {
    return s.index[0] >= 0 || s.index[1] >= 0 || s.index[2] >= 0 || s.index[3] >= 0;
  }
  // Of the samples from `first` on, between the outermost of which lie `apart` and the taps, as far from both ends.
  static CELLOPS_BODY int32_t first_of(int64_t first, uint32_t apart, uint32_t taps, uint32_t dilation, float moved) {
    const int64_t span = int64_t(apart) + int64_t(taps - 1) * dilation + 2;
    return int32_t(first + int64_t(moved + (moved < 0 ? -0.5f : 0.5f)) - (kRegion - span) / 2);
  }
};

// Of rectangles of eight by eight output pixels the region holds the undisturbed samples and one more pixel around them
// where kernel, stride and dilation are small; of others, four by four.
inline uint32_t scatter_side(const DeformConv2dTileParams& p) {
  const auto span = [](int64_t side, int64_t stride, int64_t kernel, int64_t dilation) {
    return (side - 1) * stride + (kernel - 1) * dilation + 2;
  };
  const bool fits = std::max(span(8, p.stride_height, p.kernel_height, p.dilation_height),
                             span(8, p.stride_width, p.kernel_width, p.dilation_width)) <= 14;
  return fits ? 8 : 4;
}

template <class Launcher>
void deform_conv2d_scatter(const DeformConv2dTileParams& p, const DeformConv2dScatter& io, const Launcher& launcher) {
  if (p.first % p.out_width || p.count % p.out_width) {
    throw std::invalid_argument("deform_conv2d: the tile of a scatter must be whole rows of output pixels");
  }
  with_storage_type("deform_conv2d", p.dtype, [&](auto type) {
    using T = decltype(type);
    using Body = DeformConv2dScatterBody<T>;
    Body body{};
    body.view = deform_conv2d_view<T>(p, false);
    body.offset = io.offset, body.mask = static_cast<const T*>(io.mask);
    body.grad_columns = static_cast<const T*>(io.grad_columns), body.grad_input = static_cast<float*>(io.grad_input);
    const int64_t side = body.side = scatter_side(p);
    const int64_t first = p.first / p.out_width, last = (p.first + p.count) / p.out_width - 1;  // rows of all images
    const int64_t images = last / p.out_height - first / p.out_height + 1;
    body.channel_blocks = uint32_t(blocks_of(p.in_channels / p.offset_groups, Body::kThreads));
    body.out_rows = uint32_t(p.out_height), body.columns = uint32_t(blocks_of(p.out_width, side));
    body.first_row = images == 1 ? uint32_t(first % p.out_height / side) : 0;
    const int64_t end_row = images == 1 ? last % p.out_height : p.out_height - 1;
    body.rows = uint32_t(end_row / side + 1 - body.first_row);
    launcher.run(images * body.rows * body.columns * p.offset_groups * body.channel_blocks, Body::kSharedBytes, body);
  });
}

}  // namespace cellops::CELLOPS_ISA
