// How deformable convolution's taps and channels are cut into products of a bounded size.
#pragma once
#include "../cellops.h"
#include "../common/gemm.h"
#include "../common/parallel.h"

namespace cellops::CELLOPS_ISA {

// The weight's element strides: output channel, channel, tap.
struct WeightStrides {
  int64_t out, channel, tap;
  explicit WeightStrides(const DeformConv2dParams& p) {
    const int64_t channels = p.in_channels / p.groups, taps = p.kernel_height * p.kernel_width;
    out = channels * taps;
    channel = p.weight_channels_last ? 1 : taps;
    tap = p.weight_channels_last ? channels : 1;
  }
};

inline bool is_depthwise(const DeformConv2dParams& p) {
  return p.groups == p.in_channels && p.out_channels == p.in_channels;
}

// packed[tap][channel] of a depthwise convolution.
template <class T, class E>
inline void pack_depthwise(const DeformConv2dParams& p, const T* weight, E* packed) {
  const WeightStrides strides(p);
  for (int64_t tap = 0; tap < p.kernel_height * p.kernel_width; ++tap) {
    for (int64_t c = 0; c < p.in_channels; ++c) {
      from_compute(packed + tap * p.in_channels + c, to_compute(weight[c * strides.out + tap * strides.tap]));
    }
  }
}

// Threads that are worth waking: one for every 2^17 multiplications.
inline int team_size(const DeformConv2dParams& p, int threads) {
  const double products = double(p.batch) * double(p.out_height * p.out_width) *
                          double(p.kernel_height * p.kernel_width) * double(p.in_channels) *
                          double(p.out_channels / p.groups + 4);
  const double most = products / double(1 << 17);
  return most < 1 ? 1 : most < threads ? int(most) : threads;
}

// The team of a backward.
struct Grid {
  int groups, blocks;  // of images, of channels
};

// The grid that keeps the slowest thread shortest. A block costs its channels, plus about three vectors of work that
// every block repeats (points, the tile of grad_output).
inline Grid choose_grid(int threads, int64_t images, int64_t quanta, int64_t quantum_vectors) {
  Grid best{1, 1};
  int64_t best_cost = INT64_MAX;
  for (int blocks = 1; blocks <= threads && blocks <= quanta; ++blocks) {
    const int groups = int(min_of(threads / blocks, images));
    const int64_t cost = div_up(images, groups) * (div_up(quanta, blocks) * quantum_vectors + 3);
    if (cost < best_cost) best = {groups, blocks}, best_cost = cost;
  }
  return best;
}

// Units of the left operand's columns in a tile, and its row stride (not a power of two: cache sets).
template <class M>
inline constexpr int64_t kDepth = 1024 / int64_t(sizeof(typename M::Unit));
template <class M>
inline constexpr int64_t kRowStride = kDepth<M> + 64 / int64_t(sizeof(typename M::Unit));

// A run of channels at one tap, and the product that its columns take part in.
struct Segment {
  int64_t tap, channel, channels, column;
};
// Neighbouring columns of one group, multiplied at once with a block of packed weights.
struct Product {
  int64_t group, column, columns, packed, first_segment, last_segment;
};

// How the taps x channels of a convolution are cut into tiles of columns. One group: the columns run on over the
// taps. Several: one tap at a time, each group (or part of a large one) for itself.
template <class M>
class Plan {
 public:
  Plan(const DeformConv2dParams& p)
      : group_channels(p.in_channels / p.groups),
        group_outputs(p.out_channels / p.groups),
        panels(div_up(group_outputs, kPanel<typename M::Sum>)),
        room_(p.kernel_height * p.kernel_width * (p.groups * div_up(group_channels, kLimit) + 1) + 2),
        segments(room_),
        products(room_) {
    if (failed()) return;
    const int64_t taps = p.kernel_height * p.kernel_width;
    if (p.groups == 1) {
      const int64_t total = taps * p.in_channels, count = div_up(total, kLimit);
      const int64_t step = min_of(kLimit, round_up(div_up(total, count), 16 * M::depth));
      for (int64_t k = 0; k < total;) {
        open(0, 0);
        for (const int64_t end = min_of(total, k + step); k < end;) {
          const int64_t channel = k % p.in_channels, run = min_of(end - k, p.in_channels - channel);
          add(k / p.in_channels, channel, run);
          k += run;
        }
        close();
      }
    } else {
      const int64_t parts = div_up(group_channels, kLimit);
      const int64_t step = round_up(div_up(group_channels, parts), M::depth);
      for (int64_t tap = 0; tap < taps; ++tap) {
        int64_t column = 0;
        for (int64_t group = 0; group < p.groups; ++group) {
          for (int64_t c = 0; c < group_channels; c += step) {
            const int64_t run = min_of(step, group_channels - c);
            if (column + run > kLimit) column = 0;
            open(group, column);
            add(tap, group * group_channels + c, run);
            close();
            column += round_up(run, M::depth);
          }
        }
      }
    }
  }
  bool failed() const { return segments.failed() || products.failed(); }

  const int64_t group_channels, group_outputs, panels;

 private:
  static constexpr int64_t kLimit = kDepth<M> * M::depth;
  const int64_t room_;

  void open(int64_t group, int64_t column) {
    products.get()[product_count] = {group, column, 0, packed_size, segment_count, segment_count};
  }
  void add(int64_t tap, int64_t channel, int64_t channels) {
    Product& product = products.get()[product_count];
    segments.get()[segment_count++] = {tap, channel, channels, product.column + product.columns};
    product.columns += channels;
    product.last_segment = segment_count;
  }
  void close() {
    packed_size += panels * div_up(products.get()[product_count++].columns, M::depth) * kPanel<typename M::Sum>;
  }

 public:
  Buffer<Segment> segments;
  Buffer<Product> products;
  int64_t segment_count = 0, product_count = 0, packed_size = 0;
};

// Packs the weights of one product's panel: [depth][kPanel] units, zero past the last output channel and column.
// weight[o][c][t] lies at o * out_stride + c * channel_stride + t * tap_stride.
template <class M, class E, class T>
inline void pack_weight(const Plan<M>& plan, const Product& product, int64_t panel, const T* weight, int64_t out_stride,
                        int64_t channel_stride, int64_t tap_stride, E* packed) {
  constexpr int64_t width = kPanel<typename M::Sum>;
  const int64_t depth = div_up(product.columns, M::depth), first = panel * width;
  const int64_t outputs = min_of(width, plan.group_outputs - first);
  E* to = packed + (product.packed + panel * depth * width) * M::depth;
  if (outputs < width || depth * M::depth != product.columns) {
    __builtin_memset(to, 0, size_t(depth * width * M::depth) * sizeof(E));
  }
  weight += (product.group * plan.group_outputs + first) * out_stride;
  for (int64_t i = product.first_segment; i < product.last_segment; ++i) {
    const Segment& segment = plan.segments.get()[i];
    const T* from =
        weight + (segment.channel - product.group * plan.group_channels) * channel_stride + segment.tap * tap_stride;
    for (int64_t c = 0; c < segment.channels; ++c, from += channel_stride) {
      const int64_t k = segment.column - product.column + c;
      E* row = to + (k / M::depth) * width * M::depth + k % M::depth;
      for (int64_t o = 0; o < outputs; ++o) from_compute(row + o * M::depth, to_compute(from[o * out_stride]));
    }
  }
}

}  // namespace cellops::CELLOPS_ISA
