// Grouped 1x1 convolution with what follows it, forward: tile by tile, so that the convolution's result never reaches
// memory. With batch statistics it waits there for them: where backward will read it, else where the output will be. Of
// half types, which would round it, it is computed a second time if backward will not.
#include "group_conv1x1_tiles.h"

namespace cellops::CELLOPS_ISA {
namespace {

// Mean and sum of squared deviations of some values of each channel, by one thread. Tiles are combined in double (Chan
// et al. 1979): nothing cancels, however far the mean is from zero.
class Moments {
 public:
  explicit Moments(const Tiling& t)
      : of_group_(t.out.of_group), mean_(t.out.count), squares_(t.out.count), count_(t.groups) {}
  bool failed() const { return mean_.failed() || squares_.failed() || count_.failed(); }
  void zero() const { mean_.zero(), squares_.zero(), count_.zero(); }

  // Takes `count` values more for each channel of a group.
  template <class S>
  void add(int64_t group, double count, const S* means, const S* squares) const {
    const double before = count_.get()[group], total = before + count;
    if (total == 0) return;
    const double share = count / total;
    double *mean = mean_.get() + group * of_group_, *square = squares_.get() + group * of_group_;
    for (int64_t j = 0; j < of_group_; ++j) {
      const double apart = double(means[j]) - mean[j];
      mean[j] += apart * share;
      square[j] += double(squares[j]) + apart * apart * (before * share);
    }
    count_.get()[group] = total;
  }
  void add(const Moments& other) const {
    for (int64_t group = 0; group < count_.count(); ++group) {
      add(group, other.count_.get()[group], other.mean_.get() + group * of_group_,
          other.squares_.get() + group * of_group_);
    }
  }
  double mean(int64_t channel) const { return mean_.get()[channel]; }
  double variance(int64_t channel, int64_t count) const { return squares_.get()[channel] / double(count); }

 private:
  const int64_t of_group_;
  const Buffer<double> mean_, squares_, count_;
};

// Takes the moments of the convolution, which it leaves in `kept` if that is not null.
template <class Tile, class T, class S>
void find_moments(const Tiling& t, const Team& team, Tile& tile, const T* input, const Moments& moments, S* means,
                  S* squares, S* kept) {
  const bool streamed = kept && tile.streams_kept(kept);
  t.for_tiles(team, false, [&](const Tiling::Place& place, const Tiling::Place& next) {
    tile.start(place, next, 1);
    tile.read_input(input);
    for (int64_t group = place.group; group < place.group + t.unit_groups; ++group) {
      if (kept) {
        tile.convolve_and_keep(group, streamed, kept);
      } else {
        tile.convolve(group);
      }
      tile.find_moments(group, means, squares);
      moments.add(group, double(place.count), means, squares);
    }
  });
  if (streamed) end_streams();
}

// The output from the convolution, which is computed, or read from `kept` if that is not null; may be in its place.
template <class Tile, class T>
void find_output(const Tiling& t, const Team& team, Tile& tile, const T* input, const Compute<T>* kept,
                 Activation activation, const Affine<Compute<T>>& affine, T* output) {
  const bool streamed = t.streamed(t.out, output);
  t.for_tiles(team, false, [&](const Tiling::Place& place, const Tiling::Place& next) {
    tile.start(place, next, kept ? 0 : 1);
    if (kept) {
      tile.read_convolution(kept);
    } else {
      tile.read_input(input);
    }
    for (int64_t group = place.group; group < place.group + t.unit_groups; ++group) {
      with_activation(activation, [&](auto tag) {
        if (kept) {
          tile.template activate<tag.value>(group, affine, streamed, output);
        } else {
          tile.template produce<tag.value>(group, affine, streamed, output);
        }
      });
    }
  });
  if (streamed) end_streams();
}

template <class Tile, class T>
bool run_forward(const GroupConv1x1Params& p, const GroupConv1x1Forward& io, int threads) {
  using S = Compute<T>;
  const Work work{false, Kept::nowhere};
  const Tiling tiling = Tile::tiling(p, work, threads);
  const Weights<typename Tile::Multiplies> weights(tiling, work, Tile::by_position);
  const Affine<S> affine(p.out_channels);
  if (weights.failed() || affine.failed()) return false;
  weights.set(static_cast<const T*>(io.weight));
  affine.set(io.scale, io.shift);
  bool failed = false;
  parallel(tiling.threads, [&](const Team& team) {
    Tile tile(tiling, weights, work);
    if (!team.all(!tile.failed(), &failed)) return;
    find_output(tiling, team, tile, static_cast<const T*>(io.input), static_cast<const S*>(nullptr), p.activation,
                affine, static_cast<T*>(io.output));
  });
  return !failed;
}

template <class Tile, class T>
bool run_batch_norm_forward(const GroupConv1x1Params& p, const GroupConv1x1BatchNormForward& io, int threads) {
  using S = Compute<T>;
  const bool wide = sizeof(T) == sizeof(S);
  S* kept = static_cast<S*>(io.convolution ? io.convolution : wide ? io.output : nullptr);
  const Work work{false, kept ? Tile::keeps(p, io.convolution != nullptr) : Kept::nowhere};
  const Tiling tiling = Tile::tiling(p, work, threads);
  const Weights<typename Tile::Multiplies> weights(tiling, work, Tile::by_position);
  const Affine<S> affine(p.out_channels);
  const Moments moments(tiling);
  if (weights.failed() || affine.failed() || moments.failed()) return false;
  weights.set(static_cast<const T*>(io.weight));
  moments.zero();
  if (io.convolution) write_order(p, work.kept, kept);
  const T* input = static_cast<const T*>(io.input);
  T* output = static_cast<T*>(io.output);
  bool failed = false;
  parallel(tiling.threads, [&](const Team& team) {
    Tile tile(tiling, weights, work);
    const Moments own(tiling);
    const Buffer<S> means(tiling.out.of_group), squares(tiling.out.of_group);
    if (!team.all(!tile.failed() && !own.failed() && !means.failed() && !squares.failed(), &failed)) return;
    own.zero();
    find_moments(tiling, team, tile, input, own, means.get(), squares.get(), kept);
    team.in_order([&] { moments.add(own); });
    int64_t begin, end;
    team.share(p.out_channels, &begin, &end);
    S *mean = static_cast<S*>(io.mean), *var = static_cast<S*>(io.var);
    for (int64_t o = begin; o < end; ++o) {
      mean[o] = tiling.positions ? S(moments.mean(o)) : S(__builtin_nan(""));
      var[o] = S(moments.variance(o, tiling.positions));
    }
    affine.normalise(io.gamma, io.beta, mean, var, p.eps, begin, end);
    team.barrier();
    find_output(tiling, team, tile, input, kept, p.activation, affine, output);
  });
  return !failed;
}

template <class T>
bool forward(const GroupConv1x1Params& p, const GroupConv1x1Forward& io, int threads) {
  return with_kind_of_tile<T>(p,
                              [&](auto kind) { return run_forward<typename decltype(kind)::type, T>(p, io, threads); });
}
template <class T>
bool batch_norm_forward(const GroupConv1x1Params& p, const GroupConv1x1BatchNormForward& io, int threads) {
  return with_kind_of_tile<T>(
      p, [&](auto kind) { return run_batch_norm_forward<typename decltype(kind)::type, T>(p, io, threads); });
}

}  // namespace

CELLOPS_DISPATCH(group_conv1x1_forward, forward, GroupConv1x1Params, GroupConv1x1Forward)
CELLOPS_DISPATCH(group_conv1x1_batch_norm_forward, batch_norm_forward, GroupConv1x1Params, GroupConv1x1BatchNormForward)

}  // namespace cellops::CELLOPS_ISA
