// Grouped 1x1 convolution with what follows it, forward: tile by tile, so that the convolution's result never reaches
// memory. With batch statistics it is computed twice, first for them and then for the output.
#include "group_conv1x1.h"

namespace cellops::CELLOPS_ISA {
namespace {

// The convolution of the tiles, by one thread.
template <class T>
class Convolution {
 public:
  using S = Compute<T>;
  Convolution(const Tiling& tiling, const T* input, const S* weight)
      : t_(tiling),
        input_(input),
        weight_(weight),
        in_(tiling.rows_in * tiling.stride),
        out_(tiling.rows_out * tiling.stride),
        staging_(staging_size<T>(tiling)) {}
  bool failed() const { return in_.failed() || out_.failed() || staging_.failed(); }
  S* out() const { return out_.get(); }
  S* staging() const { return staging_.get(); }

  // Calls each(group, its first row, vectors of a row, count) for the groups of a tile.
  template <class Each>
  void run(int64_t first_group, int64_t position, int64_t count, const Each& each) const {
    const int64_t columns = round_up(count, kLanes<S>), depth = t_.in.of_group;
    load_tile(t_, t_.in, input_, first_group, position, count, in_.get(), staging_.get());
    for (int64_t group = first_group; group < first_group + t_.unit_groups; ++group) {
      S* rows = out_.get() + t_.row_of(t_.out, group);
      multiply_tile(t_.out.of_group, columns, depth, weight_ + group * t_.out.of_group * depth, depth, 1,
                    in_.get() + t_.row_of(t_.in, group), t_.stride, rows, t_.row_step(t_.out));
      each(group, rows);
    }
  }

 private:
  const Tiling& t_;
  const T* input_;
  const S* weight_;
  const Buffer<S> in_, out_, staging_;
};

// Mean and sum of squared deviations of some values of each channel, by one thread. Tiles are combined in double (Chan
// et al. 1979): nothing cancels, however far the mean is from zero.
class Moments {
 public:
  Moments() = default;
  void allocate(int64_t channels, int64_t groups) {
    mean_.allocate(channels), squares_.allocate(channels), count_.allocate(groups);
  }
  bool failed() const { return mean_.failed() || squares_.failed() || count_.failed(); }
  void zero() const { mean_.zero(), squares_.zero(), count_.zero(); }

  // Takes `count` values more for each channel of a group, of_tile(channel, &mean, &squares) of them.
  template <class OfTile>
  void add(int64_t group, int64_t of_group, double count, const OfTile& of_tile) const {
    const double before = count_.get()[group], total = before + count;
    if (total == 0) return;
    const double share = count / total;
    for (int64_t j = 0; j < of_group; ++j) {
      double mean, squares;
      const int64_t o = group * of_group + j;
      of_tile(j, &mean, &squares);
      const double apart = mean - mean_.get()[o];
      mean_.get()[o] += apart * share;
      squares_.get()[o] += squares + apart * apart * (before * share);
    }
    count_.get()[group] = total;
  }
  void add(int64_t group, int64_t of_group, const Moments& other) const {
    add(group, of_group, other.count_.get()[group], [&](int64_t j, double* mean, double* squares) {
      *mean = other.mean_.get()[group * of_group + j];
      *squares = other.squares_.get()[group * of_group + j];
    });
  }
  double mean(int64_t channel) const { return mean_.get()[channel]; }
  double variance(int64_t channel, int64_t count) const { return squares_.get()[channel] / double(count); }

 private:
  Buffer<double> mean_, squares_, count_;
};

template <class S>
inline void moments_of_row(const S* row, int64_t count, double* mean, double* squares) {
  constexpr int64_t lanes = kLanes<S>;
  Vec<S> sum{};
  for (int64_t i = 0; i < count; i += lanes) sum += load(row + i);  // zeros fill the last vector
  const S middle = sum_of<S>(sum) / S(count);
  Vec<S> square{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vec<S> apart = load(row + i) - middle;
    square += apart * apart;
  }
  if (i < count) {
    const Vec<S> apart = keep_first<S>(load(row + i) - middle, count - i);
    square += apart * apart;
  }
  *mean = middle;
  *squares = sum_of<S>(square);
}

template <class T>
void find_moments(const Tiling& t, const Team& team, const Convolution<T>& convolution, const Moments& moments) {
  t.for_tiles(team, [&](int64_t first_group, int64_t position, int64_t count) {
    convolution.run(first_group, position, count, [&](int64_t group, const Compute<T>* rows) {
      moments.add(group, t.out.of_group, double(count), [&](int64_t j, double* mean, double* squares) {
        moments_of_row(rows + j * t.row_step(t.out), count, mean, squares);
      });
    });
  });
}

template <class T>
void find_output(const Tiling& t, const Team& team, const Convolution<T>& convolution, Activation activation,
                 const Affine<Compute<T>>& affine, T* output) {
  using S = Compute<T>;
  with_activation(activation, [&](auto tag) {
    t.for_tiles(team, [&](int64_t first_group, int64_t position, int64_t count) {
      convolution.run(first_group, position, count, [&](int64_t group, S* rows) {
        for (int64_t j = 0; j < t.out.of_group; ++j) {
          const int64_t o = group * t.out.of_group + j;
          const S centre = affine.centre.get()[o];
          const Vec<S> scale = broadcast(affine.scale.get()[o]), shift = broadcast(affine.shift.get()[o]);
          S* row = rows + j * t.row_step(t.out);
          for (int64_t i = 0; i < count; i += kLanes<S>) {
            store(row + i, activate<tag.value, S>((load(row + i) - centre) * scale + shift));
          }
        }
      });
      store_tile(t, t.out, convolution.out(), first_group, position, count, output, convolution.staging());
    });
  });
}

template <class T>
bool forward(const GroupConv1x1Params& p, const GroupConv1x1Forward& io, int threads) {
  using S = Compute<T>;
  const Tiling tiling(p, sizeof(S), threads);
  const Buffer<S> weight(p.out_channels * tiling.in.of_group);
  const Affine<S> affine(p.out_channels);
  if (weight.failed() || affine.failed()) return false;
  convert_row(weight.count(), static_cast<const T*>(io.weight), weight.get());
  affine.set(io.scale, io.shift);
  bool failed = false;
  parallel(tiling.threads, [&](const Team& team) {
    const Convolution<T> convolution(tiling, static_cast<const T*>(io.input), weight.get());
    if (!team.all(!convolution.failed(), &failed)) return;
    find_output(tiling, team, convolution, p.activation, affine, static_cast<T*>(io.output));
  });
  return !failed;
}

template <class T>
bool batch_norm_forward(const GroupConv1x1Params& p, const GroupConv1x1BatchNormForward& io, int threads) {
  using S = Compute<T>;
  const Tiling tiling(p, sizeof(S), threads);
  const Buffer<S> weight(p.out_channels * tiling.in.of_group);
  const Affine<S> affine(p.out_channels);
  Moments moments;
  moments.allocate(p.out_channels, p.groups);
  if (weight.failed() || affine.failed() || moments.failed()) return false;
  convert_row(weight.count(), static_cast<const T*>(io.weight), weight.get());
  moments.zero();
  bool failed = false;
  parallel(tiling.threads, [&](const Team& team) {
    const Convolution<T> convolution(tiling, static_cast<const T*>(io.input), weight.get());
    Moments own;
    own.allocate(p.out_channels, p.groups);
    if (!team.all(!convolution.failed() && !own.failed(), &failed)) return;
    own.zero();
    find_moments(tiling, team, convolution, own);
    team.in_order([&] {
      for (int64_t group = 0; group < p.groups; ++group) moments.add(group, tiling.out.of_group, own);
    });
    int64_t begin, end;
    team.share(p.out_channels, &begin, &end);
    S *mean = static_cast<S*>(io.mean), *var = static_cast<S*>(io.var);
    for (int64_t o = begin; o < end; ++o) {
      mean[o] = tiling.positions ? S(moments.mean(o)) : S(__builtin_nan(""));
      var[o] = S(moments.variance(o, tiling.positions));
    }
    affine.normalise(io.gamma, io.beta, mean, var, p.eps, begin, end);
    team.barrier();
    find_output(tiling, team, convolution, p.activation, affine, static_cast<T*>(io.output));
  });
  return !failed;
}

}  // namespace

CELLOPS_DISPATCH(group_conv1x1_forward, forward, GroupConv1x1Params, GroupConv1x1Forward)
CELLOPS_DISPATCH(group_conv1x1_batch_norm_forward, batch_norm_forward, GroupConv1x1Params, GroupConv1x1BatchNormForward)

}  // namespace cellops::CELLOPS_ISA
