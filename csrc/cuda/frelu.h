// The funnel activation, y = max(x, (z - mean) * scale + shift) with z = dwconv(x, weight): bodies and launches.
//
// A block takes a tile of `rows` x `columns` pixels of `channel_block` channels of an image into shared memory, with
// the halo that the funnel needs, in 16-byte loads where sizes allow. A thread keeps to one channel and walks down
// columns of eight rows; a window of 3x3 moves along in registers: three reads from shared memory for each result.
//
//   forward    reads x, writes y: 2 E bytes an element, for E bytes of storage
//   statistics reads x and writes three numbers a channel and part: E bytes an element
//   sums       reads x and grad_output and writes two
//   backward   reads x and grad_output, writes the gradient of x and sums: 3 E bytes an element. The gradient of the
//              convolution stays in shared memory; it is computed again where halos overlap.
#pragma once
#include <stdexcept>

#include "frelu_tile.h"

namespace cellops::CELLOPS_ISA {

template <class T, int Kernel>
struct FreluForwardBody {
  static constexpr int kThreads = kFreluThreads, kBlocks = 0;
  static constexpr bool kBarriers = true;
  FreluView view;
  const T *input, *weight;
  const float *mean, *scale, *shift;
  T* output;

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const FreluGrid grid(view, view.half, kPack<T>);
    T* tile = block.template shared<T>();
    const FreluPlace place = place_of(view, block.index() / view.channel_blocks, block.index() % view.channel_blocks);
    load_tile(block, view, place, input, view.half, grid, tile);
    block.sync();
    const FreluThread own(view, block.thread());
    const uint32_t channel = place.channel + own.channel;
    if (channel >= view.channels) return;
    const FreluTaps<Kernel, T> taps(view, weight, channel);
    const float m = channel_value(mean, channel, 0), s = channel_value(scale, channel, 1),
                b = channel_value(shift, channel, 0);
    each_segment_inside(view, place, own, [&](int row, int column, int count) {
      T* to = output + place.image + view.element(channel, place.row + row, place.column + column);
      const uint64_t stride = view.channels_last ? uint64_t(view.width) * view.channels : view.width;
      walk_down<Kernel>(tile + grid.at(own.channel, row, column), grid, view.kernel, count,
                        [&](int, const FreluWindow<Kernel, T>& window) {
                          const float value = window.middle();
                          const float other = (taps.template convolve<false>(window) - m) * s + b;
                          store_one(to, value > other || value != value ? value : other);
                          to += stride;
                        });
    });
  }
};

// Number, mean and squared distances from the mean of the convolution's results in a part of the tiles.
//
// A thread measures a tile's results from its mean so far, at first from its first result, and then moves the mean:
// with s and q the sums of those distances and of their squares, and n the results up to here, the mean moves by s / n
// and the squared distances grow by q - s * s / n (Chan et al. 1979). That difference loses few digits wherever an
// outlier is: the distance from the mean that its tile starts from counts among the squared distances too.
template <class T, int Kernel>
struct FreluStatisticsBody {
  static constexpr int kThreads = kFreluThreads, kBlocks = 6;
  static constexpr bool kBarriers = true;
  FreluView view;
  const T *input, *weight;
  float* statistics;  // [parts, 3, C]

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const FreluGrid grid(view, view.half, kPack<T>);
    T* tile = block.template shared<T>();
    const FreluPart part(view, block.index(), block.thread());
    const FreluTaps<Kernel, T> taps(view, weight, part.channel);
    float count = 0, mean = 0, squares = 0;
    each_tile(block, view, part, input, view.half, grid, tile, [&](const FreluPlace& place) {
      float sum = 0, square = 0, found = count;
      each_segment_inside(view, place, part.own, [&](int row, int column, int results) {
        const bool first = found == 0;
        walk_down<Kernel>(tile + grid.at(part.own.channel, row, column), grid, view.kernel, results,
                          [&](int r, const FreluWindow<Kernel, T>& window) {
                            const float z = taps.template convolve<false>(window);
                            if (first && r == 0) mean = z;
                            const float distance = z - mean;
                            sum += distance;
                            square += distance * distance;
                          });
        found += float(results);
      });
      if (found == count) return;
      const float step = sum / found;
      count = found;
      mean += step;
      squares += square - sum * step;
    });
    block.sync();
    float* values = block.template shared<float>();
    values[block.thread()] = count;
    values[kThreads + block.thread()] = mean;
    values[2 * kThreads + block.thread()] = squares;
    block.sync();
    if (part.exists && part.own.item == 0) put_total(values, part);
  }

  // Of the threads that keep to a channel, in their order.
  CELLOPS_BODY void put_total(const float* values, const FreluPart& part) const {
    const float start = values[kThreads + FreluThread::of(view, part.own.channel, 0)];
    float count = 0, sum = 0, squares = 0;
    for (int i = 0; i < part.own.step; ++i) {
      const int thread = FreluThread::of(view, part.own.channel, i);
      count += values[thread];
      sum += values[thread] * (values[kThreads + thread] - start);
    }
    const float step = sum / count;
    for (int i = 0; i < part.own.step; ++i) {
      const int thread = FreluThread::of(view, part.own.channel, i);
      const float distance = values[kThreads + thread] - start - step;
      squares += values[2 * kThreads + thread] + values[thread] * distance * distance;
    }
    float* to = statistics + uint64_t(part.part) * 3 * view.channels + part.channel;
    to[0] = count, to[view.channels] = start + step, to[2 * uint64_t(view.channels)] = squares;
  }
};

// Sums over the results of a part of the tiles: of the gradient that goes through the convolution, and of it times
// z - mean.
template <class T, int Kernel>
struct FreluSumsBody {
  static constexpr int kThreads = kFreluThreads, kBlocks = 5;
  static constexpr bool kBarriers = true;
  FreluView view;
  const T *grad_output, *input, *weight;
  const float *mean, *scale, *shift;
  float* sums;  // [parts, 2, C]

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const FreluGrid grid(view, view.half, kPack<T>);
    T* tile = block.template shared<T>();
    const FreluPart part(view, block.index(), block.thread());
    const FreluTaps<Kernel, T> taps(view, weight, part.channel);
    const float m = channel_value(mean, part.channel, 0), s = channel_value(scale, part.channel, 1),
                b = channel_value(shift, part.channel, 0);
    float sum = 0, product = 0;
    each_tile(block, view, part, input, view.half, grid, tile, [&](const FreluPlace& place) {
      if (!part.exists) return;
      each_segment_inside(view, place, part.own, [&](int row, int column, int count) {
        walk_down<Kernel>(tile + grid.at(part.own.channel, row, column), grid, view.kernel, count,
                          [&](int r, const FreluWindow<Kernel, T>& window) {
                            const uint64_t element =
                                view.element(part.channel, place.row + row + r, place.column + column);
                            const float grad = to_compute(grad_output[place.image + element]);
                            const float z = taps.template convolve<false>(window) - m;
                            const float through = gradient_of_first(grad, z * s + b, window.middle());
                            sum += through;
                            product += through * z;
                          });
      });
    });
    block.sync();
    float* values = block.template shared<float>();
    values[block.thread()] = sum;
    values[kThreads + block.thread()] = product;
    block.sync();
    if (!part.exists || part.own.item != 0) return;
    float* to = sums + uint64_t(part.part) * 2 * view.channels + part.channel;
    to[0] = total_of_channel(view, values, part.own.channel);
    to[view.channels] = total_of_channel(view, values + kThreads, part.own.channel);
  }

  // Of the values of the threads that keep to a channel, in their order.
  static CELLOPS_BODY float total_of_channel(const FreluView& view, const float* values, int channel) {
    float total = 0;
    for (int i = 0; i < kFreluThreads / view.channel_block; ++i) total += values[FreluThread::of(view, channel, i)];
    return total;
  }
};

template <class T, int Kernel>
struct FreluBackwardBody {
  static constexpr int kThreads = kFreluThreads, kBlocks = 4;
  static constexpr bool kBarriers = true;
  static constexpr int kTaps = Kernel * Kernel;
  using Sums = FreluSumsBody<T, Kernel>;
  FreluView view;
  const T *grad_output, *input, *weight;
  const float *mean, *scale, *shift;
  const float *by_value, *by_one;  // what the statistics add to the convolution's gradient: z' * by_value + by_one
  T* grad_input;
  float* sums;  // [parts, C, kernel * kernel + 2]: gradients of the taps, sum of the gradient through, and times z'

  template <class Block>
  CELLOPS_BODY void operator()(const Block& block) const {
    const int half = view.half, taps_count = view.kernel * view.kernel;
    const FreluGrid wide(view, 2 * half, kPack<T>), near(view, half, 1), inner(view, 0, 1);
    T* tile = block.template shared<T>();
    float* gradients = reinterpret_cast<float*>(tile + (wide.size + 7) / 8 * 8);
    float* direct = gradients + near.size;
    float* values = direct + inner.size;
    const FreluPart part(view, block.index(), block.thread());
    const FreluThread& own = part.own;
    const uint32_t channel = part.channel;
    const bool exists = part.exists;
    const FreluTaps<Kernel, T> taps(view, weight, channel);
    const float m = channel_value(mean, channel, 0), s = channel_value(scale, channel, 1),
                b = channel_value(shift, channel, 0), bv = channel_value(by_value, channel, 0),
                bo = channel_value(by_one, channel, 0);
    float tap_sums[Kernel ? kTaps : 1] = {}, sum = 0, product = 0;
    float* own_sums = sums + (uint64_t(part.part) * view.channels + channel) * (taps_count + 2);

    each_tile(block, view, part, input, 2 * half, wide, tile, [&](const FreluPlace& place) {
      each_segment(own, view.rows + 2 * half, view.columns + 2 * half, [&](int start, int x, int count) {
        const int64_t column = int64_t(place.column) + x - half, row = int64_t(place.row) + start - half;
        const bool inside = exists && column >= 0 && column < int64_t(view.width);
        walk_down<Kernel>(
            tile + wide.at(own.channel, start, x), wide, view.kernel, count,
            [&](int r, const FreluWindow<Kernel, T>& window) {
              float result = 0;
              if (inside && row + r >= 0 && row + r < int64_t(view.height)) {
                const uint64_t element = view.element(channel, uint32_t(row + r), uint32_t(column));
                const float grad = to_compute(grad_output[place.image + element]), value = window.middle();
                const float z = taps.template convolve<false>(window) - m, other = z * s + b;
                const float through = gradient_of_first(grad, other, value);
                result = through * s;
                if (by_value) result += z * bv + bo;
                const int inner_row = start + r - half, inner_column = x - half;
                if (inner_row >= 0 && inner_row < view.rows && inner_column >= 0 && inner_column < view.columns) {
                  direct[inner.at(own.channel, inner_row, inner_column)] = gradient_of_first(grad, value, other);
                  sum += through;
                  product += through * z;
                  constexpr int side = Kernel ? Kernel : 1;
                  CELLOPS_UNROLL
                  for (int t = 0; t < kTaps; ++t) tap_sums[t] += result * window.at(t / side, t % side);
                }
              }
              gradients[near.at(own.channel, start + r, x)] = result;
            });
      });
      block.sync();
      if (exists) {
        each_segment_inside(view, place, own, [&](int row, int column, int count) {
          walk_down<Kernel>(
              gradients + near.at(own.channel, row, column), near, view.kernel, count,
              [&](int r, const FreluWindow<Kernel, float>& window) {
                const float through = taps.template convolve<true>(window);
                store_one(grad_input + place.image + view.element(channel, place.row + row + r, place.column + column),
                          direct[inner.at(own.channel, row + r, column)] + through);
              });
        });
      }
      if constexpr (Kernel == 0) {
        for (int t = 0; t < taps_count; ++t) {
          const float total = tap_sum(place, own, exists, tile, wide, gradients, near, t);
          const float all = total_of(block, values, total, own);
          if (exists && own.item == 0) own_sums[t] += all;
        }
      }
    });
    block.sync();
    CELLOPS_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      const float all = total_of(block, values, tap_sums[t], own);
      if (exists && own.item == 0) own_sums[t] = all;
    }
    const float all_through = total_of(block, values, sum, own), all_products = total_of(block, values, product, own);
    if (exists && own.item == 0) own_sums[taps_count] = all_through, own_sums[taps_count + 1] = all_products;
  }

  // The total over the threads that keep to a channel, for the first of them.
  template <class Block>
  CELLOPS_BODY float total_of(const Block& block, float* values, float value, const FreluThread& own) const {
    values[block.thread()] = value;
    block.sync();
    const float total = own.item == 0 ? Sums::total_of_channel(view, values, own.channel) : 0.f;
    block.sync();
    return total;
  }

  // What the tile's results that fall to a thread give to tap t.
  CELLOPS_BODY float tap_sum(const FreluPlace& place, const FreluThread& own, bool exists, const T* tile,
                             const FreluGrid& wide, const float* gradients, const FreluGrid& near, int t) const {
    float sum = 0;
    for (int i = own.item; exists && i < view.rows * view.columns; i += own.step) {
      const int r = i / view.columns, x = i % view.columns;
      if (place.row + r >= view.height || place.column + x >= view.width) continue;
      sum += gradients[near.at(own.channel, r + view.half, x + view.half)] *
             to_compute(tile[wide.at(own.channel, r + view.half + t / view.kernel, x + view.half + t % view.kernel)]);
    }
    return sum;
  }
};

inline FreluView frelu_view(const FreluTileParams& p, int pack, bool addresses_aligned) {
  FreluView view{};
  view.images = uint32_t(p.batch), view.channels = uint32_t(p.channels);
  view.height = uint32_t(p.height), view.width = uint32_t(p.width);
  view.kernel = int(p.kernel), view.half = int(p.kernel) / 2;
  view.channel_block = int(p.channel_block), view.rows = int(p.rows), view.columns = int(p.columns);
  view.parts = int(p.parts);
  view.channel_blocks = uint32_t(blocks_of(p.channels, p.channel_block));
  view.tiles_y = uint32_t(blocks_of(p.height, p.rows)), view.tiles_x = uint32_t(blocks_of(p.width, p.columns));
  view.channels_last = p.channels_last;
  view.packed = addresses_aligned && (p.channels_last ? p.channels % pack == 0 && p.channel_block % pack == 0
                                                      : p.width % pack == 0 && p.columns % pack == 0);
  const int64_t tiles = p.batch * view.tiles_y * view.tiles_x;
  if (tiles * view.channel_blocks >= int64_t(1) << 31) {
    throw std::invalid_argument("frelu: the CUDA kernels take fewer than 2^31 tiles");
  }
  if (p.channel_block > 64 || kFreluThreads % p.channel_block || p.channel_block < 1 || p.rows < 1 || p.columns < 1 ||
      p.parts < 1) {
    throw std::invalid_argument("frelu: a tile of these sizes cannot be");
  }
  return view;
}

inline int64_t checked_shared(int64_t bytes) {
  if (bytes > kSharedBytes) throw std::invalid_argument("frelu: the tile does not fit in 48 KiB of shared memory");
  return bytes;
}

// Bytes of a tile, and after it of so many numbers for each thread.
template <class T>
int64_t shared_of_sums(const FreluView& view, int numbers) {
  const int64_t tile = int64_t(sizeof(T)) * FreluGrid(view, view.half, kPack<T>).size;
  const int64_t values = int64_t(sizeof(float)) * numbers * kFreluThreads;
  return tile > values ? tile : values;
}

// work(Body) for the body of a template at the storage type and the kernel's size.
template <template <class, int> class Body, class Launch>
void with_frelu_body(const FreluTileParams& p, const Launch& launch) {
  with_storage_type("frelu", p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.kernel == 3) {
      launch(Body<T, 3>(), type);
    } else {
      launch(Body<T, 0>(), type);
    }
  });
}

template <class Launcher>
void frelu_forward(const FreluTileParams& p, const FreluTileForward& io, const Launcher& launcher) {
  with_frelu_body<FreluForwardBody>(p, [&](auto body, auto type) {
    using T = decltype(type);
    body.view = frelu_view(p, kPack<T>, aligned(io.input));
    body.input = static_cast<const T*>(io.input), body.weight = static_cast<const T*>(io.weight);
    body.mean = static_cast<const float*>(io.mean), body.scale = static_cast<const float*>(io.scale);
    body.shift = static_cast<const float*>(io.shift), body.output = static_cast<T*>(io.output);
    const FreluView& view = body.view;
    const int64_t bytes = int64_t(sizeof(T)) * FreluGrid(view, view.half, kPack<T>).size;
    launcher.run(int64_t(view.images) * view.tiles_y * view.tiles_x * view.channel_blocks, checked_shared(bytes), body);
  });
}

template <class Launcher>
void frelu_statistics(const FreluTileParams& p, const FreluTileStatistics& io, const Launcher& launcher) {
  with_frelu_body<FreluStatisticsBody>(p, [&](auto body, auto type) {
    using T = decltype(type);
    body.view = frelu_view(p, kPack<T>, aligned(io.input));
    body.input = static_cast<const T*>(io.input), body.weight = static_cast<const T*>(io.weight);
    body.statistics = static_cast<float*>(io.statistics);
    const int64_t bytes = shared_of_sums<T>(body.view, 3);
    if (p.batch) launcher.run(p.parts * body.view.channel_blocks, checked_shared(bytes), body);
  });
}

template <class Launcher>
void frelu_sums(const FreluTileParams& p, const FreluTileSums& io, const Launcher& launcher) {
  with_frelu_body<FreluSumsBody>(p, [&](auto body, auto type) {
    using T = decltype(type);
    body.view = frelu_view(p, kPack<T>, aligned(io.input));
    body.grad_output = static_cast<const T*>(io.grad_output);
    body.input = static_cast<const T*>(io.input), body.weight = static_cast<const T*>(io.weight);
    body.mean = static_cast<const float*>(io.mean), body.scale = static_cast<const float*>(io.scale);
    body.shift = static_cast<const float*>(io.shift);
    body.sums = static_cast<float*>(io.sums);
    const int64_t bytes = shared_of_sums<T>(body.view, 2);
    if (p.batch) launcher.run(p.parts * body.view.channel_blocks, checked_shared(bytes), body);
  });
}

template <class Launcher>
void frelu_backward(const FreluTileParams& p, const FreluTileBackward& io, const Launcher& launcher) {
  with_frelu_body<FreluBackwardBody>(p, [&](auto body, auto type) {
    using T = decltype(type);
    body.view = frelu_view(p, kPack<T>, aligned(io.input));
    body.grad_output = static_cast<const T*>(io.grad_output);
    body.input = static_cast<const T*>(io.input), body.weight = static_cast<const T*>(io.weight);
    body.mean = static_cast<const float*>(io.mean), body.scale = static_cast<const float*>(io.scale);
    body.shift = static_cast<const float*>(io.shift);
    body.by_value = static_cast<const float*>(io.by_value), body.by_one = static_cast<const float*>(io.by_one);
    body.grad_input = static_cast<T*>(io.grad_input), body.sums = static_cast<float*>(io.sums);
    const FreluView& view = body.view;
    const int64_t tile = (FreluGrid(view, 2 * view.half, kPack<T>).size + 7) / 8 * 8;
    const int64_t floats = FreluGrid(view, view.half, 1).size + FreluGrid(view, 0, 1).size + kFreluThreads;
    const int64_t bytes = tile * int64_t(sizeof(T)) + floats * int64_t(sizeof(float));
    if (p.batch) launcher.run(p.parts * view.channel_blocks, checked_shared(bytes), body);
  });
}

}  // namespace cellops::CELLOPS_ISA
