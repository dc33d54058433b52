// Tiles by channel, of any sizes in either memory format. Planes of float and double are read where they lie; half
// types and channels_last memory pass through a tile of the compute type, and from there, or from planes of bfloat16
// where they lie, into what a product of pairs takes.
#pragma once
#include "group_conv1x1_planes.h"

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

// A group's channels on one side of a tile as a product of pairs takes them: rows of positions, of which neighbours
// are pairs, and pairs of channels.
template <class M>
struct Paired {
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  Paired(const Tiling& t, const Channels& side, bool has_rows, bool has_pairs)
      : row_step(row_stride<Element>(t)),
        pair_step(row_stride<Unit>(t)),
        rows(has_rows ? side.of_group * row_step : 0),
        pairs(has_pairs ? div_up(side.of_group, M::depth) * pair_step : 0) {}
  bool failed() const { return rows.failed() || pairs.failed(); }

  const int64_t row_step, pair_step;
  const Buffer<Element> rows;
  const Buffer<Unit> pairs;
};

template <class T, class M>
class ByChannel {
 public:
  using Multiplies = M;
  using S = Compute<T>;
  using Unit = typename M::Unit;

  static constexpr bool by_position = false;
  // How it keeps the convolution: apart in planes, unless they are tiny, that nobody turns rows of channels to rows of
  // positions and back. It finds it in either order.
  static Kept keeps(const GroupConv1x1Params& p, bool apart) {
    constexpr int64_t tiny = 16;  // pixels
    return lies_in_rows(p) && !(apart && p.pixels >= tiny) ? Kept::in_rows : Kept::in_planes;
  }
  static Kept finds(Kept kept) { return kept; }

  // Long rows backward, as sums over lanes and the first lines of a row cost as much for short ones. The same tiles
  // whether the convolution is kept or not: moments, and so outputs, are the same bit for bit.
  static Tiling tiling(const GroupConv1x1Params& p, Work work, int threads) {
    const bool all = lies_in_rows(p);
    return Tiling(p, work.backward ? 816 : 240, (p.in_channels + p.out_channels) / (all ? 1 : p.groups), sizeof(S), all,
                  all ? 4 * Tiling::kStep : Tiling::kStep, threads);
  }

  ByChannel(const Tiling& t, const Weights<M>& weights, Work work)
      : t_(t),
        weights_(weights),
        work_(work),
        in_(t, t.in, t.rows_of_memory),
        out_(t, t.out, t.rows_of_memory),
        kept_(t, t.out, work.kept == Kept::in_rows, work.kept != Kept::nowhere),
        stride_(row_stride<S>(t)),
        convolution_(work.backward && !work.finds_convolution() ? t.out.of_group * stride_ : 0),
        by_channels_(t.in.of_group % kLanes<S> == 0 && (t.out.of_group >= 64 || t.tile < 128)),
        transposed_(work.backward && by_channels_ && (kPairs || !lies_in_channels(t))
                        ? div_up(t.tile, M::depth) * t.in.of_group
                        : 0),
        paired_in_(t, t.in, kPairs && work.backward, kPairs && !work.finds_convolution()),
        paired_out_(t, t.out, kPairs && work.backward, kPairs && work.backward) {}
  bool failed() const {
    return in_.failed() || out_.failed() || kept_.failed() || convolution_.failed() || transposed_.failed() ||
           paired_in_.failed() || paired_out_.failed();
  }

  // Begins a tile, of which the tensors that are wanted are read next; `products` are to be made of it.
  void start(const Tiling::Place& tile, const Tiling::Place& next, int products) {
    group_ = tile.group, position_ = tile.position, count_ = tile.count, next_ = next;
    convolution_in_memory_ = nullptr;
    ahead_.start(t_.fetches ? products * round_up(count_, kLanes<S>) * t_.out.of_group * t_.unit_groups * t_.in.of_group
                            : 0);
  }
  void read_input(const T* input) {
    x_ = input, x_rows_ = nullptr;
    if (kPairs && in_.place_step() % 2 == 0) {  // else the weight's gradient would meet pairs across two rows
      x_rows_ = in_.place(input, group_, position_, count_);
    }
    if (x_rows_ || (work_.finds_convolution() && by_channels_ && lies_in_channels(t_))) {
      in_.fetch(input, next_, ahead_);  // where it lies is enough, for the weight's gradient or for both products
    } else {
      take(input, in_);
    }
  }
  void read_gradient(const T* grad_output) { take(grad_output, out_); }
  // The convolution, instead of computing it: of all groups together, or of each when its turn comes.
  void read_convolution(const S* convolution) {
    convolution_in_memory_ = convolution;
    kept_.fetch(convolution, next_, ahead_);
    if (kept_.in_rows) kept_.read(convolution, group_, position_, count_);
  }

  bool streams_kept(const S* kept) const { return t_.streamed(t_.out, kept, kept_.in_rows); }

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
    if (!kept_.in_rows) {
      kept_.write_planes(group, position_, count_, out_.row_of(group), out_.row_step(), streamed, kept);
    } else if (is_last(group)) {
      out_.write(group_, position_, count_, streamed, kept);
    }
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
    find_convolution(group);
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
    find_convolution(group);
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
    const int64_t outs = t_.out.of_group, ins = t_.in.of_group, depth = div_up(count_, M::depth);
    const Rows grads = rows_to_multiply(paired_out_, outs, out_.row_of(group), out_.row_step());
    if (by_channels_ && lies_in_channels(t_)) {
      const T* x = x_ + position_ * t_.in.count + t_.in.first(group);
      if constexpr (kPairs) {
        pair_rows(count_, ins, x, t_.in.count, transposed_.get(), ins);
        add_by_channels(grads, depth, transposed_.get(), ins, grad_weight);
      } else {
        add_by_channels(grads, depth, reinterpret_cast<const Unit*>(x), t_.in.count, grad_weight);
      }
      return;
    }
    const Rows x = x_rows_ ? Rows{reinterpret_cast<const Unit*>(x_rows_), in_.place_step() / M::depth}
                           : rows_to_multiply(paired_in_, ins, in_.read_row_of(group), in_.read_row_step());
    if (by_channels_) {
      transpose(ins, depth, x.first, x.step, transposed_.get(), ins);
      add_by_channels(grads, depth, transposed_.get(), ins, grad_weight);
      return;
    }
    const int64_t whole = round_up(count_, kLanes<S>);
    for (int64_t j = 0; j < outs; j += kDotRows) {
      for (int64_t c = 0; c < ins; c += kDotColumns) {
        const int64_t height = min_of(int64_t(kDotRows), outs - j), width = min_of(int64_t(kDotColumns), ins - c);
        ahead_.during(height * width * whole);
        multiply_dots<M>(height, width, whole / M::depth, grads.first + j * grads.step, grads.step,
                         x.first + c * x.step, x.step, grad_weight + j * ins + c, ins);
      }
    }
  }

  // The gradient to the input; may take the input's place.
  void convolve_back(int64_t group, bool streamed, T* grad_input) {
    const int64_t ins = t_.in.of_group, columns = round_up(count_, kLanes<S>);
    const Rows grads = pairs_to_multiply(paired_out_, t_.out.of_group, out_.row_of(group), out_.row_step());
    const auto product = [&](const auto& finish) {
      multiply_ahead<M, kTileRows, kTileVectors>(ahead_, ins, columns, weights_.out_units, weights_.backward_of(group),
                                                 1, ins, grads.first, grads.step, by_vector<S>(finish));
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
  static constexpr bool kPairs = M::depth > 1;

  // Whether the input lies in memory as rows of channels that a product takes.
  static bool lies_in_channels(const Tiling& t) { return sizeof(T) == sizeof(typename M::Element) && t.rows_of_memory; }

  // Rows of units, `step` apart.
  struct Rows {
    const Unit* first;
    int64_t step;
  };
  // Rows of a tile's positions, and pairs of them, as products take them; whole vectors, as the tile has.
  Rows rows_to_multiply(const Paired<M>& side, int64_t rows, const S* from, int64_t step) const {
    if constexpr (!kPairs) {
      return {from, step};
    } else {
      for (int64_t j = 0; j < rows; ++j) {
        convert_row(round_up(count_, kLanes<S>), from + j * step, side.rows.get() + j * side.row_step);
      }
      return {reinterpret_cast<const Unit*>(side.rows.get()), side.row_step / M::depth};
    }
  }
  template <class From>
  Rows pairs_to_multiply(const Paired<M>& side, int64_t rows, const From* from, int64_t step) const {
    if constexpr (!kPairs) {
      return {from, step};
    } else {
      pair_rows(rows, round_up(count_, kLanes<S>), from, step, side.pairs.get(), side.pair_step);
      return {side.pairs.get(), side.pair_step};
    }
  }

  void add_by_channels(Rows grads, int64_t depth, const Unit* x, int64_t x_step, S* grad_weight) {
    multiply_ahead<M, kTileRows, kTileVectors>(ahead_, t_.out.of_group, t_.in.of_group, depth, grads.first, grads.step,
                                               1, x, x_step, adding_to(grad_weight, t_.in.of_group));
  }

  // A tile is written when it has all its groups.
  bool is_last(int64_t group) const { return group + 1 == group_ + t_.unit_groups; }

  // A group's convolution, that was read or else computed last.
  void find_convolution(int64_t group) {
    if (convolution_in_memory_ && !kept_.in_rows) kept_.read(convolution_in_memory_, group, position_, count_);
  }
  const S* row_of(int64_t group) const {
    if (convolution_in_memory_) return kept_.read_row_of(group);
    return work_.backward ? convolution_.get() : out_.row_of(group);
  }
  int64_t row_step() const {
    if (convolution_in_memory_) return kept_.read_row_step();
    return work_.backward ? stride_ : out_.row_step();
  }

  void take(const T* tensor, PlaneAccess<T>& access) {
    access.fetch(tensor, next_, ahead_);
    access.read(tensor, group_, position_, count_);
  }

  // The product of a group's weights and its positions.
  template <class Finish>
  CELLOPS_INLINE void multiply(int64_t group, const Finish& finish) {
    const int64_t depth = weights_.in_units, ins = t_.in.of_group;
    Rows x;
    if constexpr (kPairs) {
      x = x_rows_ ? pairs_to_multiply(paired_in_, ins, x_rows_, in_.place_step())
                  : pairs_to_multiply(paired_in_, ins, in_.read_row_of(group), in_.read_row_step());
    } else {
      x = {in_.read_row_of(group), in_.read_row_step()};
    }
    multiply_ahead<M, kTileRows, kTileVectors>(ahead_, t_.out.of_group, round_up(count_, kLanes<S>), depth,
                                               weights_.of(group), depth, 1, x.first, x.step, finish);
  }

  static AffineLanes<S> lanes_of(const Affine<S>& affine, int64_t channel) {
    return {broadcast(affine.centre.get()[channel]), broadcast(affine.scale.get()[channel]),
            broadcast(affine.shift.get()[channel])};
  }

  const Tiling& t_;
  const Weights<M>& weights_;
  const Work work_;
  PlaneAccess<T> in_, out_;
  PlaneAccess<S> kept_;
  const int64_t stride_;
  const Buffer<S> convolution_;
  const bool by_channels_;  // how the weights' gradient is summed
  const Buffer<Unit> transposed_;
  const Paired<M> paired_in_, paired_out_;
  const T* x_ = nullptr;       // the whole input
  const T* x_rows_ = nullptr;  // the tile's first row in it, where a product takes rows as they lie there
  int64_t group_ = 0, position_ = 0, count_ = 0;
  const S* convolution_in_memory_ = nullptr;  // where it was kept
  Tiling::Place next_ = {};
  Ahead ahead_;
};

}  // namespace cellops::CELLOPS_ISA
