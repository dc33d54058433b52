// Tiles by position: channels_last memory, where it lies, of groups that are whole vectors of channels on either side.
#pragma once
#include "group_conv1x1.h"

namespace cellops::CELLOPS_ISA {

// A column of `count` positions of as many channels as a vector has, `step` numbers apart: adds to the channels' sums
// and, with Apply, puts the gradient to the convolution into its place. Compiled for the compute type.
template <Activation A, bool Sum, bool Apply, class S>
__attribute__((noinline)) void chain_column(const ChainLanes<S>& given, S* column, int64_t step, const S* grads,
                                            int64_t grad_step, int64_t count, double* grad_sums, double* product_sums) {
  const ChainLanes<S> lanes = given;
  Vec<S> grad_sum{}, product_sum{};
  for (int64_t i = 0; i < count; ++i, column += step, grads += grad_step) {
    Vec<S> apart;
    const Vec<S> grad = lanes.template through_activation<A>(load(column), load(grads), &apart);
    if constexpr (Sum) {
      grad_sum += grad;
      product_sum += grad * apart;
    }
    if constexpr (Apply) store(column, lanes.template through_affine<!Sum>(grad, apart));
  }
  for (int k = 0; Sum && k < kLanes<S>; ++k) grad_sums[k] += grad_sum[k], product_sums[k] += product_sum[k];
}

template <class T>
class ByPosition {
 public:
  using S = Compute<T>;

  static bool fits(const GroupConv1x1Params& p) {
    const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
    return (p.channels_last || p.pixels == 1) && !(p.shuffle && p.groups > 1) && in % kLanes<S> == 0 &&
           out % kLanes<S> == 0;
  }

  static Tiling tiling(const GroupConv1x1Params& p, int threads) {
    return Tiling(p, 48, p.in_channels + p.out_channels, sizeof(S), true, threads);
  }

  ByPosition(const Tiling& t, const Weights<S>& weights, bool backward)
      : t_(t),
        weights_(weights),
        in_(sizeof(T) == sizeof(S) ? 0 : t.tile * t.in.count),
        grads_(sizeof(T) == sizeof(S) || !backward ? 0 : t.tile * t.out.count),
        convolution_(t.tile * t.out.of_group) {}
  bool failed() const { return in_.failed() || grads_.failed() || convolution_.failed(); }

  void read(const T* input, const T* grad_output, int64_t, int64_t position, int64_t count) {
    position_ = position, count_ = count, kept_ = nullptr;
    x_ = take(input + position * t_.in.count, t_.in.count, in_);
    next_in_ = reinterpret_cast<const char*>(input + min_of(position + count, t_.positions) * t_.in.count);
    next_in_bytes_ = min_of(count, t_.positions - position - count) * t_.in.count * int64_t(sizeof(T));
    if (!grad_output) return;
    g_ = take(grad_output + position * t_.out.count, t_.out.count, grads_);
    next_out_ = reinterpret_cast<const char*>(grad_output + min_of(position + count, t_.positions) * t_.out.count);
    next_out_bytes_ = min_of(count, t_.positions - position - count) * t_.out.count * int64_t(sizeof(T));
  }

  // Takes a tile of the convolution that is kept where the output will be, instead of computing it.
  void read_kept(const S* output, int64_t, int64_t position, int64_t count) {
    position_ = position, count_ = count, kept_ = output + position * t_.out.count;
  }
  template <class Half>
  void read_kept(const Half*, int64_t, int64_t, int64_t) {}  // half types are not kept

  void convolve(int64_t group) {
    const int64_t outs = t_.out.of_group;
    S* to = convolution_.get();
    multiply(group,
             by_vector<S>([=](int64_t i, int64_t j, Vec<S> z) CELLOPS_INLINE_LAMBDA { store(to + i * outs + j, z); }));
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

  // Backward: the convolution again. It is left in the places that the group's first channels have in `kept`, which is
  // null or like the input, or found there.
  void convolve_again(int64_t group, T* kept, bool found) {
    if (!kept || !found) convolve(group);
    if constexpr (sizeof(T) == sizeof(S)) {
      if (!kept) return;
      const int64_t outs = t_.out.of_group;
      S* place = kept + position_ * t_.in.count + t_.in.first(group);
      for (int64_t i = 0; i < count_; ++i, place += t_.in.count) {
        S* row = convolution_.get() + i * outs;
        for (int64_t j = 0; j < outs; j += kLanes<S>) {
          if (found) {
            store(row + j, load(place + j));
          } else {
            store(place + j, load(row + j));
          }
        }
      }
    }
  }

  void find_moments(int64_t, S* means, S* squares) const {
    const int64_t outs = t_.out.of_group;
    for (int64_t j = 0; j < outs; j += kLanes<S>) {
      const S* column = convolution_.get() + j;
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

  template <Activation A>
  void activate(int64_t group, const Affine<S>& affine, bool streamed, T* output) {
    const int64_t outs = t_.out.of_group;
    for (int64_t j = 0; j < outs; j += kLanes<S>) {
      const AffineLanes<S> lanes = lanes_of(affine, group * outs + j);
      const S* column = kept_ ? kept_ + group * outs + j : convolution_.get() + j;
      const int64_t step = kept_ ? t_.out.count : outs;
      T* to = output + position_ * t_.out.count + group * outs + j;
      for (int64_t i = 0; i < count_; ++i) {
        put(to + i * t_.out.count, lanes.template activated<A>(load(column + i * step)), streamed);
      }
    }
  }

  template <Activation A, bool Sum, bool Apply>
  void chain(int64_t group, const Chain<S>& chain, const Sums& sums) {
    const int64_t outs = t_.out.of_group;
    for (int64_t j = 0; j < outs; j += kLanes<S>) {
      const int64_t o = group * outs + j;
      const ChainLanes<S> lanes{lanes_of(chain.affine, o), load(chain.of_apart.get() + o),
                                load(chain.constant.get() + o)};
      chain_column<A, Sum, Apply>(lanes, convolution_.get() + j, outs, g_ + o, t_.out.count, count_,
                                  sums.grad.get() + o, sums.product.get() + o);
    }
  }

  void add_grad_weight(int64_t group, S* grad_weight) const {
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group;
    add_product<S, kTileRows, kTileVectors>(outs, ins, count_, convolution_.get(), 1, outs, x_ + t_.in.first(group),
                                            t_.in.count, grad_weight, ins);
  }

  void convolve_back(int64_t group, bool streamed, T* grad_input) {
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group, step = t_.in.count;
    T* to = grad_input + position_ * step + t_.in.first(group);
    multiply_blocks<S, kRows, kPanelVectors>(
        count_, ins, outs, convolution_.get(), outs, 1, weights_.of(group), ins,
        by_vector<S>([=](int64_t i, int64_t c, Vec<S> value)
                         CELLOPS_INLINE_LAMBDA { put(to + i * step + c, value, streamed); }));
  }

 private:
  const S* take(const T* rows, int64_t channels, const Buffer<S>& buffer) const {
    if constexpr (sizeof(T) == sizeof(S)) {
      return rows;
    } else {
      convert_row(count_ * channels, rows, buffer.get());
      return buffer.get();
    }
  }

  // The product of a group's positions and its weights in blocks, while the next tile is fetched.
  template <class Finish>
  CELLOPS_INLINE void multiply(int64_t group, const Finish& finish) const {
    constexpr int64_t kSome = 2 * kRows;
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group;
    for (int64_t i = 0; i < count_; i += kSome) {
      prefetch(group * count_ + i, min_of(kSome, count_ - i));
      multiply_blocks<S, kRows, kPanelVectors>(min_of(kSome, count_ - i), outs, ins,
                                               x_ + i * t_.in.count + t_.in.first(group), t_.in.count, 1,
                                               weights_.transposed_of(group), outs, finish, i);
    }
  }

  // Asks for a part of the next tile, `share` of group count * tile of them, from `at` on.
  CELLOPS_INLINE void prefetch(int64_t at, int64_t share) const {
    const int64_t parts = t_.groups * count_;
    for (int64_t i = next_in_bytes_ * at / parts; i < next_in_bytes_ * (at + share) / parts; i += 64) {
      __builtin_prefetch(next_in_ + i);
    }
    for (int64_t i = next_out_bytes_ * at / parts; i < next_out_bytes_ * (at + share) / parts; i += 64) {
      __builtin_prefetch(next_out_ + i);
    }
  }

  static AffineLanes<S> lanes_of(const Affine<S>& affine, int64_t channel) {
    return {load(affine.centre.get() + channel), load(affine.scale.get() + channel),
            load(affine.shift.get() + channel)};
  }

  const Tiling& t_;
  const Weights<S>& weights_;
  const Buffer<S> in_, grads_, convolution_;
  const S *x_ = nullptr, *g_ = nullptr, *kept_ = nullptr;
  const char *next_in_ = nullptr, *next_out_ = nullptr;
  int64_t next_in_bytes_ = 0, next_out_bytes_ = 0;
  int64_t position_ = 0, count_ = 0;
};

}  // namespace cellops::CELLOPS_ISA
