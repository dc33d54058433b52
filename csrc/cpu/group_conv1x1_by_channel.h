// Tiles by channel, of any sizes in either memory format. Planes of float and double are read where they lie; half
// types and channels_last memory pass through a tile of the compute type.
#pragma once
#include "group_conv1x1.h"

namespace cellops::CELLOPS_ISA {

// body(i, valid) for the vectors that cover `count` numbers; `valid` lanes of the last one, at i, are of them.
template <class S, class Body>
CELLOPS_INLINE void for_vectors(int64_t count, const Body& body) {
  constexpr int64_t lanes = kLanes<S>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, lanes);
  if (i < count) body(i, count - i);
}
template <class S>
CELLOPS_INLINE Vec<S> masked(Vec<S> value, int64_t valid) {
  return valid < kLanes<S> ? keep_first<S>(value, valid) : value;
}

// A row of `count` positions of a channel: adds to its sums and, with Apply, writes the gradient to the convolution.
// Compiled for the compute type, as what activations are part of takes long.
template <Activation A, bool Sum, bool Apply, class S>
__attribute__((noinline)) void chain_row(const ChainLanes<S>& given, const S* row, const S* grad_row, int64_t count,
                                         S* result, double* grad_sum, double* product_sum) {
  const ChainLanes<S> lanes = given;
  Vec<S> grads{}, products{};
  for_vectors<S>(count, [&](int64_t i, int64_t valid) CELLOPS_INLINE_LAMBDA {
    Vec<S> apart;
    const Vec<S> grad =
        masked<S>(lanes.template through_activation<A>(load(row + i), load(grad_row + i), &apart), valid);
    if constexpr (Sum) {
      grads += grad;
      products += masked<S>(grad * apart, valid);
    }
    if constexpr (Apply) store(result + i, masked<S>(lanes.template through_affine<!Sum>(grad, apart), valid));
  });
  if constexpr (Sum) *grad_sum += sum_of<S>(grads), *product_sum += sum_of<S>(products);
}

// Reads and writes one thread's tiles of one side of the convolution.
template <class T>
class PlaneAccess {
 public:
  using S = Compute<T>;
  PlaneAccess(const Tiling& t, const Channels& side)
      : t_(t),
        side_(side),
        stride_(t.tile + 16),  // so that rows do not meet in one set of the first cache
        tile_((t.rows_of_memory ? side.count : side.of_group) * stride_),
        staging_(t.rows_of_memory ? kRowsAtOnce * side.count : 0) {}
  bool failed() const { return tile_.failed() || staging_.failed(); }

  // Where the rows of a group are written, and how far they lie apart.
  S* row_of(int64_t group) const { return tile_.get() + (t_.rows_of_memory ? side_.first(group) * stride_ : 0); }
  int64_t row_step() const { return t_.rows_of_memory ? side_.step * stride_ : stride_; }
  // Where the rows of a group are read after `read`.
  const S* read_row_of(int64_t group) const { return direct_ ? direct_ : row_of(group); }
  int64_t read_row_step() const { return direct_ ? place_step() : row_step(); }

  // Takes a tile of the tensor: whole vectors of one image where they lie, others as a copy with zeros at its end.
  void read(const T* tensor, int64_t group, int64_t position, int64_t count) {
    direct_ = nullptr;
    if constexpr (sizeof(T) == sizeof(S)) {
      direct_ = place(tensor, group, position, count);
      if (direct_) return;
    }
    const int64_t rows = t_.rows_of_memory ? side_.count : side_.of_group, whole = round_up(count, kLanes<S>);
    if (t_.rows_of_memory) {
      for (int64_t i = 0; i < count; i += kRowsAtOnce) {
        const int64_t some = min_of(kRowsAtOnce, count - i);
        const T* from = tensor + (position + i) * side_.count;
        if constexpr (sizeof(T) == sizeof(S)) {
          transpose(some, side_.count, from, side_.count, tile_.get() + i, stride_);
        } else {
          convert_row(some * side_.count, from, staging_.get());
          transpose(some, side_.count, staging_.get(), side_.count, tile_.get() + i, stride_);
        }
      }
    } else {
      for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
        const T* from = plane(tensor, image, group) + pixel;
        for (int64_t j = 0; j < rows; ++j) {
          convert_row(length, from + j * side_.step * t_.pixels, tile_.get() + j * stride_ + offset);
        }
      });
    }
    for (int64_t j = 0; j < rows && count < whole; ++j) {
      for (int64_t i = count; i < whole; ++i) tile_.get()[j * stride_ + i] = 0;
    }
  }

  // The first row of a tile in a tensor, if it consists of whole vectors of one image; the others follow at place_step.
  template <class Pointer>
  Pointer place(Pointer tensor, int64_t group, int64_t position, int64_t count) const {
    const int64_t image = position / t_.pixels, pixel = position % t_.pixels;
    if (t_.rows_of_memory || count % kLanes<S> != 0 || pixel + count > t_.pixels) return nullptr;
    return plane(tensor, image, group) + pixel;
  }
  int64_t place_step() const { return side_.step * t_.pixels; }

  // Asks for some columns of rows [first, last) of a tile that is read where it lies.
  CELLOPS_INLINE void prefetch(int64_t from, int64_t columns, int64_t first, int64_t last) const {
    if (!direct_) return;
    const S* row = direct_ + first * place_step() + from;
    for (int64_t j = first; j < min_of(last, side_.of_group); ++j, row += place_step()) {
      for (int64_t i = 0; i < columns; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + i);
    }
  }

  // Copies rows of numbers into the places that the group's first rows have in a tensor of planes, or from there.
  void put_rows(int64_t rows, const S* from, int64_t step, int64_t group, int64_t position, int64_t count,
                S* tensor) const {
    for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
      S* to = plane(tensor, image, group) + pixel;
      for (int64_t j = 0; j < rows; ++j) store_run(length, from + j * step + offset, to + j * place_step(), false);
    });
  }
  void take_rows(int64_t rows, S* to, int64_t step, int64_t group, int64_t position, int64_t count,
                 const S* tensor) const {
    for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
      const S* from = plane(tensor, image, group) + pixel;
      for (int64_t j = 0; j < rows; ++j) store_run(length, from + j * place_step(), to + j * step + offset, false);
    });
  }

  void write(int64_t group, int64_t position, int64_t count, bool streamed, T* tensor) const {
    if (t_.rows_of_memory) {
      for (int64_t i = 0; i < count; i += kRowsAtOnce) {
        const int64_t some = min_of(kRowsAtOnce, count - i);
        transpose(side_.count, some, tile_.get() + i, stride_, staging_.get(), side_.count);
        store_run(some * side_.count, staging_.get(), tensor + (position + i) * side_.count, streamed);
      }
      return;
    }
    for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
      T* to = plane(tensor, image, group) + pixel;
      for (int64_t j = 0; j < side_.of_group; ++j) {
        store_run(length, tile_.get() + j * stride_ + offset, to + j * side_.step * t_.pixels, streamed);
      }
    });
  }

 private:
  static constexpr int64_t kRowsAtOnce = 16;

  template <class Pointer>
  Pointer plane(Pointer tensor, int64_t image, int64_t group) const {
    return tensor + (image * side_.count + side_.first(group)) * t_.pixels;
  }

  // The parts of a tile that lie in one image each: body(image, pixel, offset in the tile, length).
  template <class Body>
  void for_images(int64_t position, int64_t count, const Body& body) const {
    for (int64_t offset = 0; offset < count;) {
      const int64_t image = (position + offset) / t_.pixels, pixel = (position + offset) % t_.pixels;
      const int64_t length = min_of(count - offset, t_.pixels - pixel);
      body(image, pixel, offset, length);
      offset += length;
    }
  }

  const Tiling& t_;
  const Channels& side_;
  const int64_t stride_;
  const Buffer<S> tile_, staging_;
  const S* direct_ = nullptr;
};

template <class T>
class ByChannel {
 public:
  using S = Compute<T>;

  static Tiling tiling(const GroupConv1x1Params& p, int threads) {
    const bool all = p.channels_last || p.pixels == 1;
    return Tiling(p, 240, (p.in_channels + p.out_channels) / (all ? 1 : p.groups), sizeof(S), all, threads);
  }

  ByChannel(const Tiling& t, const Weights<S>& weights, bool backward)
      : t_(t),
        weights_(weights),
        in_(t, t.in),
        out_(t, t.out),
        stride_(t.tile + 16),
        convolution_(backward ? t.out.of_group * stride_ : 0),
        transposed_(backward && t.out.of_group >= 64 && t.in.of_group % kLanes<S> == 0 ? t.tile * t.in.of_group : 0) {}
  bool failed() const { return in_.failed() || out_.failed() || convolution_.failed() || transposed_.failed(); }

  void read(const T* input, const T* grad_output, int64_t group, int64_t position, int64_t count) {
    group_ = group, position_ = position, count_ = count;
    in_.read(input, group, position, count);
    if (grad_output) out_.read(grad_output, group, position, count);
  }

  // Takes a tile of the convolution that is kept where the output will be, instead of computing it.
  void read_kept(const T* output, int64_t group, int64_t position, int64_t count) {
    group_ = group, position_ = position, count_ = count;
    out_.read(output, group, position, count);
  }

  // Forward: the convolution of a group, in the place of its output.
  void convolve(int64_t group) { multiply_to(group, out_.row_of(group), out_.row_step(), false); }

  // Forward: the convolution of a group and what follows it, while it is in registers where that is short enough.
  template <Activation A>
  void produce(int64_t group, const Affine<S>& affine, bool streamed, T* output) {
    if constexpr (finishes_blocks<A>) {
      const int64_t first = group * t_.out.of_group;
      if (T* place = out_.place(output, group, position_, count_)) {
        const int64_t step = out_.place_step();
        multiply(group, false, by_vector<S>([=, &affine](int64_t j, int64_t n, Vec<S> z) CELLOPS_INLINE_LAMBDA {
                   put(place + j * step + n, lanes_of(affine, first + j).template activated<A>(z), streamed);
                 }));
        return;
      }
    }
    convolve(group);
    activate<A>(group, affine, streamed, output);
  }

  // Mean and sum of squared deviations of each channel of it.
  void find_moments(int64_t group, S* means, S* squares) const {
    for (int64_t j = 0; j < t_.out.of_group; ++j) {
      const S* row = out_.row_of(group) + j * out_.row_step();
      Vec<S> sum{};
      for_vectors<S>(count_, [&](int64_t i, int64_t valid) { sum += masked<S>(load(row + i), valid); });
      means[j] = sum_of<S>(sum) / S(count_);
      Vec<S> square{};
      for_vectors<S>(count_, [&](int64_t i, int64_t valid) {
        const Vec<S> apart = masked<S>(load(row + i) - means[j], valid);
        square += apart * apart;
      });
      squares[j] = sum_of<S>(square);
    }
  }

  template <Activation A>
  void activate(int64_t group, const Affine<S>& affine, bool streamed, T* output) {
    T* place = out_.place(output, group, position_, count_);
    for (int64_t j = 0; j < t_.out.of_group; ++j) {
      const AffineLanes<S> lanes = lanes_of(affine, group * t_.out.of_group + j);
      if (place) {
        const S* row = out_.read_row_of(group) + j * out_.read_row_step();
        T* to = place + j * out_.place_step();
        for (int64_t i = 0; i < count_; i += kLanes<S>)
          put(to + i, lanes.template activated<A>(load(row + i)), streamed);
      } else {
        S* row = out_.row_of(group) + j * out_.row_step();
        for (int64_t i = 0; i < count_; i += kLanes<S>) store(row + i, lanes.template activated<A>(load(row + i)));
      }
    }
    if (!place && is_last(group)) out_.write(group_, position_, count_, streamed, output);
  }

  // Backward: the convolution again. It is left in the tile's part of `kept`, which is null or like the input and has
  // room for it, or found there.
  void convolve_again(int64_t group, T* kept, bool found) {
    convolution_row_ = convolution_.get(), convolution_step_ = stride_;
    bool copied = false;
    if constexpr (sizeof(T) == sizeof(S)) {
      if (kept && in_.place(kept, group, position_, count_)) {
        convolution_row_ = in_.place(kept, group, position_, count_), convolution_step_ = in_.place_step();
      } else if (kept && t_.rows_of_memory && count_ % kLanes<S> == 0) {  // rows of positions, as nobody else reads it
        convolution_row_ = kept + position_ * t_.in.count + group * t_.out.of_group * count_,
        convolution_step_ = count_;
      } else {
        copied = kept && !t_.rows_of_memory;
      }
      if (copied && found) {
        in_.take_rows(t_.out.of_group, convolution_row_, convolution_step_, group, position_, count_, kept);
        return;
      }
    }
    if (found && (copied || convolution_row_ != convolution_.get())) return;
    multiply_to(group, convolution_row_, convolution_step_, true);
    if constexpr (sizeof(T) == sizeof(S)) {
      if (copied) in_.put_rows(t_.out.of_group, convolution_row_, convolution_step_, group, position_, count_, kept);
    }
  }

  // The sums and, with Apply, the gradient to the convolution.
  template <Activation A, bool Sum, bool Apply>
  void chain(int64_t group, const Chain<S>& chain, const Sums& sums) {
    const S* grads = out_.read_row_of(group);
    for (int64_t j = 0; j < t_.out.of_group; ++j) {
      const int64_t o = group * t_.out.of_group + j;
      const ChainLanes<S> lanes{lanes_of(chain.affine, o), broadcast(chain.of_apart.get()[o]),
                                broadcast(chain.constant.get()[o])};
      chain_row<A, Sum, Apply>(lanes, convolution_row_ + j * convolution_step_, grads + j * out_.read_row_step(),
                               count_, out_.row_of(group) + j * out_.row_step(), sums.grad.get() + o,
                               sums.product.get() + o);
    }
  }

  // As products of rows, whose sums over lanes take a third of the time of 240 positions; in tiles of many channels,
  // which have fewer positions, the input is transposed instead.
  void add_grad_weight(int64_t group, S* grad_weight) const {
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group;
    if (transposed_.count() == 0) {
      multiply_dots(outs, ins, round_up(count_, kLanes<S>), out_.row_of(group), out_.row_step(), in_.read_row_of(group),
                    in_.read_row_step(), grad_weight, ins);
      return;
    }
    transpose(ins, count_, in_.read_row_of(group), in_.read_row_step(), transposed_.get(), ins);
    add_product<S, kTileRows, kTileVectors>(outs, ins, count_, out_.row_of(group), out_.row_step(), 1,
                                            transposed_.get(), ins, grad_weight, ins);
  }

  // The gradient to the input; may take the input's place.
  void convolve_back(int64_t group, bool streamed, T* grad_input) {
    const int64_t ins = t_.in.of_group, columns = round_up(count_, kLanes<S>);
    const auto product = [&](const auto& finish) {
      multiply_blocks<S, kTileRows, kTileVectors>(ins, columns, t_.out.of_group, weights_.of(group), 1, ins,
                                                  out_.row_of(group), out_.row_step(), by_vector<S>(finish));
    };
    if (T* place = in_.place(grad_input, group, position_, count_)) {
      const int64_t step = in_.place_step();
      product([=](int64_t c, int64_t n, Vec<S> value)
                  CELLOPS_INLINE_LAMBDA { put(place + c * step + n, value, streamed); });
      return;
    }
    S* rows = in_.row_of(group);
    const int64_t step = in_.row_step();
    product([=](int64_t c, int64_t n, Vec<S> value) CELLOPS_INLINE_LAMBDA { store(rows + c * step + n, value); });
    if (is_last(group)) in_.write(group_, position_, count_, streamed, grad_input);
  }

 private:
  // A tile is written when it has all its groups.
  bool is_last(int64_t group) const { return group + 1 == group_ + t_.unit_groups; }

  // The product of a group's weights and its positions in blocks. Meanwhile it asks for the input of the panel after
  // the next, and for the gradient where that is wanted after this.
  template <class Finish>
  CELLOPS_INLINE void multiply(int64_t group, bool with_gradient, const Finish& finish) const {
    constexpr int64_t kPanel = kTileVectors * kLanes<S>;
    const int64_t columns = round_up(count_, kLanes<S>), depth = t_.in.of_group, outs = t_.out.of_group;
    const int64_t share = div_up(depth * kTileRows, round_up(outs, kTileRows));  // rows of input to a block of output
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t some = min_of(kPanel, columns - n);
      for (int64_t r = 0, c = 0; r < outs; r += kTileRows, c += share) {
        in_.prefetch(n + 2 * kPanel, kPanel, c, c + share);
        if (with_gradient) out_.prefetch(n, some, r, r + kTileRows);
        multiply_blocks<S, kTileRows, kTileVectors>(min_of(kTileRows, outs - r), some, depth,
                                                    weights_.of(group) + r * depth, depth, 1,
                                                    in_.read_row_of(group) + n, in_.read_row_step(), finish, r, n);
      }
    }
  }
  void multiply_to(int64_t group, S* to, int64_t to_step, bool with_gradient) const {
    multiply(group, with_gradient, by_vector<S>([=](int64_t j, int64_t n, Vec<S> z) CELLOPS_INLINE_LAMBDA {
               store(to + j * to_step + n, z);
             }));
  }

  static AffineLanes<S> lanes_of(const Affine<S>& affine, int64_t channel) {
    return {broadcast(affine.centre.get()[channel]), broadcast(affine.scale.get()[channel]),
            broadcast(affine.shift.get()[channel])};
  }

  const Tiling& t_;
  const Weights<S>& weights_;
  PlaneAccess<T> in_, out_;
  const int64_t stride_;
  const Buffer<S> convolution_, transposed_;
  S* convolution_row_ = nullptr;
  int64_t convolution_step_ = 0;
  int64_t group_ = 0, position_ = 0, count_ = 0;
};

}  // namespace cellops::CELLOPS_ISA
