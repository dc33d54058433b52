// Depthwise convolutions, forward: a window of rows is copied into a block, convolved there, and what follows is done
// before the result leaves it, so that an image is read once and written once; or it is read where it lies. Batch
// statistics take one reading more.
#pragma once
#include "depthwise_block.h"
#include "depthwise_direct.h"
#include "depthwise_planes.h"

namespace cellops::CELLOPS_ISA {

// Weights and the channels' numbers of one call, in the compute type.
template <class S>
struct DepthwiseForwardConstants {
  explicit DepthwiseForwardConstants(const DepthwiseWalk<S>& w)
      : weights(w.kernel * w.kernel * w.padded), mean(w.padded), scale(w.padded), shift(w.padded) {}
  bool failed() const { return weights.failed() || mean.failed() || scale.failed() || shift.failed(); }
  const Buffer<S> weights, mean, scale, shift;
};

// Count, mean and sum of squared deviations of some values of each channel.
struct DepthwiseMoments {
  explicit DepthwiseMoments(int64_t channels) : channels(channels), memory(3 * channels) {
    if (!failed()) memory.zero();
  }
  bool failed() const { return memory.failed(); }
  double* count() const { return memory.get(); }
  double* mean() const { return memory.get() + channels; }
  double* squares() const { return memory.get() + 2 * channels; }

  // Chan et al. 1979.
  void merge(int64_t channel, double other_count, double other_mean, double other_squares) const {
    if (other_count == 0) return;
    const double before = count()[channel], total = before + other_count, delta = other_mean - mean()[channel];
    count()[channel] = total;
    mean()[channel] += delta * (other_count / total);
    squares()[channel] += other_squares + delta * delta * (before * other_count / total);
  }
  // Of `other_count` values by the sums of their distances from one of them and of the distances' squares.
  void merge_apart(int64_t channel, double other_count, double from, double sum, double sum_of_squares) const {
    merge(channel, other_count, from + sum / other_count, sum_of_squares - sum * sum / other_count);
  }

  int64_t channels;
  const Buffer<double> memory;
};

// A unit's rows of a block. Compiled for the compute type, as all loops over windows are.
template <class E, int Kernel, class S>
void end_rows(const E& ending, const DepthwiseWalk<S>& w, const DepthwiseTaps<Kernel, S>& taps, Vec<S> m, Vec<S> a,
              Vec<S> b, const S* x, int64_t rows, S* y, DepthwiseAhead& given_ahead) {
  DepthwiseAhead ahead = given_ahead;
  for_windows(w, rows, w.flat, taps, x,
              [&](int64_t, int64_t to, const auto& only, Vec<S> z, Vec<S> value) CELLOPS_INLINE_LAMBDA {
                only.put(y + to, ending.template value<S>(value, (z - m) * a + b));
                ahead.fetch();
              });
  given_ahead = ahead;
}

// DepthwiseMoments of the convolution over a block of rows, of which a value in its middle is taken first, so that
// little cancels in the squares.
template <int Kernel, class S>
void add_moments(const DepthwiseWalk<S>& w, const DepthwiseTaps<Kernel, S>& taps, const S* x, int64_t rows,
                 int64_t unit, DepthwiseAhead& given_ahead, const DepthwiseMoments& moments) {
  constexpr int lanes = kLanes<S>;
  DepthwiseAhead ahead = given_ahead;
  const S* corner = x + (rows / 2 - w.half) * w.pitch + (w.width / 2 - w.half) * w.step;
  Vec<S> middle, itself;
  if (w.by_channel) {
    convolve<Kernel>(w.kernel, w.pitch, taps, corner, Rows<1, lanes>{}, &middle, &itself);
  } else {
    convolve<Kernel>(w.kernel, w.pitch, taps, corner, Rows<1, 1>{}, &middle, &itself);
  }
  const Vec<S> first = w.by_channel ? middle : broadcast(S(middle[0]));
  Vec<S> sum = {}, squares = {};
  for_windows(w, rows, false, taps, x, [&](int64_t, int64_t, const auto& only, Vec<S> z, Vec<S>) CELLOPS_INLINE_LAMBDA {
    const Vec<S> value = only(z - first);
    sum += value;
    squares += value * value;
    ahead.fetch();
  });
  given_ahead = ahead;
  const double count = double(rows * w.width);
  double total = 0, total_squares = 0;
  for (int i = 0; i < lanes; ++i) {
    if (w.by_channel) total = total_squares = 0;
    total += double(sum[i]), total_squares += double(squares[i]);
    if (w.by_channel) {
      moments.merge_apart(unit * lanes + i, count, double(first[i]), total, total_squares);
    }
  }
  if (!w.by_channel) {
    moments.merge_apart(unit, count, double(first[0]), total, total_squares);
  }
}

// Windows in blocks of rows, for one thread.
template <int Kernel, class T, class E>
class FromBlocks {
 public:
  using S = Compute<T>;
  FromBlocks(const E& ending, const DepthwiseWalk<S>& walk, const DepthwiseForwardConstants<S>& of, const T* input)
      : w_(walk),
        of_(of),
        ending_(ending),
        input_(input),
        block_(walk, walk.rows + 2 * walk.half),
        results_(walk, walk.rows),
        taps_(walk.kernel * walk.kernel * walk.lanes) {}
  bool failed() const { return block_.failed() || results_.failed() || taps_.failed(); }

  // Adds what an item's convolution gives; then comes the item `next`.
  void measure(int64_t index, int64_t next, const DepthwiseMoments& moments) const {
    for_blocks(index, next, [&](const DepthwiseItem& item, int64_t, int64_t rows, DepthwiseAhead& ahead) {
      for (int64_t u = 0; u < item.units; ++u) {
        const DepthwiseTaps<Kernel, S> taps(w_, of_.weights.get(), item.unit + u, false, taps_.get());
        add_moments(w_, taps, block_.at(u, w_.half), rows, item.unit + u, ahead, moments);
      }
    });
  }

  // y from (conv(x) - mean) * scale + shift.
  void finish(int64_t index, int64_t next, T* output, bool streamed) const {
    for_blocks(index, next, [&](const DepthwiseItem& item, int64_t row, int64_t rows, DepthwiseAhead& ahead) {
      for (int64_t u = 0; u < item.units; ++u) {
        const int64_t unit = item.unit + u;
        const DepthwiseTaps<Kernel, S> taps(w_, of_.weights.get(), unit, false, taps_.get());
        const Vec<S> m = w_.of(of_.mean.get(), unit), a = w_.of(of_.scale.get(), unit),
                     b = w_.of(of_.shift.get(), unit);
        end_rows(ending_, w_, taps, m, a, b, block_.at(u, w_.half), rows, results_.at(u, 0), ahead);
      }
      store_rows(w_, item, results_, row, row + rows, output, streamed);
    });
  }

 private:
  template <class Work>
  void for_blocks(int64_t index, int64_t next, const Work& work) const {
    const DepthwiseItem item = w_.item(index);
    for (int64_t row = item.begin; row < item.end; row += w_.rows) {
      const int64_t rows = min_of(w_.rows, item.end - row);
      load_window(w_, item, input_, row, rows, w_.half, block_);
      DepthwiseAhead ahead = ahead_of(w_, item, row, w_.half, next, input_);
      work(item, row, rows, ahead);
    }
  }

  const DepthwiseWalk<S>& w_;
  const DepthwiseForwardConstants<S>& of_;
  const E ending_;
  const T* input_;
  const DepthwiseBlock<S> block_, results_;
  const Buffer<S> taps_;
};

// Windows where the image lies, for one thread.
template <class E>
class FromImages {
 public:
  using S = float;
  FromImages(const E& ending, const DepthwiseWalk<S>& walk, const DepthwiseForwardConstants<S>& of, const S* input)
      : w_(walk), of_(of), ending_(ending), input_(input), border_(walk.channels), sums_(3 * walk.group * walk.lanes) {}
  bool failed() const { return border_.failed() || sums_.failed(); }

  void measure(int64_t index, int64_t, const DepthwiseMoments& moments) const {
    DepthwiseItem part = w_.item(index);
    const int64_t end = part.end;
    for (; part.begin < end; part.begin = part.end) {
      part.end = min_of(part.begin + w_.rows, end);
      measure_rows(part, moments);
    }
  }

  void finish(int64_t index, int64_t, S* output, bool streamed) const {
    const DepthwiseItem item = w_.item(index);
    const int64_t at = image(item), below = w_.width * w_.channels;
    const S *mean = of_.mean.get(), *scale = of_.scale.get(), *shift = of_.shift.get();
    const auto end_pixels = [&](auto place, const Vec<S>* z, const Vec<S>* values) CELLOPS_INLINE_LAMBDA {
      const Vec<S> m = load(mean + place.channel), a = load(scale + place.channel), b = load(shift + place.channel);
      // Channels that belong to another item, and so to another thread, are not written again.
      const int64_t others = place.unit == 0 ? direct_overlap(w_, item.unit) : 0;
      S* to = output + at + place.element;
#pragma GCC unroll 4
      for (int r = 0; r < place.count; ++r, to += below) {
        const Vec<S> y = ending_.template value<S>(values[r], (z[r] - m) * a + b);
        if (others == 0) {
          put(to, y, streamed);
        } else {
          for (int64_t i = others; i < w_.lanes; ++i) to[i] = y[i];
        }
      }
    };
    for_direct_windows(w_, item, input_, border_, of_.weights.get(), end_pixels);
  }

 private:
  int64_t image(const DepthwiseItem& item) const { return item.image * w_.height * w_.width * w_.channels; }

  // As add_moments, for all units of some rows.
  void measure_rows(const DepthwiseItem& item, const DepthwiseMoments& moments) const {
    constexpr int lanes = kLanes<S>;
    S *first = sums_.get(), *sums = first + item.units * lanes, *squares = sums + item.units * lanes;
    for (int64_t u = 0; u < item.units; ++u) {
      const int64_t row = (item.begin + item.end) / 2;
      store(first + u * lanes, convolve_pixel(w_, item, input_, row, w_.width / 2, border_, of_.weights.get(), u));
      store(sums + u * lanes, Vec<S>{}), store(squares + u * lanes, Vec<S>{});
    }
    const auto add = [&](auto place, const Vec<S>* z, const Vec<S>*) CELLOPS_INLINE_LAMBDA {
      const int64_t at = place.unit * lanes;
      const Vec<S> apart = load(first + at);
      Vec<S> sum = load(sums + at), square = load(squares + at);
#pragma GCC unroll 4
      for (int r = 0; r < place.count; ++r) {
        const Vec<S> value = z[r] - apart;
        sum += value, square += value * value;
      }
      store(sums + at, sum), store(squares + at, square);
    };
    for_direct_windows(w_, item, input_, border_, of_.weights.get(), add);
    const double count = double((item.end - item.begin) * w_.width);
    for (int64_t u = 0; u < item.units; ++u) {
      const int64_t c = direct_channel(w_, item.unit + u), at = u * lanes;
      for (int64_t i = direct_overlap(w_, item.unit + u); i < lanes; ++i) {
        moments.merge_apart(c + i, count, double(first[at + i]), double(sums[at + i]), double(squares[at + i]));
      }
    }
  }

  const DepthwiseWalk<S>& w_;
  const DepthwiseForwardConstants<S>& of_;
  const E ending_;
  const S* input_;
  const DirectBorder border_;
  const Buffer<S> sums_;
};

// Windows where a plane lies, for one thread.
template <class E>
class FromPlanes {
 public:
  using S = float;
  FromPlanes(const E& ending, const DepthwiseWalk<S>& walk, const DepthwiseForwardConstants<S>& of, const S* input)
      : w_(walk), of_(of), ending_(ending), input_(input), border_(walk.width), results_(walk, walk.rows) {}
  bool failed() const { return border_.failed() || results_.failed(); }

  void measure(int64_t index, int64_t next, const DepthwiseMoments& moments) const {
    for_blocks(index, next, [&](const Block& block, const DepthwiseTaps<3, S>& taps, PlaneAhead ahead) {
      const auto [item, row, rows] = block;
      const S* from = input_ + plane_of(w_, item);
      const Vec<S> first = broadcast(convolve_element(w_, taps, from, row + rows / 2, w_.width / 2));
      Vec<S> sum = {}, squares = {};
      for_plane_windows(w_, taps, from, border_, row, row + rows,
                        [&](int64_t, const auto& only, Vec<S> z, Vec<S>) CELLOPS_INLINE_LAMBDA {
                          const Vec<S> value = only(z - first);
                          sum += value;
                          squares += value * value;
                          ahead.fetch();
                        });
      double total = 0, total_squares = 0;
      for (int i = 0; i < w_.lanes; ++i) total += double(sum[i]), total_squares += double(squares[i]);
      moments.merge_apart(item.unit, double(rows * w_.width), double(first[0]), total, total_squares);
    });
  }

  void finish(int64_t index, int64_t next, S* output, bool streamed) const {
    for_blocks(index, next, [&](const Block& block, const DepthwiseTaps<3, S>& taps, PlaneAhead ahead) {
      const auto [item, row, rows] = block;
      const Vec<S> m = w_.of(of_.mean.get(), item.unit), a = w_.of(of_.scale.get(), item.unit),
                   b = w_.of(of_.shift.get(), item.unit);
      const int64_t at_plane = plane_of(w_, item), first = row * w_.width;
      // Whole lines are streamed, and rows are none: from a block of results, where they touch as in the plane.
      S *to = output + at_plane + first, *result = streamed ? results_.at(0, 0) : to;
      for_plane_windows(w_, taps, input_ + at_plane, border_, row, row + rows,
                        [&](int64_t at, const auto& only, Vec<S> z, Vec<S> value) CELLOPS_INLINE_LAMBDA {
                          only.put(result + (at - first), ending_.template value<S>(value, (z - m) * a + b));
                          ahead.fetch();
                        });
      if (streamed) store_run(rows * w_.width, result, to, true);
    });
  }

 private:
  // Some rows of an item.
  struct Block {
    DepthwiseItem item;
    int64_t row, rows;
  };
  template <class Work>
  void for_blocks(int64_t index, int64_t next, const Work& work) const {
    const DepthwiseItem item = w_.item(index);
    const DepthwiseTaps<3, S> taps(w_, of_.weights.get(), item.unit, false, nullptr);
    for (int64_t row = item.begin; row < item.end; row += w_.rows) {
      const Block block{item, row, min_of(w_.rows, item.end - row)};
      work(block, taps, PlaneAhead(w_, item, row, next, input_));
    }
  }

  const DepthwiseWalk<S>& w_;
  const DepthwiseForwardConstants<S>& of_;
  const E ending_;
  const S* input_;
  const PlaneBorder border_;
  const DepthwiseBlock<S> results_;
};

// All of a thread's items, the last first: what the statistics have read last may still be in a cache.
template <class Windows, class S, class T>
void finish_items(const Team& team, const DepthwiseWalk<S>& w, const Windows& windows, T* output) {
  const bool streamed = w.streams(output);
  int64_t begin, end;
  team.share(w.items, &begin, &end);
  for (int64_t i = end - 1; i >= begin; --i) windows.finish(i, i - 1, output, streamed);
  if (streamed) end_streams();
}

template <class Windows, class T, class Params>
bool run_depthwise(const Params& p, const FreluForward& io, int threads) {
  using S = Compute<T>;
  threads = depthwise_threads(p, threads);
  const DepthwiseWalk<S> w(p, 2, threads);
  const DepthwiseForwardConstants<S> constants(w);
  if (constants.failed()) return false;
  unpack_weights(w, static_cast<const T*>(io.weight), constants.weights.get());
  constants.mean.zero();
  unpack_channels(w, io.scale, S(1), constants.scale.get());
  unpack_channels(w, io.shift, S(0), constants.shift.get());
  bool failed = false;
  parallel(threads, [&](const Team& team) {
    const Windows windows(Ending<Params>(p), w, constants, static_cast<const T*>(io.input));
    if (!team.all(!windows.failed(), &failed)) return;
    finish_items(team, w, windows, static_cast<T*>(io.output));
  });
  return !failed;
}

template <class Windows, class T, class Params>
bool run_depthwise(const Params& p, const FreluBatchNormForward& io, int threads) {
  using S = Compute<T>;
  threads = depthwise_threads(p, threads);
  const DepthwiseWalk<S> w(p, 2, threads);
  const DepthwiseForwardConstants<S> constants(w);
  const DepthwiseMoments every(w.padded);
  if (constants.failed() || every.failed()) return false;
  unpack_weights(w, static_cast<const T*>(io.weight), constants.weights.get());
  unpack_channels(w, io.gamma, S(1), constants.scale.get());
  unpack_channels(w, io.beta, S(0), constants.shift.get());
  constants.mean.zero();
  bool failed = false;
  parallel(threads, [&](const Team& team) {
    const Windows windows(Ending<Params>(p), w, constants, static_cast<const T*>(io.input));
    const DepthwiseMoments moments(w.padded);
    if (!team.all(!windows.failed() && !moments.failed(), &failed)) return;
    int64_t begin, end;
    team.share(w.items, &begin, &end);
    for (int64_t i = begin; i < end; ++i) windows.measure(i, i + 1, moments);
    team.in_order([&] {
      for (int64_t c = 0; c < w.channels; ++c) {
        every.merge(c, moments.count()[c], moments.mean()[c], moments.squares()[c]);
      }
    });
    if (team.index == 0) {
      S *mean = static_cast<S*>(io.mean), *var = static_cast<S*>(io.var);
      for (int64_t c = 0; c < w.channels; ++c) {
        mean[c] = constants.mean.get()[c] = S(every.mean()[c]);
        var[c] = S(every.squares()[c] / every.count()[c]);  // NaN of an empty batch
        constants.scale.get()[c] *= S(1 / __builtin_sqrt(every.squares()[c] / every.count()[c] + p.eps));
      }
    }
    team.barrier();
    finish_items(team, w, windows, static_cast<T*>(io.output));
  });
  return !failed;
}

template <class T, class Params, class Tensors>
bool depthwise_forward(const Params& p, const Tensors& io, int threads) {
  using E = Ending<Params>;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (reads_directly(p)) return run_depthwise<FromImages<E>, float>(p, io, threads);
    if (reads_planes(p)) return run_depthwise<FromPlanes<E>, float>(p, io, threads);
  }
  return with_window<Compute<T>>(p.kernel, [&](auto window) {
    return run_depthwise<FromBlocks<decltype(window)::value, T, E>, T>(p, io, threads);
  });
}

}  // namespace cellops::CELLOPS_ISA
