// Depthwise convolutions, forward: a window of rows is copied into a block, convolved there, and what follows is done
// before the result leaves it, so that an image is read once and written once. Batch statistics take one reading more.
#pragma once
#include "depthwise.h"

namespace cellops::CELLOPS_ISA {

// What of the walk a thread needs for itself.
template <class S>
struct DepthwiseForwardScratch {
  explicit DepthwiseForwardScratch(const DepthwiseWalk<S>& w)
      : input(w, w.rows + 2 * w.half), output(w, w.rows), taps(w.kernel * w.kernel * w.lanes) {}
  bool failed() const { return input.failed() || output.failed() || taps.failed(); }
  const DepthwiseBlock<S> input, output;
  const Buffer<S> taps;
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

// y from (conv(x) - mean) * scale + shift on a thread's items, the last first: what the statistics have read last may
// still be in a cache. Per-channel numbers are [padded].
template <int Kernel, class T, class S, class Params>
void convolve_images(const Params& p, const Team& team, const DepthwiseWalk<S>& w, const T* input, const S* weights,
                     const S* mean, const S* scale, const S* shift, const DepthwiseForwardScratch<S>& own, T* output) {
  const bool streamed = w.streams(output);
  int64_t begin, end;
  team.share(w.items, &begin, &end);
  for (int64_t i = end - 1; i >= begin; --i) {
    const DepthwiseItem item = w.item(i);
    for (int64_t row = item.begin; row < item.end; row += w.rows) {
      const int64_t rows = min_of(w.rows, item.end - row);
      load_window(w, item, input, row, rows, w.half, own.input);
      DepthwiseAhead ahead = ahead_of(w, item, row, w.half, i - 1, input);
      for (int64_t u = 0; u < item.units; ++u) {
        const DepthwiseTaps<Kernel, S> taps(w, weights, item.unit + u, false, own.taps.get());
        const Vec<S> m = w.of(mean, item.unit + u), a = w.of(scale, item.unit + u), b = w.of(shift, item.unit + u);
        end_rows(Ending<Params>(p), w, taps, m, a, b, own.input.at(u, w.half), rows, own.output.at(u, 0), ahead);
      }
      store_rows(w, item, own.output, row, row + rows, output, streamed);
    }
  }
  if (streamed) end_streams();
}

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

  int64_t channels;
  const Buffer<double> memory;
};

// DepthwiseMoments of the convolution over a block of rows, of which a value in its middle is taken first, so that
// little cancels in the squares.
template <int Kernel, class S>
void add_moments(const DepthwiseWalk<S>& w, const DepthwiseTaps<Kernel, S>& taps, const S* x, int64_t rows,
                 int64_t unit, DepthwiseAhead& given_ahead, const DepthwiseMoments& moments) {
  constexpr int lanes = kLanes<S>;
  DepthwiseAhead ahead = given_ahead;
  const S* corner = x + (rows / 2 - w.half) * w.pitch + (w.width / 2 - w.half) * w.step;
  Vec<S> middle, itself;
  if (w.channels_last) {
    convolve<Kernel>(w.kernel, w.pitch, taps, corner, Rows<1, lanes>{}, &middle, &itself);
  } else {
    convolve<Kernel>(w.kernel, w.pitch, taps, corner, Rows<1, 1>{}, &middle, &itself);
  }
  const Vec<S> first = w.channels_last ? middle : broadcast(S(middle[0]));
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
    if (w.channels_last) total = total_squares = 0;
    total += double(sum[i]), total_squares += double(squares[i]);
    if (w.channels_last) {
      moments.merge(unit * lanes + i, count, double(first[i]) + total / count, total_squares - total * total / count);
    }
  }
  if (!w.channels_last) {
    moments.merge(unit, count, double(first[0]) + total / count, total_squares - total * total / count);
  }
}

template <int Kernel, class T, class S>
void measure_convolution(const Team& team, const DepthwiseWalk<S>& w, const T* input, const S* weights,
                         const DepthwiseForwardScratch<S>& own, const DepthwiseMoments& moments) {
  int64_t begin, end;
  team.share(w.items, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    const DepthwiseItem item = w.item(i);
    for (int64_t row = item.begin; row < item.end; row += w.rows) {
      const int64_t rows = min_of(w.rows, item.end - row);
      load_window(w, item, input, row, rows, w.half, own.input);
      DepthwiseAhead ahead = ahead_of(w, item, row, w.half, i + 1, input);
      for (int64_t u = 0; u < item.units; ++u) {
        const DepthwiseTaps<Kernel, S> taps(w, weights, item.unit + u, false, own.taps.get());
        add_moments(w, taps, own.input.at(u, w.half), rows, item.unit + u, ahead, moments);
      }
    }
  }
}

// Weights and the channels' numbers of one call, in the compute type.
template <class S>
struct DepthwiseForwardConstants {
  explicit DepthwiseForwardConstants(const DepthwiseWalk<S>& w)
      : weights(w.kernel * w.kernel * w.padded), mean(w.padded), scale(w.padded), shift(w.padded) {}
  bool failed() const { return weights.failed() || mean.failed() || scale.failed() || shift.failed(); }
  const Buffer<S> weights, mean, scale, shift;
};

template <int Kernel, class T, class Params>
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
    const DepthwiseForwardScratch<S> own(w);
    if (!team.all(!own.failed(), &failed)) return;
    convolve_images<Kernel>(p, team, w, static_cast<const T*>(io.input), constants.weights.get(), constants.mean.get(),
                            constants.scale.get(), constants.shift.get(), own, static_cast<T*>(io.output));
  });
  return !failed;
}

template <int Kernel, class T, class Params>
bool run_depthwise(const Params& p, const FreluBatchNormForward& io, int threads) {
  using S = Compute<T>;
  threads = depthwise_threads(p, threads);
  const DepthwiseWalk<S> w(p, 2, threads);
  const DepthwiseForwardConstants<S> constants(w);
  const DepthwiseMoments every(w.padded);
  if (constants.failed() || every.failed()) return false;
  const T* input = static_cast<const T*>(io.input);
  unpack_weights(w, static_cast<const T*>(io.weight), constants.weights.get());
  unpack_channels(w, io.gamma, S(1), constants.scale.get());
  unpack_channels(w, io.beta, S(0), constants.shift.get());
  constants.mean.zero();
  bool failed = false;
  parallel(threads, [&](const Team& team) {
    const DepthwiseForwardScratch<S> own(w);
    const DepthwiseMoments moments(w.padded);
    if (!team.all(!own.failed() && !moments.failed(), &failed)) return;
    measure_convolution<Kernel>(team, w, input, constants.weights.get(), own, moments);
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
    convolve_images<Kernel>(p, team, w, input, constants.weights.get(), constants.mean.get(), constants.scale.get(),
                            constants.shift.get(), own, static_cast<T*>(io.output));
  });
  return !failed;
}

template <class T, class Params, class Tensors>
bool depthwise_forward(const Params& p, const Tensors& io, int threads) {
  return with_window<Compute<T>>(
      p.kernel, [&](auto window) { return run_depthwise<decltype(window)::value, T>(p, io, threads); });
}

}  // namespace cellops::CELLOPS_ISA
