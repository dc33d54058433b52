// Grouped 1x1 convolution with what follows it, backward. Tile by tile the convolution is computed again, with it the
// activation's slope and the gradient to the convolution; from that the gradients to input and weight. With batch
// statistics two sums over the batch are needed first: a pass of its own.
#include "group_conv1x1.h"

namespace cellops::CELLOPS_ISA {
namespace {

// The gradient to the convolution z from that behind the affine step, grad' = slope * grad:
// affine.scale * grad' + of_apart * (z - affine.centre) + constant. The last two are what a normalisation by the batch
// adds, zero without one.
template <class S>
struct Chain {
  explicit Chain(int64_t channels) : affine(channels), of_apart(channels), constant(channels) {}
  bool failed() const { return affine.failed() || of_apart.failed() || constant.failed(); }
  const Affine<S> affine;
  const Buffer<S> of_apart, constant;
};

// Sums over positions per channel: of grad' and of grad' * (z - centre).
struct Sums {
  explicit Sums(int64_t channels) : grad(channels), product(channels) {}
  bool failed() const { return grad.failed() || product.failed(); }
  void zero() const { grad.zero(), product.zero(); }
  void add(const Sums& other) const {
    for (int64_t o = 0; o < grad.count(); ++o) {
      grad.get()[o] += other.grad.get()[o];
      product.get()[o] += other.product.get()[o];
    }
  }
  const Buffer<double> grad, product;
};

// One row: adds to the sums or, with Apply, turns the gradient into that to the convolution.
template <Activation A, bool Sum, bool Apply, class S>
inline void backward_row(const Chain<S>& chain, int64_t channel, int64_t count, const S* convolution, S* gradient,
                         const Sums& sums) {
  constexpr int64_t lanes = kLanes<S>;
  const S centre = chain.affine.centre.get()[channel];
  const Vec<S> scale = broadcast(chain.affine.scale.get()[channel]),
               shift = broadcast(chain.affine.shift.get()[channel]);
  const Vec<S> of_apart = broadcast(chain.of_apart.get()[channel]), constant = broadcast(chain.constant.get()[channel]);
  Vec<S> grad_sum{}, product_sum{};
  const auto step = [&](int64_t i, int64_t valid) {
    const Vec<S> apart = load(convolution + i) - centre;
    Vec<S> grad = activation_slope<A, S>(apart * scale + shift) * load(gradient + i);
    if (valid < lanes) grad = keep_first<S>(grad, valid);
    if constexpr (Sum) {
      grad_sum += grad;
      product_sum += valid < lanes ? keep_first<S>(grad * apart, valid) : grad * apart;
    }
    if constexpr (Apply) {
      const Vec<S> whole = grad * scale + (apart * of_apart + constant);
      store(gradient + i, valid < lanes ? keep_first<S>(whole, valid) : whole);
    }
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) step(i, lanes);
  if (i < count) step(i, count - i);
  if constexpr (Sum) {
    sums.grad.get()[channel] += sum_of<S>(grad_sum);
    sums.product.get()[channel] += sum_of<S>(product_sum);
  }
}

// One thread's tiles and sums.
template <class T>
class Worker {
 public:
  using S = Compute<T>;
  Worker(const Tiling& tiling, const T* grad_output, const T* input, const S* weight, const Chain<S>& chain)
      : sums(tiling.out.count),
        t_(tiling),
        grad_output_(grad_output),
        input_(input),
        weight_(weight),
        chain_(chain),
        in_(tiling.rows_in * tiling.stride),
        gradient_(tiling.rows_out * tiling.stride),
        convolution_(tiling.out.of_group * tiling.stride),
        staging_(staging_size<T>(tiling)) {}
  bool failed() const {
    return sums.failed() || in_.failed() || gradient_.failed() || convolution_.failed() || staging_.failed();
  }

  // Goes through the tiles for the sums and, with Apply, for the gradients to input and weight, where these are wanted.
  template <bool Sum, bool Apply>
  void run(const Team& team, Activation activation, T* grad_input, S* grad_weight) const {
    with_activation(activation, [&](auto tag) {
      t_.for_tiles(team, [&](int64_t first_group, int64_t position, int64_t count) {
        load_tile(t_, t_.in, input_, first_group, position, count, in_.get(), staging_.get());
        load_tile(t_, t_.out, grad_output_, first_group, position, count, gradient_.get(), staging_.get());
        for (int64_t group = first_group; group < first_group + t_.unit_groups; ++group) {
          backward_group<tag.value, Sum, Apply>(group, count, grad_input != nullptr, grad_weight);
        }
        if (Apply && grad_input) {
          store_tile(t_, t_.in, in_.get(), first_group, position, count, grad_input, staging_.get());
        }
      });
    });
  }

  const Sums sums;

 private:
  // The gradient to the input takes the place of the input.
  template <Activation A, bool Sum, bool Apply>
  void backward_group(int64_t group, int64_t count, bool wants_input, S* grad_weight) const {
    const int64_t columns = round_up(count, kLanes<S>), ins = t_.in.of_group, outs = t_.out.of_group;
    const S* weight = weight_ + group * outs * ins;
    S *in = in_.get() + t_.row_of(t_.in, group), *gradient = gradient_.get() + t_.row_of(t_.out, group);
    const int64_t in_step = t_.row_step(t_.in), out_step = t_.row_step(t_.out);
    multiply_tile(outs, columns, ins, weight, ins, 1, in, in_step, convolution_.get(), t_.stride);
    for (int64_t j = 0; j < outs; ++j) {
      backward_row<A, Sum, Apply>(chain_, group * outs + j, count, convolution_.get() + j * t_.stride,
                                  gradient + j * out_step, sums);
    }
    if constexpr (Apply) {
      if (grad_weight) {
        multiply_dots(outs, ins, columns, gradient, out_step, in, in_step, grad_weight + group * outs * ins, ins);
      }
      if (wants_input) multiply_tile(ins, columns, outs, weight, 1, ins, gradient, out_step, in, in_step);
    }
  }

  const Tiling& t_;
  const T *grad_output_, *input_;
  const S* weight_;
  const Chain<S>& chain_;
  const Buffer<S> in_, gradient_, convolution_, staging_;
};

// What both ops have: buffers for the call, the passes, and the gradient to the weight.
//
// between(team) stands between a pass for the sums and one for the gradients; null for a single pass for both.
template <class T, class Tensors, class Between>
bool run_backward(const GroupConv1x1Params& p, const Tensors& io, const Tiling& tiling, const Chain<Compute<T>>& chain,
                  const Sums& total, bool two_passes, const Between& between) {
  using S = Compute<T>;
  const int64_t weights = p.out_channels * tiling.in.of_group;
  const Buffer<S> weight(weights), grad_weight(io.grad_weight ? weights : 0);
  if (weight.failed() || grad_weight.failed()) return false;
  convert_row(weights, static_cast<const T*>(io.weight), weight.get());
  grad_weight.zero();
  total.zero();
  bool failed = false;
  parallel(tiling.threads, [&](const Team& team) {
    const Worker<T> worker(tiling, static_cast<const T*>(io.grad_output), static_cast<const T*>(io.input), weight.get(),
                           chain);
    const Buffer<S> own(grad_weight.count());
    if (!team.all(!worker.failed() && !own.failed(), &failed)) return;
    worker.sums.zero();
    own.zero();
    T* grad_input = static_cast<T*>(io.grad_input);
    if (two_passes) {
      worker.template run<true, false>(team, p.activation, nullptr, nullptr);
      team.in_order([&] { total.add(worker.sums); });
      between(team);
      if (!grad_input && !io.grad_weight) return;
      worker.template run<false, true>(team, p.activation, grad_input, own.get());
    } else {
      worker.template run<true, true>(team, p.activation, grad_input, own.get());
      team.in_order([&] { total.add(worker.sums); });
    }
    team.in_order([&] {
      for (int64_t i = 0; i < own.count(); ++i) grad_weight.get()[i] += own.get()[i];
    });
  });
  if (failed) return false;
  if (io.grad_weight) convert_row(weights, grad_weight.get(), static_cast<T*>(io.grad_weight));
  return true;
}

template <class T>
bool backward(const GroupConv1x1Params& p, const GroupConv1x1Backward& io, int threads) {
  using S = Compute<T>;
  const Tiling tiling(p, sizeof(S), threads);
  const Chain<S> chain(p.out_channels);
  const Sums total(p.out_channels);
  if (chain.failed() || total.failed()) return false;
  chain.affine.set(io.scale, io.shift);
  chain.of_apart.zero();
  chain.constant.zero();
  if (!run_backward<T>(p, io, tiling, chain, total, false, [](const Team&) {})) return false;
  const auto give = [&](const Buffer<double>& sums, void* to) {
    for (int64_t o = 0; to && o < p.out_channels; ++o) static_cast<S*>(to)[o] = S(sums.get()[o]);
  };
  give(total.product, io.grad_scale);
  give(total.grad, io.grad_shift);
  return true;
}

template <class T>
bool batch_norm_backward(const GroupConv1x1Params& p, const GroupConv1x1BatchNormBackward& io, int threads) {
  using S = Compute<T>;
  const Tiling tiling(p, sizeof(S), threads);
  const Chain<S> chain(p.out_channels);
  const Sums total(p.out_channels);
  if (chain.failed() || total.failed()) return false;
  const S* var = static_cast<const S*>(io.var);
  chain.affine.normalise(io.gamma, io.beta, static_cast<const S*>(io.mean), var, p.eps, 0, p.out_channels);
  chain.of_apart.zero();
  chain.constant.zero();
  const auto between = [&](const Team& team) {
    int64_t begin, end;
    team.share(p.out_channels, &begin, &end);
    for (int64_t o = begin; o < end; ++o) {
      const double variance = double(var[o]) + p.eps, scale = chain.affine.scale.get()[o];
      const double grad = total.grad.get()[o], product = total.product.get()[o];
      chain.of_apart.get()[o] = S(-scale * product / (variance * double(tiling.positions)));
      chain.constant.get()[o] = S(-scale * grad / double(tiling.positions));
      if (io.grad_gamma) static_cast<S*>(io.grad_gamma)[o] = S(product / __builtin_sqrt(variance));
      if (io.grad_beta) static_cast<S*>(io.grad_beta)[o] = S(grad);
    }
    team.barrier();
  };
  return run_backward<T>(p, io, tiling, chain, total, true, between);
}

}  // namespace

CELLOPS_DISPATCH(group_conv1x1_backward, backward, GroupConv1x1Params, GroupConv1x1Backward)
CELLOPS_DISPATCH(group_conv1x1_batch_norm_backward, batch_norm_backward, GroupConv1x1Params,
                 GroupConv1x1BatchNormBackward)

}  // namespace cellops::CELLOPS_ISA
