// Backward of deformable convolution, one tile of output pixels and one tap at a time:
//
//   grad_columns = grad_output x weight[tap]                      a product over output channels
//   one pass over the four corners of every pixel:
//     dots[i]    = sum over channels of grad_columns * corner i   -> gradients of offset and mask
//     columns    = the forward's samples again                    -> grad_weight[tap] += grad_output^T x columns
//     grad_input[corner i] += weight i * grad_columns
//
// The team is a grid of image groups x channel blocks. A thread owns its block of its images' input gradient and its
// block of its group's weight gradient, so nothing is added by two threads; what several blocks of one offset group
// have to say about an offset is summed in the order of the blocks.
#include "../cellops.h"
#include "../common/gemm.h"
#include "../common/layout.h"
#include "../common/parallel.h"
#include "deform_conv2d_plan.h"
#include "deform_conv2d_points.h"

namespace cellops::CELLOPS_ISA {
namespace {

// Channels of one conv group inside a thread's block.
struct Range {
  int64_t group, channel, channels;
  int64_t column;  // of its first channel in the block
  int64_t panel;   // of its packed weights among all ranges
};

template <class T, class M>
class Backward {
  using S = Compute<T>;
  using E = typename M::Element;
  using Unit = typename M::Unit;

 public:
  Backward(const DeformConv2dParams& p, const DeformConv2dBackward& io, int threads)
      : p_(p),
        io_(io),
        threads_(team_size(p, threads)),
        depthwise_(is_depthwise(p)),
        taps_(p.kernel_height * p.kernel_width),
        pixels_(p.out_height * p.out_width),
        in_pixels_(p.in_height * p.in_width),
        group_channels_(p.in_channels / p.groups),
        group_outputs_(p.out_channels / p.groups),
        offset_group_channels_(p.in_channels / p.offset_groups),
        quantum_(p.groups == 1 || group_channels_ % kPanel<S> == 0 ? kPanel<S>
                 : depthwise_                                      ? kLanes<S>
                                                                   : group_channels_),
        quanta_(div_up(p.in_channels, quantum_)),
        unit_outputs_(round_up(group_outputs_, M::depth)),
        grad_row_(round_up(p.groups * unit_outputs_, kLanes<S>) + kPanel<S>),
        weight_room_(depthwise_ ? 1 : round_up(group_outputs_, kOuterRows)),
        channel_room_(depthwise_ ? p.in_channels : round_up(group_channels_, kLanes<S>)),
        weight_size_((depthwise_ ? 1 : p.groups * weight_room_) * taps_ * channel_room_ + kPanel<S>),
        needs_offset_(io.grad_offset || io.grad_mask),
        needs_columns_(io.grad_weight),
        needs_grad_columns_(needs_offset_ || io.grad_input),
        direct_(io.grad_input && p.input_channels_last && sizeof(T) == sizeof(S)) {}

  bool run() {
    bool failed = false;
    Shared shared;
    parallel(threads_, [&](Team team) {
      if (team.index == 0) {
        plan(team.size, &shared);
        if (shared.failed()) failed = true;
      }
      team.barrier();
      if (shared.failed()) return;
      const int group = team.index / shared.grid.blocks, block = team.index % shared.grid.blocks;
      const bool working = group < shared.grid.groups;
      const int64_t first = boundary(block, shared), last = boundary(block + 1, shared);
      Thread own(*this, working ? last - first : 1);
      clear(team, shared);
      pack(team, shared);
      if (!team.all(!own.failed(), &failed)) return;
      for (int64_t image = group; image - group < p_.batch; image += shared.grid.groups) {
        if (working && image < p_.batch) image_backward(image, group, block, shared, own);
        if (needs_offset_ && shared.grid.blocks > 1) {
          team.barrier();
          if (working && image < p_.batch) join_blocks(image, group, block, shared);
          team.barrier();
        }
      }
      team.barrier();
      finish(team, shared);
    });
    return !failed;
  }

 private:
  struct Shared {
    Grid grid{1, 1};
    Buffer<Range> ranges;
    Buffer<int64_t> first_range;  // of each block, and one past the last
    Buffer<E> packed;
    Buffer<S> weight;     // sums of each image group
    Buffer<double> bias;  // the same, one pixel after the other
    Buffer<S> partial;    // offset and mask gradients of each (group, block), where blocks must be joined
    Buffer<T> zero;
    int64_t panels = 0;
    bool failed() const {
      return ranges.failed() || first_range.failed() || packed.failed() || weight.failed() || bias.failed() ||
             partial.failed() || zero.failed();
    }
  };

  // What a thread keeps to itself.
  struct Thread {
    Thread(const Backward& op, int64_t channels)
        : stride(round_up(channels, kLanes<S>) + kPanel<S>),
          limit(max_of(kRows, min_of(min_of(kTile, (int64_t(1) << 17) / (op.grad_row_ + 2 * stride) / kRows * kRows),
                                     round_up(op.pixels_, kRows)))),
          grad(limit * op.grad_row_),
          pairs(M::depth > 1 ? round_up(limit / 2, kTilePairs) : 0),
          grad_elements(M::depth > 1 ? limit * op.grad_row_ : 0),
          grad_pairs(pairs * op.grad_row_),
          grad_planes(uses_tiles ? pairs * op.grad_row_ : 0),
          grad_columns(limit * stride),
          columns(limit * stride),
          column_pairs(pairs * stride),
          dots(limit * 4),
          outside(stride),
          rows(op.p_.input_channels_last ? 0 : op.in_pixels_ * channels),
          grad_rows(op.io_.grad_input && !op.direct_ ? op.in_pixels_ * channels : 0),
          tile(1),
          corners(1),
          points(op.p_, op.io_.offset, op.io_.mask) {
      if (failed()) return;
      grad.zero(), grad_elements.zero(), grad_pairs.zero(), columns.zero(), column_pairs.zero();
      outside.zero(), tile.zero(), corners.zero();
    }
    bool failed() const {
      return grad.failed() || grad_elements.failed() || grad_pairs.failed() || grad_planes.failed() ||
             grad_columns.failed() || columns.failed() || column_pairs.failed() || dots.failed() || outside.failed() ||
             rows.failed() || grad_rows.failed() || tile.failed() || corners.failed();
    }
    const int64_t stride, limit;
    const Buffer<S> grad;            // [pixel][output channel]
    const int64_t pairs;             // room for pairs of pixels
    const Buffer<E> grad_elements;   // grad in pairs of channels
    const Buffer<Unit> grad_pairs;   // in pairs of pixels
    const Buffer<Unit> grad_planes;  // the pairs as [output channel][pair], for products in tiles
    const Buffer<S> grad_columns, columns;
    const Buffer<Unit> column_pairs;
    const Buffer<S> dots, outside;
    const Buffer<T> rows;
    const Buffer<S> grad_rows;
    const Buffer<Tile<S>> tile;
    const Buffer<Corners<S>> corners;
    Points<T> points;
  };

  int64_t boundary(int64_t block, const Shared& shared) const {
    return min_of(quanta_ * block / shared.grid.blocks * quantum_, p_.in_channels);
  }

  void plan(int threads, Shared* shared) const {
    shared->grid = choose_grid(threads, max_of(p_.batch, 1), quanta_, div_up(quantum_, kLanes<S>));
    const Grid grid = shared->grid;
    shared->ranges.allocate(p_.groups + grid.blocks);
    shared->first_range.allocate(grid.blocks + 1);
    shared->zero.allocate(p_.in_channels + kLanes<S>);
    shared->weight.allocate(needs_columns_ ? grid.groups * weight_size_ : 0);
    shared->bias.allocate(io_.grad_bias ? grid.groups * p_.out_channels : 0);
    shared->partial.allocate(needs_offset_ && grid.blocks > 1
                                 ? int64_t(grid.groups) * grid.blocks * 3 * p_.offset_groups * taps_ * pixels_
                                 : 0);
    if (shared->failed()) return;
    shared->zero.zero();
    int64_t count = 0;
    for (int64_t block = 0; block < grid.blocks; ++block) {
      shared->first_range.get()[block] = count;
      const int64_t first = boundary(block, *shared), last = boundary(block + 1, *shared);
      for (int64_t channel = first; channel < last;) {
        const int64_t group = depthwise_ ? 0 : channel / group_channels_;
        const int64_t end = depthwise_ ? last : min_of(last, (group + 1) * group_channels_);
        shared->ranges.get()[count++] = {group, channel, end - channel, channel - first, shared->panels};
        shared->panels += div_up(end - channel, kPanel<S>);
        channel = end;
      }
    }
    shared->first_range.get()[grid.blocks] = count;
    shared->packed.allocate(!needs_grad_columns_ ? 0
                            : depthwise_         ? taps_ * p_.in_channels
                                                 : taps_ * shared->panels * packed_panel());
  }

  int64_t packed_panel() const { return unit_outputs_ * kPanel<S>; }  // elements of one panel at one tap

  void clear(const Team& team, const Shared& shared) const {
    int64_t begin, end;
    team.share(shared.weight.count(), &begin, &end);
    if (begin < end) __builtin_memset(shared.weight.get() + begin, 0, size_t(end - begin) * sizeof(S));
    if (team.index == 0) shared.bias.zero();
  }

  // packed[tap][panel][output channel][channel of the panel], in units of M.
  void pack(const Team& team, const Shared& shared) const {
    if (!needs_grad_columns_) return;
    const WeightStrides strides(p_);
    const T* weight = static_cast<const T*>(io_.weight);
    E* packed = shared.packed.get();
    if (depthwise_) {
      if (team.index == 0) pack_depthwise(p_, weight, packed);
      return;
    }
    constexpr int64_t width = kPanel<S>;
    const int64_t ranges = shared.first_range.get()[shared.grid.blocks];
    int64_t begin, end;
    team.share(taps_ * ranges, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tap = i / ranges;
      const Range& range = shared.ranges.get()[i % ranges];
      const T* from = weight + range.group * group_outputs_ * strides.out +
                      (range.channel - range.group * group_channels_) * strides.channel + tap * strides.tap;
      E* to = packed + (tap * shared.panels + range.panel) * packed_panel();
      for (int64_t c = 0; c < range.channels; c += width, to += packed_panel(), from += width * strides.channel) {
        const int64_t channels = min_of(width, range.channels - c);
        if (channels < width || unit_outputs_ != group_outputs_) {
          __builtin_memset(to, 0, size_t(packed_panel()) * sizeof(E));
        }
        for (int64_t o = 0; o < group_outputs_; ++o) {
          E* row = to + o / M::depth * width * M::depth + o % M::depth;
          for (int64_t k = 0; k < channels; ++k) {
            from_compute(row + k * M::depth, to_compute(from[o * strides.out + k * strides.channel]));
          }
        }
      }
    }
  }

  void image_backward(int64_t image, int group, int block, const Shared& shared, Thread& own) const {
    const int64_t first = boundary(block, shared), channels = boundary(block + 1, shared) - first;
    const T* all = static_cast<const T*>(io_.input) + image * in_pixels_ * p_.in_channels;
    Input<T> input{all + first, p_.in_channels, shared.zero.get()};
    if (!p_.input_channels_last) {
      planes_to_rows(channels, 0, in_pixels_, all + first * in_pixels_, in_pixels_, own.rows.get(), channels);
      input = {own.rows.get(), channels, shared.zero.get()};
    }
    T* grad_input = static_cast<T*>(io_.grad_input);
    if (grad_input)
      grad_input += image * in_pixels_ * p_.in_channels + first * (p_.input_channels_last ? 1 : in_pixels_);
    Scatter<S> scatter{own.grad_rows.get(), channels, own.outside.get()};
    if (direct_) scatter.rows = reinterpret_cast<S*>(grad_input), scatter.row = p_.in_channels;
    if (io_.grad_input) {
      for (int64_t i = 0; i < in_pixels_; ++i) {
        __builtin_memset(scatter.rows + i * scatter.row, 0, size_t(channels) * sizeof(S));
      }
    }
    const int64_t tiles = div_up(pixels_, own.limit);
    const int64_t step = round_up(div_up(pixels_, tiles), kRows);
    for (int64_t pixel = 0; pixel < pixels_; pixel += step) {
      const int64_t count = min_of(step, pixels_ - pixel);
      load_grad(image, pixel, count, own);
      if (io_.grad_bias && block == 0) add_bias(count, own, shared.bias.get() + group * p_.out_channels);
      own.points.start(image * pixels_ + pixel, count, image, own.tile.get());
      for (int64_t tap = 0; tap < taps_; ++tap)
        tap_backward(image, pixel, tap, group, block, input, scatter, shared, own);
    }
    if (!io_.grad_input || direct_) return;
    if (p_.input_channels_last) {
      for (int64_t i = 0; i < in_pixels_; ++i) {
        convert_row(channels, own.grad_rows.get() + i * channels, grad_input + i * p_.in_channels);
      }
    } else {
      for (int64_t i = 0; i < in_pixels_; i += kTile) {
        rows_to_planes(channels, min_of(kTile, in_pixels_ - i), own.grad_rows.get() + i * channels, channels,
                       grad_input + i, in_pixels_);
      }
    }
  }

  // The tile's grad_output as rows of output channels, each conv group padded to whole units.
  void load_grad(int64_t image, int64_t pixel, int64_t count, Thread& own) const {
    const T* grad = static_cast<const T*>(io_.grad_output) + image * pixels_ * p_.out_channels;
    for (int64_t g = 0; g < p_.groups; g += unit_outputs_ == group_outputs_ ? p_.groups : 1) {
      const int64_t outputs = unit_outputs_ == group_outputs_ ? p_.out_channels : group_outputs_;
      S* to = own.grad.get() + g * unit_outputs_;
      if (p_.output_channels_last) {
        const T* from = grad + pixel * p_.out_channels + g * group_outputs_;
        for (int64_t i = 0; i < count; ++i) convert_row(outputs, from + i * p_.out_channels, to + i * grad_row_);
      } else {
        planes_to_rows(outputs, 0, count, grad + g * group_outputs_ * pixels_ + pixel, pixels_, to, grad_row_);
      }
    }
    if constexpr (M::depth > 1) {
      for (int64_t i = 0; i < count; ++i) {
        convert_row(grad_row_, own.grad.get() + i * grad_row_, own.grad_elements.get() + i * grad_row_);
      }
      pair_rows(count, grad_row_, own.grad.get(), grad_row_, own.grad_pairs.get(), grad_row_);
      if (uses_tiles) {
        const int64_t pairs = zero_last_pairs(count, grad_row_, own.grad_pairs.get(), grad_row_);
        transpose(pairs, grad_row_, own.grad_pairs.get(), grad_row_, own.grad_planes.get(), own.pairs);
      }
    }
  }

  void add_bias(int64_t count, const Thread& own, double* bias) const {
    for (int64_t i = 0; i < count; ++i) {
      const S* grad = own.grad.get() + i * grad_row_;
      for (int64_t g = 0; g < p_.groups; ++g) {
        for (int64_t o = 0; o < group_outputs_; ++o) bias[g * group_outputs_ + o] += grad[g * unit_outputs_ + o];
      }
    }
  }

  void tap_backward(int64_t image, int64_t pixel, int64_t tap, int group, int block, const Input<T>& input,
                    const Scatter<S>& scatter, const Shared& shared, Thread& own) const {
    const Tile<S>& tile = *own.tile.get();
    const Range* begin = shared.ranges.get() + shared.first_range.get()[block];
    const Range* end = shared.ranges.get() + shared.first_range.get()[block + 1];
    if (needs_grad_columns_) {
      for (const Range* range = begin; range < end; ++range) multiply_columns(tap, *range, tile.count, shared, own);
    }
    const int64_t first = boundary(block, shared), last = boundary(block + 1, shared);
    for (int64_t channel = first; channel < last;) {
      const int64_t offset_group = channel / offset_group_channels_;
      const int64_t stop = min_of(last, (offset_group + 1) * offset_group_channels_);
      own.points.locate(tile, tap, offset_group, own.corners.get());
      const int64_t column = channel - first;
      visit_corners(input, scatter, tile, column, stop - channel, own);
      if (needs_offset_) write_offset(image, pixel, offset_group * taps_ + tap, group, block, shared, own);
      channel = stop;
    }
    if (!needs_columns_) return;
    if constexpr (M::depth > 1) {
      pair_rows(tile.count, last - first, own.columns.get(), own.stride, own.column_pairs.get(), own.stride);
      if (uses_tiles) zero_last_pairs(tile.count, last - first, own.column_pairs.get(), own.stride);
    }
    S* weight = shared.weight.get() + group * weight_size_;
    for (const Range* range = begin; range < end; ++range) add_weight(tap, *range, tile.count, weight, own);
  }

  void multiply_columns(int64_t tap, const Range& range, int64_t count, const Shared& shared, Thread& own) const {
    S* to = own.grad_columns.get() + range.column;
    if (depthwise_) {
      const E* weight = shared.packed.get() + tap * p_.in_channels + range.channel;
      for (int64_t i = 0; i < count; ++i) {
        const S* grad = own.grad.get() + i * grad_row_ + range.channel;
        for (int64_t c = 0; c < range.channels; ++c) to[i * own.stride + c] = grad[c] * to_compute(weight[c]);
      }
      return;
    }
    const Unit* grad;
    if constexpr (M::depth > 1) {
      grad = reinterpret_cast<const Unit*>(own.grad_elements.get() + range.group * unit_outputs_);
    } else {
      grad = own.grad.get() + range.group * unit_outputs_;
    }
    const E* packed = shared.packed.get() + (tap * shared.panels + range.panel) * packed_panel();
    multiply_packed<M, false>(count, range.channels, unit_outputs_ / M::depth, grad, grad_row_ / M::depth,
                              reinterpret_cast<const Unit*>(packed), packed_panel() / M::depth, to, own.stride);
  }

  void visit_corners(const Input<T>& input, const Scatter<S>& scatter, const Tile<S>& tile, int64_t column,
                     int64_t channels, Thread& own) const {
    const Corners<S>& corners = *own.corners.get();
    S* grad_columns = own.grad_columns.get() + column;
    S* columns = own.columns.get() + column;
    S* dots = own.dots.get();
    if (needs_offset_ && needs_columns_ && io_.grad_input) {
      corner_pass<true, true, true>(input, scatter, tile, corners, column, channels, own.stride, grad_columns, columns,
                                    dots);
      return;
    }
    if (needs_offset_) {
      corner_pass<true, false, false>(input, scatter, tile, corners, column, channels, own.stride, grad_columns,
                                      columns, dots);
    }
    if (needs_columns_) {
      corner_pass<false, true, false>(input, scatter, tile, corners, column, channels, own.stride, grad_columns,
                                      columns, dots);
    }
    if (io_.grad_input) {
      corner_pass<false, false, true>(input, scatter, tile, corners, column, channels, own.stride, grad_columns,
                                      columns, dots);
    }
  }

  // channel: of the mask, offset group major; its offsets are channels 2c and 2c + 1.
  void write_offset(int64_t image, int64_t pixel, int64_t channel, int group, int block, const Shared& shared,
                    Thread& own) const {
    const Corners<S>& corners = *own.corners.get();
    S grad[3][kTile];
    const int64_t count = own.tile.get()->count;
    for (int64_t i = 0; i < count; ++i) {
      const S *v = own.dots.get() + 4 * i, bottom = corners.bottom[i], right = corners.right[i];
      const S mask = io_.mask ? corners.mask[i] : S(1);
      // Outside nothing was read: its zeros times an infinite gradient would be NaN.
      const bool inside = (corners.index[0][i] & corners.index[1][i] & corners.index[2][i] & corners.index[3][i]) >= 0;
      const S value = (1 - bottom) * ((1 - right) * v[0] + right * v[1]) + bottom * ((1 - right) * v[2] + right * v[3]);
      grad[0][i] = inside ? mask * derivative_y(right, v[0], v[1], v[2], v[3]) : 0;
      grad[1][i] = inside ? mask * derivative_x(bottom, v[0], v[1], v[2], v[3]) : 0;
      grad[2][i] = inside ? value : corners.nan[i];
    }
    if (shared.grid.blocks > 1) {
      for (int64_t k = 0; k < 3; ++k) {
        __builtin_memcpy(partial(shared, group, block, 3 * channel + k) + pixel, grad[k], size_t(count) * sizeof(S));
      }
      return;
    }
    put_offset(image, pixel, count, 2 * channel, grad[0]);
    put_offset(image, pixel, count, 2 * channel + 1, grad[1]);
    put_mask(image, pixel, count, channel, grad[2]);
  }

  S* partial(const Shared& shared, int64_t group, int64_t block, int64_t row) const {
    const int64_t rows = 3 * p_.offset_groups * taps_;
    return shared.partial.get() + ((group * shared.grid.blocks + block) * rows + row) * pixels_;
  }

  // Sums the blocks of each offset group, in their order, and writes the image's offset and mask gradients.
  void join_blocks(int64_t image, int group, int block, const Shared& shared) const {
    const int64_t rows = 3 * p_.offset_groups * taps_, blocks = shared.grid.blocks;
    for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
      const int64_t channel = row / 3, first = channel / taps_ * offset_group_channels_;
      S* sum = nullptr;
      for (int64_t b = 0; b < blocks; ++b) {
        if (boundary(b + 1, shared) <= first || boundary(b, shared) >= first + offset_group_channels_) continue;
        S* part = partial(shared, group, b, row);
        if (sum) {
          for (int64_t i = 0; i < pixels_; ++i) sum[i] += part[i];
        } else {
          sum = part;
        }
      }
      if (row % 3 == 2) {
        put_mask(image, 0, pixels_, channel, sum);
      } else {
        put_offset(image, 0, pixels_, 2 * channel + row % 3, sum);
      }
    }
  }

  void put_offset(int64_t image, int64_t pixel, int64_t count, int64_t channel, const S* grad) const {
    if (!io_.grad_offset) return;
    const Planes planes(io_.grad_offset, 2 * p_.offset_groups * taps_, pixels_, p_.offset_channels_last);
    const int64_t at = planes.at(image, channel, pixel);
    if (p_.offset_dtype == p_.dtype) {
      spread(count, grad, static_cast<T*>(io_.grad_offset) + at, planes.pixel_stride);
    } else if constexpr (sizeof(T) == 2) {
      spread(count, grad, static_cast<float*>(io_.grad_offset) + at, planes.pixel_stride);
    }
  }

  void put_mask(int64_t image, int64_t pixel, int64_t count, int64_t channel, const S* grad) const {
    if (!io_.grad_mask) return;
    const Planes planes(io_.grad_mask, p_.offset_groups * taps_, pixels_, p_.mask_channels_last);
    spread(count, grad, static_cast<T*>(io_.grad_mask) + planes.at(image, channel, pixel), planes.pixel_stride);
  }

  void add_weight(int64_t tap, const Range& range, int64_t count, S* weight, Thread& own) const {
    if (depthwise_) {
      S* to = weight + tap * channel_room_ + range.channel;
      const S *grad = own.grad.get() + range.channel, *column = own.columns.get();
      int64_t c = 0;
      for (; c + kLanes<S> <= range.channels; c += kLanes<S>) {
        Vec<S> sum = {};
        for (int64_t i = 0; i < count; ++i) sum += load(grad + i * grad_row_ + c) * load(column + i * own.stride + c);
        store(to + c, load(to + c) + sum);
      }
      for (; c < range.channels; ++c) {
        S sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += grad[i * grad_row_ + c] * column[i * own.stride + c];
        to[c] += sum;
      }
      return;
    }
    S* to = weight + (range.group * weight_room_ * taps_ + tap) * channel_room_ +
            (range.channel - range.group * group_channels_);
    const Unit *grad, *columns;
    if constexpr (M::depth > 1) {
      grad = own.grad_pairs.get(), columns = own.column_pairs.get();
      if (uses_tiles) {
        multiply_in_tiles<true>(kOuterRows, group_outputs_, range.channels, round_up(div_up(count, 2), kTilePairs),
                                own.grad_planes.get() + range.group * unit_outputs_ * own.pairs, own.pairs,
                                columns + range.column, own.stride, kPanel<S>, to, taps_ * channel_room_);
        return;
      }
    } else {
      grad = own.grad.get(), columns = own.columns.get();
    }
    multiply_outer<M>(group_outputs_, range.channels, div_up(count, M::depth), grad + range.group * unit_outputs_,
                      grad_row_, columns + range.column, own.stride, to, taps_ * channel_room_);
  }

  // Adds up the image groups' weight and bias gradients, in their order.
  void finish(const Team& team, const Shared& shared) const {
    if (io_.grad_bias && team.index == 0) {
      for (int64_t o = 0; o < p_.out_channels; ++o) {
        double sum = 0;
        for (int64_t g = 0; g < shared.grid.groups; ++g) sum += shared.bias.get()[g * p_.out_channels + o];
        from_compute(static_cast<T*>(io_.grad_bias) + o, S(sum));
      }
    }
    if (!io_.grad_weight) return;
    const WeightStrides strides(p_);
    int64_t begin, end;
    team.share(p_.out_channels, &begin, &end);
    for (int64_t o = begin; o < end; ++o) {
      T* to = static_cast<T*>(io_.grad_weight) + o * strides.out;
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t row = depthwise_ ? 0 : (o / group_outputs_ * weight_room_ + o % group_outputs_) * taps_;
        const S* from = shared.weight.get() + (row + tap) * channel_room_ + (depthwise_ ? o : 0);
        for (int64_t c = 0; c < group_channels_; ++c) {
          S sum = from[c];
          for (int64_t g = 1; g < shared.grid.groups; ++g) sum += from[g * weight_size_ + c];
          from_compute(to + c * strides.channel + tap * strides.tap, sum);
        }
      }
    }
  }

  const DeformConv2dParams& p_;
  const DeformConv2dBackward& io_;
  const int threads_;
  const bool depthwise_;
  const int64_t taps_, pixels_, in_pixels_, group_channels_, group_outputs_, offset_group_channels_;
  const int64_t quantum_, quanta_;         // channel blocks are made of whole quanta
  const int64_t unit_outputs_, grad_row_;  // a group's channels in a row of the grad_output tile; that row's stride
  const int64_t weight_room_, channel_room_, weight_size_;  // [group][weight_room][tap][channel_room]
  const bool needs_offset_, needs_columns_, needs_grad_columns_, direct_;
};

template <class T>
bool backward(const DeformConv2dParams& p, const DeformConv2dBackward& io, int threads) {
  if (is_depthwise(p)) return Backward<T, Multiply<Compute<T>>>(p, io, threads).run();
  return Backward<T, MultiplyFor<T>>(p, io, threads).run();
}

}  // namespace

CELLOPS_DISPATCH(deform_conv2d_backward, backward, DeformConv2dParams, DeformConv2dBackward)

}  // namespace cellops::CELLOPS_ISA
