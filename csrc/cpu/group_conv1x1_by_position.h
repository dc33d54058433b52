// Tiles by position: channels_last memory, where it lies, of groups that are whole vectors of channels on either side.
// Pairs of channels, as a product of bfloat16 takes them, lie there as they should; pairs of positions are made.
#pragma once
#include "group_conv1x1.h"

namespace cellops::CELLOPS_ISA {

// A column of `count` positions of as many channels as a vector has, `step` numbers apart: adds to the channels' sums
// and, with Apply, writes the gradient to the convolution, which may take its place. Compiled for the compute type.
template <Activation A, bool Sum, bool Apply, class S>
__attribute__((noinline)) void chain_column(const ChainLanes<S>& given, const S* column, int64_t step, const S* grads,
                                            int64_t grad_step, int64_t count, S* result, int64_t result_step,
                                            double* grad_sums, double* product_sums) {
  const ChainLanes<S> lanes = given;
  Vec<S> grad_sum{}, product_sum{};
  for (int64_t i = 0; i < count; ++i, column += step, grads += grad_step) {
    Vec<S> apart;
    const Vec<S> grad = lanes.template through_activation<A>(load(column), load(grads), &apart);
    if constexpr (Sum) {
      grad_sum += grad;
      product_sum += grad * apart;
    }
    if constexpr (Apply) store(result + i * result_step, lanes.template through_affine<!Sum>(grad, apart));
  }
  for (int k = 0; Sum && k < kLanes<S>; ++k) grad_sums[k] += grad_sum[k], product_sums[k] += product_sum[k];
}

template <class T, class M>
class ByPosition {
 public:
  using Multiplies = M;
  using S = Compute<T>;
  using Unit = typename M::Unit;

  static bool fits(const GroupConv1x1Params& p) {
    const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
    return lies_in_rows(p) && !(p.shuffle && p.groups > 1) && in % kLanes<S> == 0 && out % kLanes<S> == 0;
  }

  static constexpr bool by_position = true;
  // How it keeps the convolution, and in which orders it finds it.
  static Kept keeps(const GroupConv1x1Params&, bool) { return Kept::in_rows; }
  static Kept finds(Kept kept) { return kept == Kept::in_rows ? kept : Kept::nowhere; }

  static Tiling tiling(const GroupConv1x1Params& p, Work, int threads) {
    return Tiling(p, 48, p.in_channels + p.out_channels, sizeof(S), true, INT64_MAX, threads);
  }

  ByPosition(const Tiling& t, const Weights<M>& weights, Work work)
      : t_(t),
        weights_(weights),
        in_(kWide || kPairs ? 0 : t.tile * t.in.count),
        grads_(kWide || !work.backward ? 0 : t.tile * t.out.count),
        block_(t.tile * t.out.of_group),
        rounded_(kPairs && work.backward ? t.tile * t.out.of_group : 0),
        block_pairs_(kPairs && work.backward ? t.tile / 2 * t.out.of_group : 0),
        in_pairs_(kPairs && work.backward ? t.tile / 2 * t.in.of_group : 0) {}
  bool failed() const {
    return in_.failed() || grads_.failed() || block_.failed() || rounded_.failed() || block_pairs_.failed() ||
           in_pairs_.failed();
  }

  // Begins a tile, of which the tensors that are wanted are read next; `products` are to be made of it.
  void start(const Tiling::Place& tile, const Tiling::Place& next, int products) {
    position_ = tile.position, count_ = tile.count, next_ = next;
    x_ = nullptr, g_ = z_ = nullptr;
    ahead_.start(t_.fetches ? products * count_ * t_.out.count * t_.in.of_group : 0);
  }
  void read_input(const T* input) {
    if constexpr (kPairs) {
      fetch(input, t_.in.count);
      x_ = input + position_ * t_.in.count;
    } else {
      x_ = take(input, t_.in.count, in_);
    }
  }
  void read_gradient(const T* grad_output) { g_ = take(grad_output, t_.out.count, grads_); }
  // The convolution, instead of computing it.
  void read_convolution(const S* convolution) {
    fetch(convolution, t_.out.count);
    z_ = convolution + position_ * t_.out.count;
  }

  bool streams_kept(const S* kept) const { return t_.streamed(t_.out, kept); }

  // The convolution of a group, into the block.
  void convolve(int64_t group) {
    multiply(group, by_vector<S>([to = block_.get(), step = t_.out.of_group](int64_t i, int64_t j, Vec<S> z)
                                     CELLOPS_INLINE_LAMBDA { store(to + i * step + j, z); }));
  }
  // And into its place in memory.
  void convolve_and_keep(int64_t group, bool streamed, S* kept) {
    const int64_t step = t_.out.count;
    S* place = kept + position_ * step + group * t_.out.of_group;
    multiply(group, by_vector<S>([=, to = block_.get(), outs = t_.out.of_group](int64_t i, int64_t j, Vec<S> z)
                                     CELLOPS_INLINE_LAMBDA {
                                       store(to + i * outs + j, z);
                                       put(place + i * step + j, z, streamed);
                                     }));
  }

  // Forward: the convolution of a group and what follows it, while it is in registers where that is short enough.
  template <Activation A>
  void produce(int64_t group, const Affine<S>& affine, bool streamed, T* output) {
    if constexpr (!finishes_blocks<A>) {
      convolve(group);
      activate<A>(group, affine, streamed, output);
    } else {
      const int64_t step = t_.out.count, first = group * t_.out.of_group;
      T* to = output + position_ * step + first;
      multiply(group, [&, to](int64_t row, int64_t column, const auto& sum) CELLOPS_INLINE_LAMBDA {
        constexpr int vectors = sizeof(sum[0]) / sizeof(sum[0][0]);
        AffineLanes<S> lanes[vectors];
        for (int v = 0; v < vectors; ++v) lanes[v] = lanes_of(affine, first + column + v * kLanes<S>);
        each_vector<S>(row, 0, sum, [&](int64_t i, int64_t j, Vec<S> z) CELLOPS_INLINE_LAMBDA {
          put(to + i * step + column + j, lanes[j / kLanes<S>].template activated<A>(z), streamed);
        });
      });
    }
  }

  void find_moments(int64_t, S* means, S* squares) const {
    const int64_t outs = t_.out.of_group;
    for (int64_t j = 0; j < outs; j += kLanes<S>) {
      const S* column = block_.get() + j;
      Vec<S> sum{}, square{};
      for (int64_t i = 0; i < count_; ++i) sum += load(column + i * outs);
      const Vec<S> mean = sum / S(count_);
      for (int64_t i = 0; i < count_; ++i) {
        const Vec<S> apart = load(column + i * outs) - mean;
        square += apart * apart;
      }
      store(means + j, mean);
      store(squares + j, square);
    }
  }

  // As many vectors of a row at a time as fill a line of the cache, whose parts are streamed together.
  template <Activation A>
  void activate(int64_t group, const Affine<S>& affine, bool streamed, T* output) {
    constexpr int vectors = int(kLine / (kLanes<S> * sizeof(T)));
    constexpr int64_t line = vectors * kLanes<S>;
    const int64_t outs = t_.out.of_group;
    int64_t j = 0;
    for (; j + line <= outs; j += line) activate_columns<A, vectors>(group, j, affine, streamed, output);
    for (; j < outs; j += kLanes<S>) activate_columns<A, 1>(group, j, affine, false, output);
  }

  // Backward: the sums and, with Apply, the gradient to the convolution, in the block.
  template <Activation A, bool Sum, bool Apply>
  void chain(int64_t group, const Chain<S>& chain, const Sums& sums) {
    const int64_t outs = t_.out.of_group;
    for (int64_t j = 0; j < outs; j += kLanes<S>) {
      const int64_t o = group * outs + j;
      const ChainLanes<S> lanes{lanes_of(chain.affine, o), load(chain.of_apart.get() + o),
                                load(chain.constant.get() + o)};
      chain_column<A, Sum, Apply>(lanes, column_of(group) + j, column_step(), g_ + o, t_.out.count, count_,
                                  block_.get() + j, outs, sums.grad.get() + o, sums.product.get() + o);
    }
  }

  void add_grad_weight(int64_t group, S* grad_weight) {
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group;
    const auto add = [&](const Unit* grads, const Unit* x, int64_t x_step) {
      multiply_ahead<M, kTileRows, kTileVectors>(ahead_, outs, ins, div_up(count_, M::depth), grads, 1, outs, x, x_step,
                                                 adding_to(grad_weight, ins));
    };
    if constexpr (kPairs) {
      pair_rows(count_, outs, block_.get(), outs, block_pairs_.get(), outs);
      pair_rows(count_, ins, x_ + t_.in.first(group), t_.in.count, in_pairs_.get(), ins);
      add(block_pairs_.get(), in_pairs_.get(), ins);
    } else {
      add(block_.get(), x_ + t_.in.first(group), t_.in.count);
    }
  }

  void convolve_back(int64_t group, bool streamed, T* grad_input) {
    const int64_t outs = weights_.out_units, ins = t_.in.of_group, step = t_.in.count;
    T* to = grad_input + position_ * step + t_.in.first(group);
    if constexpr (kPairs) convert_row(count_ * t_.out.of_group, block_.get(), rounded_.get());
    const void* grads = kPairs ? static_cast<const void*>(rounded_.get()) : block_.get();
    multiply_ahead<M, kRows, kPanelVectors>(
        ahead_, count_, ins, outs, static_cast<const Unit*>(grads), outs, 1, weights_.backward_of(group), ins,
        by_vector<S>([=](int64_t i, int64_t c, Vec<S> value)
                         CELLOPS_INLINE_LAMBDA { put(to + i * step + c, value, streamed); }));
  }

 private:
  template <Activation A, int Vectors>
  void activate_columns(int64_t group, int64_t first, const Affine<S>& affine, bool streamed, T* output) const {
    const int64_t channel = group * t_.out.of_group + first, step = column_step();
    const S* column = column_of(group) + first;
    T* to = output + position_ * t_.out.count + channel;
    AffineLanes<S> lanes[Vectors];
    for (int v = 0; v < Vectors; ++v) lanes[v] = lanes_of(affine, channel + v * kLanes<S>);
    for (int64_t i = 0; i < count_; ++i, column += step, to += t_.out.count) {
      for (int v = 0; v < Vectors; ++v) {
        put(to + v * kLanes<S>, lanes[v].template activated<A>(load(column + v * kLanes<S>)), streamed);
      }
    }
  }

  static constexpr bool kWide = sizeof(T) == sizeof(S), kPairs = M::depth > 1;

  template <class Number>
  void fetch(const Number* tensor, int64_t channels) {
    ahead_.add(tensor + next_.position * channels, 1, next_.count * channels * int64_t(sizeof(Number)), 0);
  }
  // A tile of a tensor; the next one's is asked for.
  const S* take(const T* tensor, int64_t channels, const Buffer<S>& buffer) {
    fetch(tensor, channels);
    const T* rows = tensor + position_ * channels;
    if constexpr (kWide) {
      return rows;
    } else {
      convert_row(count_ * channels, rows, buffer.get());
      return buffer.get();
    }
  }

  // The product of a group's positions and its weights.
  template <class Finish>
  CELLOPS_INLINE void multiply(int64_t group, const Finish& finish) {
    const int64_t outs = t_.out.of_group;
    const auto* x = reinterpret_cast<const Unit*>(x_ + t_.in.first(group));
    multiply_ahead<M, kRows, kPanelVectors>(ahead_, count_, outs, weights_.in_units, x, t_.in.count / M::depth, 1,
                                            weights_.transposed_of(group), outs, finish);
  }

  // A group's convolution, that was read or else computed last.
  const S* column_of(int64_t group) const { return z_ ? z_ + group * t_.out.of_group : block_.get(); }
  int64_t column_step() const { return z_ ? t_.out.count : t_.out.of_group; }

  static AffineLanes<S> lanes_of(const Affine<S>& affine, int64_t channel) {
    return {load(affine.centre.get() + channel), load(affine.scale.get() + channel),
            load(affine.shift.get() + channel)};
  }

  const Tiling& t_;
  const Weights<M>& weights_;
  const Buffer<S> in_, grads_;                 // tiles of the tensors, of half types
  const Buffer<S> block_;                      // a group's convolution, or its gradient
  const Buffer<T> rounded_;                    // the gradient in pairs of channels
  const Buffer<Unit> block_pairs_, in_pairs_;  // it and the group's input in pairs of positions
  const typename M::Element* x_ = nullptr;
  const S *g_ = nullptr, *z_ = nullptr;
  int64_t position_ = 0, count_ = 0;
  Tiling::Place next_ = {};
  Ahead ahead_;
};

}  // namespace cellops::CELLOPS_ISA
