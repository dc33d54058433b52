// Grouped 1x1 convolution with what follows it, backward. Tile by tile the convolution is computed again, with it the
// activation's slope and the gradient to the convolution; from that the gradients to input and weight. With batch
// statistics two sums over the batch are needed first, in a pass of its own, and forward kept the convolution for both.
#include "group_conv1x1_tiles.h"

namespace cellops::CELLOPS_ISA {
namespace {

// What a pass is for: the sums, the gradients to input and weight (each may be null), or both.
enum class Pass { sum, apply, both };

// The tensors that both ops have; both gradients may be null, and so is the convolution where it was not kept.
template <class T>
struct Tensors {
  template <class Io>
  explicit Tensors(const Io& io, const void* kept)
      : weight(static_cast<const T*>(io.weight)),
        input(static_cast<const T*>(io.input)),
        grad_output(static_cast<const T*>(io.grad_output)),
        convolution(static_cast<const Compute<T>*>(kept)),
        grad_input(static_cast<T*>(io.grad_input)),
        grad_weight(static_cast<T*>(io.grad_weight)) {}
  const T *weight, *input, *grad_output;
  const Compute<T>* convolution;
  T *grad_input, *grad_weight;
};

// One pass by one thread. Only what the activation is part of is compiled for each.
template <class Tile, class T>
void run_pass(Pass pass, const Tiling& t, const Team& team, Tile& tile, Activation activation, const Tensors<T>& io,
              const Chain<Compute<T>>& chain, const Sums& sums, Compute<T>* grad_weight) {
  const bool streamed = t.streamed(t.in, io.grad_input);
  const bool backwards = pass == Pass::apply;
  const int products = !io.convolution + (pass != Pass::sum) * ((grad_weight != nullptr) + (io.grad_input != nullptr));
  t.for_tiles(team, backwards, [&](const Tiling::Place& place, const Tiling::Place& next) {
    tile.start(place, next, products);
    tile.read_gradient(io.grad_output);
    if (io.convolution) tile.read_convolution(io.convolution);
    if (!io.convolution || (pass != Pass::sum && grad_weight)) tile.read_input(io.input);
    for (int64_t group = place.group; group < place.group + t.unit_groups; ++group) {
      if (!io.convolution) tile.convolve(group);
      with_activation(activation, [&](auto tag) {
        if (pass == Pass::sum) return tile.template chain<tag.value, true, false>(group, chain, sums);
        if (pass == Pass::apply) return tile.template chain<tag.value, false, true>(group, chain, sums);
        tile.template chain<tag.value, true, true>(group, chain, sums);
      });
      if (pass == Pass::sum) continue;
      if (grad_weight) tile.add_grad_weight(group, grad_weight + group * t.out.of_group * t.in.of_group);
      if (io.grad_input) tile.convolve_back(group, streamed, io.grad_input);
    }
  });
  if (streamed) end_streams();
}

// What stands between the pass for the sums and the one for the gradients where the statistics are the batch's.
template <class S>
struct ThroughStatistics {
  void find(const Team& team, const Chain<S>& chain, const Sums& total) const {
    int64_t begin, end;
    team.share(chain.constant.count(), &begin, &end);
    for (int64_t o = begin; o < end; ++o) {
      const double variance = double(var[o]) + eps, scale = chain.affine.scale.get()[o];
      const double grad = total.grad.get()[o], product = total.product.get()[o];
      chain.of_apart.get()[o] = S(-scale * product / (variance * positions));
      chain.constant.get()[o] = S(-scale * grad / positions);
      if (grad_gamma) grad_gamma[o] = S(product / __builtin_sqrt(variance));
      if (grad_beta) grad_beta[o] = S(grad);
    }
    team.barrier();
  }
  const S* var;
  double eps, positions;
  S *grad_gamma, *grad_beta;
};

// Buffers for the call, the passes, and the gradient to the weight. A null `statistics` stands for a single pass.
template <class Tile, class T>
bool with_tiles(const GroupConv1x1Params& p, Tensors<T> io, const Chain<Compute<T>>& chain, const Sums& total,
                const ThroughStatistics<Compute<T>>* statistics, int threads) {
  using S = Compute<T>;
  const Work work{true, Tile::finds(read_order(p, io.convolution))};
  if (work.kept == Kept::nowhere) io.convolution = nullptr;
  const Tiling tiling = Tile::tiling(p, work, threads);
  const Weights<typename Tile::Multiplies> weights(tiling, work, Tile::by_position);
  const Buffer<S> grad_weight(io.grad_weight ? p.out_channels * tiling.in.of_group : 0);
  if (weights.failed() || grad_weight.failed()) return false;
  weights.set(io.weight);
  grad_weight.zero();
  total.zero();
  bool failed = false;
  parallel(tiling.threads, [&](const Team& team) {
    Tile tile(tiling, weights, work);
    const Sums sums(p.out_channels);
    const Buffer<S> own(grad_weight.count());
    if (!team.all(!tile.failed() && !sums.failed() && !own.failed(), &failed)) return;
    sums.zero();
    own.zero();
    const auto pass = [&](Pass what) {
      run_pass(what, tiling, team, tile, p.activation, io, chain, sums, own.get());
      if (what != Pass::apply) team.in_order([&] { total.add(sums); });
    };
    pass(statistics ? Pass::sum : Pass::both);
    if (statistics) {
      statistics->find(team, chain, total);
      if (!io.grad_input && !io.grad_weight) return;
      pass(Pass::apply);
    }
    team.in_order([&] {
      for (int64_t i = 0; i < own.count(); ++i) grad_weight.get()[i] += own.get()[i];
    });
  });
  if (failed) return false;
  if (io.grad_weight) convert_row(grad_weight.count(), grad_weight.get(), io.grad_weight);
  return true;
}

template <class T>
bool run_backward(const GroupConv1x1Params& p, const Tensors<T>& io, const Chain<Compute<T>>& chain, const Sums& total,
                  const ThroughStatistics<Compute<T>>* statistics, int threads) {
  return with_kind_of_tile<T>(p, [&](auto kind) {
    return with_tiles<typename decltype(kind)::type, T>(p, io, chain, total, statistics, threads);
  });
}

template <class T>
bool backward(const GroupConv1x1Params& p, const GroupConv1x1Backward& io, int threads) {
  using S = Compute<T>;
  const Chain<S> chain(p.out_channels);
  const Sums total(p.out_channels);
  if (chain.failed() || total.failed()) return false;
  chain.affine.set(io.scale, io.shift);
  chain.of_apart.zero();
  chain.constant.zero();
  if (!run_backward<T>(p, Tensors<T>(io, nullptr), chain, total, nullptr, threads)) return false;
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
  const Chain<S> chain(p.out_channels);
  const Sums total(p.out_channels);
  if (chain.failed() || total.failed()) return false;
  const S* var = static_cast<const S*>(io.var);
  chain.affine.normalise(io.gamma, io.beta, static_cast<const S*>(io.mean), var, p.eps, 0, p.out_channels);
  chain.of_apart.zero();
  chain.constant.zero();
  const ThroughStatistics<S> statistics{var, p.eps, double(p.batch * p.pixels), static_cast<S*>(io.grad_gamma),
                                        static_cast<S*>(io.grad_beta)};
  return run_backward<T>(p, Tensors<T>(io, io.convolution), chain, total, &statistics, threads);
}

}  // namespace

CELLOPS_DISPATCH(group_conv1x1_backward, backward, GroupConv1x1Params, GroupConv1x1Backward)
CELLOPS_DISPATCH(group_conv1x1_batch_norm_backward, batch_norm_backward, GroupConv1x1Params,
                 GroupConv1x1BatchNormBackward)

}  // namespace cellops::CELLOPS_ISA
