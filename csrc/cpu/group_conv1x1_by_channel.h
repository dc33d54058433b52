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

// Numbers between the rows of a tile: an odd number of cache lines, so that rows do not meet in the same sets of it.
template <class S>
int64_t row_stride(const Tiling& t) {
  constexpr int64_t line = kLine / int64_t(sizeof(S));
  return (div_up(t.tile, line) | 1) * line;
}

// Reads and writes one thread's tiles of one side of the convolution.
template <class T>
class PlaneAccess {
 public:
  using S = Compute<T>;
  PlaneAccess(const Tiling& t, const Channels& side, bool used = true)
      : t_(t),
        side_(side),
        stride_(row_stride<S>(t)),
        tile_(used ? (t.rows_of_memory ? side.count : side.of_group) * stride_ : 0),
        staging_(used && t.rows_of_memory ? kRowsAtOnce * side.count : 0) {}
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

  // Has a tile asked for; of images that are parts of it all that it has channels of, where they lie in one piece.
  void fetch(const T* tensor, const Tiling::Place& tile, Ahead& ahead) const {
    if (t_.rows_of_memory) {
      ahead.add(tensor + tile.position * side_.count, 1, tile.count * side_.count * int64_t(sizeof(T)), 0);
    } else {
      const int64_t image = tile.position / t_.pixels, pixel = tile.position % t_.pixels;
      const int64_t size = t_.pixels * int64_t(sizeof(T)), images = div_up(pixel + tile.count, t_.pixels);
      if (images > 1 && side_.step == 1) {
        ahead.add(plane(tensor, image, tile.group), images, side_.of_group * size, side_.count * size);
      } else {
        ahead.add(plane(tensor, image, tile.group) + pixel, side_.of_group,
                  min_of(tile.count, t_.pixels - pixel) * int64_t(sizeof(T)), place_step() * int64_t(sizeof(T)));
      }
    }
  }

  template <class Number>
  void write(int64_t group, int64_t position, int64_t count, bool streamed, Number* tensor) const {
    if (t_.rows_of_memory) {
      for (int64_t i = 0; i < count; i += kRowsAtOnce) {
        const int64_t some = min_of(kRowsAtOnce, count - i);
        transpose(side_.count, some, tile_.get() + i, stride_, staging_.get(), side_.count);
        store_run(some * side_.count, staging_.get(), tensor + (position + i) * side_.count, streamed);
      }
      return;
    }
    for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
      Number* to = plane(tensor, image, group) + pixel;
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

  // Long rows backward, as sums over lanes and the first lines of a row cost as much for short ones.
  static Tiling tiling(const GroupConv1x1Params& p, Work work, int threads) {
    const bool all = p.channels_last || p.pixels == 1;
    return Tiling(p, work.backward ? 816 : 240, (p.in_channels + p.out_channels) / (all ? 1 : p.groups), sizeof(S), all,
                  threads);
  }

  ByChannel(const Tiling& t, const Weights<S>& weights, Work work)
      : t_(t),
        weights_(weights),
        work_(work),
        in_(t, t.in),
        out_(t, t.out),
        kept_(t, t.out, work.kept),
        stride_(row_stride<S>(t)),
        convolution_(work.backward && !work.kept ? t.out.of_group * stride_ : 0),
        by_channels_(t.in.of_group % kLanes<S> == 0 && (t.out.of_group >= 64 || t.tile < 128)),
        transposed_(work.backward && by_channels_ && !lies_in_channels(t) ? t.tile * t.in.of_group : 0) {}
  bool failed() const {
    return in_.failed() || out_.failed() || kept_.failed() || convolution_.failed() || transposed_.failed();
  }

  // Begins a tile, of which the tensors that are wanted are read next; `products` are to be made of it.
  void start(const Tiling::Place& tile, const Tiling::Place& next, int products) {
    group_ = tile.group, position_ = tile.position, count_ = tile.count, next_ = next, found_ = false;
    ahead_.start(t_.fetches ? products * round_up(count_, kLanes<S>) * t_.out.of_group * t_.unit_groups * t_.in.of_group
                            : 0);
  }
  void read_input(const T* input) {
    x_ = input;
    if (work_.kept && work_.backward && by_channels_ && lies_in_channels(t_)) {
      in_.fetch(input, next_, ahead_);  // where it lies is enough for the weight's gradient
    } else {
      take(input, in_);
    }
  }
  void read_gradient(const T* grad_output) { take(grad_output, out_); }
  // The convolution, instead of computing it.
  void read_convolution(const S* convolution) { take(convolution, kept_), found_ = true; }

  // The convolution of a group: forward in the place of its output.
  void convolve(int64_t group) {
    multiply(group, by_vector<S>([to = work_.backward ? convolution_.get() : out_.row_of(group),
                                  step = work_.backward ? stride_ : out_.row_step()](int64_t j, int64_t n, Vec<S> z)
                                     CELLOPS_INLINE_LAMBDA { store(to + j * step + n, z); }));
  }
  // And in its place in memory.
  void convolve_and_keep(int64_t group, bool streamed, S* kept) {
    if (S* place = kept_.place(kept, group, position_, count_)) {
      multiply(group, by_vector<S>([=, place_step = kept_.place_step(), to = out_.row_of(group),
                                    step = out_.row_step()](int64_t j, int64_t n, Vec<S> z) CELLOPS_INLINE_LAMBDA {
                 store(to + j * step + n, z);
                 put(place + j * place_step + n, z, streamed);
               }));
      return;
    }
    convolve(group);
    if (is_last(group)) out_.write(group_, position_, count_, streamed, kept);
  }

  // Forward: the convolution of a group and what follows it, while it is in registers where that is short enough.
  template <Activation A>
  void produce(int64_t group, const Affine<S>& affine, bool streamed, T* output) {
    if constexpr (finishes_blocks<A>) {
      const int64_t first = group * t_.out.of_group;
      if (T* place = out_.place(output, group, position_, count_)) {
        const int64_t step = out_.place_step();
        multiply(group, by_vector<S>([=, &affine](int64_t j, int64_t n, Vec<S> z) CELLOPS_INLINE_LAMBDA {
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
      const S* row = row_of(group) + j * row_step();
      if (place) {
        T* to = place + j * out_.place_step();
        for (int64_t i = 0; i < count_; i += kLanes<S>)
          put(to + i, lanes.template activated<A>(load(row + i)), streamed);
      } else {
        S* to = out_.row_of(group) + j * out_.row_step();
        for (int64_t i = 0; i < count_; i += kLanes<S>) store(to + i, lanes.template activated<A>(load(row + i)));
      }
    }
    if (!place && is_last(group)) out_.write(group_, position_, count_, streamed, output);
  }

  // The sums and, with Apply, the gradient to the convolution.
  template <Activation A, bool Sum, bool Apply>
  void chain(int64_t group, const Chain<S>& chain, const Sums& sums) {
    const S *grads = out_.read_row_of(group), *rows = row_of(group);
    const int64_t step = row_step();
    for (int64_t j = 0; j < t_.out.of_group; ++j) {
      const int64_t o = group * t_.out.of_group + j;
      const ChainLanes<S> lanes{lanes_of(chain.affine, o), broadcast(chain.of_apart.get()[o]),
                                broadcast(chain.constant.get()[o])};
      chain_row<A, Sum, Apply>(lanes, rows + j * step, grads + j * out_.read_row_step(), count_,
                               out_.row_of(group) + j * out_.row_step(), sums.grad.get() + o, sums.product.get() + o);
    }
  }

  // From rows of channels of the input, where groups or tiles make the sums over lanes of its rows of positions dear.
  void add_grad_weight(int64_t group, S* grad_weight) {
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group, depth = round_up(count_, kLanes<S>);
    const S *rows = out_.row_of(group), *columns = in_.read_row_of(group);
    const int64_t row_step = out_.row_step(), column_step = in_.read_row_step();
    if (by_channels_) {
      const S* x = transposed_.get();
      int64_t x_step = ins;
      if (lies_in_channels(t_)) {
        x = reinterpret_cast<const S*>(x_) + position_ * t_.in.count + t_.in.first(group), x_step = t_.in.count;
      } else {
        transpose(ins, count_, columns, column_step, transposed_.get(), ins);
      }
      multiply_ahead<S, kTileRows, kTileVectors>(ahead_, outs, ins, count_, rows, row_step, 1, x, x_step,
                                                 adding_to(grad_weight, ins));
      return;
    }
    for (int64_t j = 0; j < outs; j += kDotRows) {
      for (int64_t c = 0; c < ins; c += kDotColumns) {
        const int64_t height = min_of(int64_t(kDotRows), outs - j), width = min_of(int64_t(kDotColumns), ins - c);
        ahead_.during(height * width * depth);
        multiply_dots(height, width, depth, rows + j * row_step, row_step, columns + c * column_step, column_step,
                      grad_weight + j * ins + c, ins);
      }
    }
  }

  // The gradient to the input; may take the input's place.
  void convolve_back(int64_t group, bool streamed, T* grad_input) {
    const int64_t ins = t_.in.of_group, columns = round_up(count_, kLanes<S>);
    const auto product = [&](const auto& finish) {
      multiply_ahead<S, kTileRows, kTileVectors>(ahead_, ins, columns, t_.out.of_group, weights_.of(group), 1, ins,
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
  // Whether the input lies in memory as rows of channels of the type that is computed in.
  static bool lies_in_channels(const Tiling& t) { return sizeof(T) == sizeof(S) && t.rows_of_memory; }

  // A tile is written when it has all its groups.
  bool is_last(int64_t group) const { return group + 1 == group_ + t_.unit_groups; }

  // A group's convolution, that was read or else computed last.
  const S* row_of(int64_t group) const {
    return found_ ? kept_.read_row_of(group) : work_.backward ? convolution_.get() : out_.row_of(group);
  }
  int64_t row_step() const { return found_ ? kept_.read_row_step() : work_.backward ? stride_ : out_.row_step(); }

  template <class Number>
  void take(const Number* tensor, PlaneAccess<Number>& access) {
    access.fetch(tensor, next_, ahead_);
    access.read(tensor, group_, position_, count_);
  }

  // The product of a group's weights and its positions.
  template <class Finish>
  CELLOPS_INLINE void multiply(int64_t group, const Finish& finish) {
    const int64_t depth = t_.in.of_group;
    multiply_ahead<S, kTileRows, kTileVectors>(ahead_, t_.out.of_group, round_up(count_, kLanes<S>), depth,
                                               weights_.of(group), depth, 1, in_.read_row_of(group),
                                               in_.read_row_step(), finish);
  }

  static AffineLanes<S> lanes_of(const Affine<S>& affine, int64_t channel) {
    return {broadcast(affine.centre.get()[channel]), broadcast(affine.scale.get()[channel]),
            broadcast(affine.shift.get()[channel])};
  }

  const Tiling& t_;
  const Weights<S>& weights_;
  const Work work_;
  PlaneAccess<T> in_, out_;
  PlaneAccess<S> kept_;
  const int64_t stride_;
  const Buffer<S> convolution_;
  const bool by_channels_;  // how the weights' gradient is summed
  const Buffer<S> transposed_;
  const T* x_ = nullptr;  // the whole input
  int64_t group_ = 0, position_ = 0, count_ = 0;
  bool found_ = false;  // whether the tile's convolution was read
  Tiling::Place next_ = {};
  Ahead ahead_;
};

}  // namespace cellops::CELLOPS_ISA
