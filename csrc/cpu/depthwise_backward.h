// Depthwise convolutions, backward. The convolution is computed again in blocks of rows; its gradient goes from one
// block to the input's gradient by the transposed convolution, and to the weights', while all of it is in the cache.
// Batch statistics take one reading of both tensors before that, for the two sums their gradient needs; behind them
// 3x3 windows in channels_last need no blocks (depthwise_backward_direct.h).
#pragma once
#include "depthwise_backward_direct.h"
#include "depthwise_block.h"
#include "depthwise_planes.h"

namespace cellops::CELLOPS_ISA {

template <class S>
struct DepthwiseBackwardScratch {
  // directly: images are read where they lie, and no blocks are needed; planes: so they are for the sums.
  DepthwiseBackwardScratch(const DepthwiseWalk<S>& w, bool has_direct, bool directly, bool planes)
      : input(w, directly ? 0 : w.rows + 4 * w.half),
        grad(w, directly ? 0 : w.rows + 2 * w.half),
        direct(w, has_direct && !directly ? w.rows + 2 * w.half : 0),
        convolved(w, directly ? 0 : w.rows + 2 * w.half),
        taps(w.kernel * w.kernel * w.lanes),
        border(directly ? w.channels : 0),
        sums(directly ? 2 * w.group * w.lanes : 0),
        ring(w, directly, has_direct),
        plane_border(planes ? w.width : 0) {}
  bool failed() const {
    return input.failed() || grad.failed() || direct.failed() || convolved.failed() || taps.failed() ||
           border.failed() || sums.failed() || ring.failed() || plane_border.failed();
  }
  const DepthwiseBlock<S> input;      // rows from 2 * half above the block on
  const DepthwiseBlock<S> grad;       // grad_output, the rows to be worked on; in the end the input's gradient
  const DepthwiseBlock<S> direct;     // what reaches x past the convolution, the rows from half above the block on
  const DepthwiseBlock<S> convolved;  // gradient of the convolution, the same rows
  const Buffer<S> taps;
  const DirectBorder border;
  const Buffer<S> sums;  // of a group of units
  const DirectRing ring;
  const PlaneBorder plane_border;
};

// The two sums of a unit's rows.
template <class E, int Kernel, class S>
void sum_rows(const E& ending, const DepthwiseWalk<S>& w, const DepthwiseUnit<Kernel, S>& unit, int64_t at_unit,
              const S* x, const S* grad, int64_t rows, DepthwiseAhead& given_ahead, DepthwiseAhead& given_grad_ahead,
              const DepthwiseSums& sums) {
  DepthwiseAhead ahead = given_ahead, grad_ahead = given_grad_ahead;
  const Vec<S> mean = unit.mean, scale = unit.scale, shift = unit.shift;
  Vec<S> sum = {}, product = {};
  for_windows(w, rows, false, unit.taps, x,
              [&](int64_t at, int64_t, const auto& only, Vec<S> z, Vec<S> value) CELLOPS_INLINE_LAMBDA {
                z -= mean;
                const Vec<S> through = only(ending.template through<S>(load(grad + at), value, z * scale + shift));
                sum += through;
                product += only(through * z);
                ahead.fetch();
                grad_ahead.fetch();
              });
  given_ahead = ahead, given_grad_ahead = grad_ahead;
  w.add(sum, at_unit, sums.through());
  w.add(product, at_unit, sums.products());
}

// The same of all units of some rows, read where the images lie. scratch: two numbers for each of their channels.
template <class E>
void sum_directly(const E& ending, const DepthwiseWalk<float>& w, const DirectBorder& border, const DepthwiseItem& item,
                  const float* input, const float* grad_output, const DepthwiseBackwardConstants<float>& constants,
                  float* scratch, const DepthwiseSums& sums) {
  constexpr int lanes = kLanes<float>;
  const int64_t image = item.image * w.height * w.width * w.channels, below = w.width * w.channels;
  float *through_sums = scratch, *products = scratch + item.units * lanes;
  for (int64_t i = 0; i < 2 * item.units * lanes; ++i) scratch[i] = 0;
  const float *mean = constants.mean(), *scale = constants.scale(), *shift = constants.shift();
  const bool fetches = w.bytes(sizeof(float)) > kCacheBytes;
  const auto add = [&](auto place, const Vec<float>* convolved, const Vec<float>* values) CELLOPS_INLINE_LAMBDA {
    const int64_t at = place.unit * lanes, c = place.channel;
    const Vec<float> m = load(mean + c), a = load(scale + c), b = load(shift + c);
    Vec<float> sum = load(through_sums + at), product = load(products + at);
    const float* grad = grad_output + image + place.element;
    if (fetches) fetch_below<place.count>(input + image + place.element + below, grad, below);
#pragma GCC unroll 4
    for (int r = 0; r < place.count; ++r, grad += below) {
      const Vec<float> z = convolved[r] - m;
      const Vec<float> through = ending.template through<float>(load(grad), values[r], z * a + b);
      sum += through, product += through * z;
    }
    store(through_sums + at, sum), store(products + at, product);
  };
  for_direct_windows(w, item, input, border, constants.weights.get(), add);
  for (int64_t u = 0; u < item.units; ++u) {
    const int64_t c = direct_channel(w, item.unit + u), at = u * lanes;
    for (int64_t i = direct_overlap(w, item.unit + u); i < lanes; ++i) {
      sums.through()[c + i] += double(through_sums[at + i]);
      sums.products()[c + i] += double(products[at + i]);
    }
  }
}

// The same of a block of rows of a plane, from `row` on, read where it lies.
template <class E>
void sum_plane(const E& ending, const DepthwiseWalk<float>& w, const DepthwiseUnit<3, float>& unit,
               const PlaneBorder& border, const DepthwiseItem& item, int64_t row, int64_t next, const float* input,
               const float* grad_output, const DepthwiseSums& sums) {
  const int64_t plane = plane_of(w, item);
  const Vec<float> mean = unit.mean, scale = unit.scale, shift = unit.shift;
  const float* grad = grad_output + plane;
  PlaneAhead ahead(w, item, row, next, input), grad_ahead(w, item, row, next, grad_output);
  Vec<float> sum = {}, product = {};
  for_plane_windows(w, unit.taps, input + plane, border, row, min_of(row + w.rows, item.end),
                    [&](int64_t at, const auto& only, Vec<float> z, Vec<float> value) CELLOPS_INLINE_LAMBDA {
                      z -= mean;
                      const Vec<float> given = only.get(grad + at);
                      const Vec<float> through = only(ending.template through<float>(given, value, z * scale + shift));
                      sum += through;
                      product += only(through * z);
                      ahead.fetch();
                      grad_ahead.fetch();
                    });
  w.add(sum, item.unit, sums.through());
  w.add(product, item.unit, sums.products());
}

// The two sums that batch statistics need.
template <int Kernel, class T, class S, class Params>
void sum_gradients(const Params& p, const Team& team, const DepthwiseWalk<S>& w, const T* grad_output, const T* input,
                   const DepthwiseBackwardConstants<S>& constants, const DepthwiseBackwardScratch<S>& own,
                   const DepthwiseSums& sums) {
  int64_t begin, end;
  team.share(w.items, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    const DepthwiseItem item = w.item(i);
    for (int64_t row = item.begin; row < item.end; row += w.rows) {
      const int64_t rows = min_of(w.rows, item.end - row);
      if constexpr (Kernel == 3 && sizeof(T) == sizeof(float)) {
        if (reads_directly(p)) {
          const DepthwiseItem part{item.image, item.unit, item.units, row, row + rows};
          sum_directly(Ending<Params>(p), w, own.border, part, input, grad_output, constants, own.sums.get(), sums);
          continue;
        }
        if (reads_planes(p)) {
          const DepthwiseUnit<3, S> unit(w, constants, item.unit, own.taps.get());
          sum_plane(Ending<Params>(p), w, unit, own.plane_border, item, row, i + 1, input, grad_output, sums);
          continue;
        }
      }
      load_window(w, item, input, row, rows, w.half, own.input);
      load_rows(w, item, grad_output, row, row + rows, own.grad, 0);
      DepthwiseAhead ahead = ahead_of(w, item, row, w.half, i + 1, input);
      DepthwiseAhead grad_ahead = ahead_of(w, item, row, 0, i + 1, grad_output);
      for (int64_t u = 0; u < item.units; ++u) {
        const DepthwiseUnit<Kernel, S> unit(w, constants, item.unit + u, own.taps.get());
        sum_rows(Ending<Params>(p), w, unit, item.unit + u, own.input.at(u, w.half), own.grad.at(u, 0), rows, ahead,
                 grad_ahead, sums);
      }
    }
  }
}

// Gradient of the convolution on rows [0, rows) at `x`, `grad`, and what it gives the weights; what is summed goes to
// `sums` where they are given.
template <bool Norm, class E, int Kernel, class S>
void grad_of_convolution(const E& ending, const DepthwiseWalk<S>& w, const DepthwiseUnit<Kernel, S>& given_unit,
                         int64_t at_unit, int64_t rows, const S* x, const S* grad, S* direct, S* convolved,
                         DepthwiseAhead& given_ahead, DepthwiseAhead& given_grad_ahead, const DepthwiseSums* sums) {
  if (rows <= 0) return;
  const int64_t pitch = w.pitch, step = w.step;
  const DepthwiseUnit<Kernel, S> unit = given_unit;
  DepthwiseAhead ahead = given_ahead, grad_ahead = given_grad_ahead;
  const S* corner = x - w.half * (pitch + step);
  const int64_t count = w.kernel * w.kernel;
  Vec<S> sum = {}, product = {};
  Vec<S> total[Kernel ? Kernel * Kernel : 1] = {};
  for_rows<1>(w, rows, false, [&](int64_t at, int64_t, const auto& only, auto block) CELLOPS_INLINE_LAMBDA {
    Vec<S> z = {}, value, window[Kernel ? Kernel * Kernel : 1];
    if constexpr (Kernel > 0) {
#pragma GCC unroll 9
      for (int t = 0; t < Kernel * Kernel; ++t) {
        window[t] = load(corner + at + t / Kernel * pitch + t % Kernel * block.step);
        z += window[t] * unit.taps.at(t);
      }
      value = window[Kernel * Kernel / 2];
    } else {
      convolve<Kernel>(w.kernel, pitch, unit.taps, corner + at, block, &z, &value);
    }
    z -= unit.mean;
    const Vec<S> given = load(grad + at), other = z * unit.scale + unit.shift;
    const Vec<S> through = ending.template through<S>(given, value, other);
    if constexpr (E::kDirect) store(direct + at, ending.template through<S>(given, other, value));
    Vec<S> result = through * unit.scale;
    if constexpr (Norm) {
      result += z * unit.by_value + unit.by_one;
    } else {
      sum += only(through);
      product += only(through * z);
    }
    store(convolved + at, result);
    if constexpr (Kernel > 0) {
#pragma GCC unroll 9
      for (int t = 0; t < Kernel * Kernel; ++t) total[t] += only(result * window[t]);
    }
    ahead.fetch();
    grad_ahead.fetch();
  });
  given_ahead = ahead, given_grad_ahead = grad_ahead;
  for (int64_t r = 0; r < rows; ++r) {  // nothing may flow in from between the rows
    for (int64_t i = w.width * step; i < w.pitch; ++i) convolved[r * pitch + i] = 0;
  }
  if (!sums) return;
  if constexpr (!Norm) {
    w.add(sum, at_unit, sums->through());
    w.add(product, at_unit, sums->products());
  }
  for (int64_t t = 0; t < count; ++t) {
    if constexpr (Kernel == 0) {
      const S* neighbour = corner + t / w.kernel * pitch + t % w.kernel * step;
      total[0] = Vec<S>{};
      for_rows<1>(w, rows, false, [&](int64_t at, int64_t, const auto& only, auto) CELLOPS_INLINE_LAMBDA {
        total[0] += only(load(convolved + at) * load(neighbour + at));
      });
    }
    w.add(total[Kernel ? t : 0], at_unit, sums->weight(t));
  }
}

// What the transposed convolution gives back, and what reaches x past it.
template <bool Direct, int Kernel, class S>
void grad_of_input(const DepthwiseWalk<S>& w, const DepthwiseTaps<Kernel, S>& flipped, const S* convolved,
                   const S* direct, int64_t rows, S* result) {
  for_windows(w, rows, w.flat, flipped, convolved,
              [&](int64_t at, int64_t to, const auto& only, Vec<S> sum, Vec<S>) CELLOPS_INLINE_LAMBDA {
                if constexpr (Direct) sum += load(direct + at);
                only.put(result + to, sum);
              });
}

template <int Kernel, bool Norm, class T, class S, class Params>
void differentiate(const Params& p, const Team& team, const DepthwiseWalk<S>& w, const T* grad_output, const T* input,
                   T* grad_input, const DepthwiseBackwardConstants<S>& constants,
                   const DepthwiseBackwardScratch<S>& own, const DepthwiseSums* sums) {
  if constexpr (Kernel == 3 && Norm && sizeof(T) == sizeof(float)) {
    if (reads_directly(p)) {
      return differentiate_directly(Ending<Params>(p), team, w, grad_output, input, grad_input, constants, own.border,
                                    own.ring, *sums);
    }
  }
  constexpr bool kDirect = Ending<Params>::kDirect;
  const int64_t half = w.half;
  const auto direct_at = [&](int64_t u, int64_t row) { return kDirect ? own.direct.at(u, row) : nullptr; };
  const bool streamed = grad_input && w.streams(grad_input);
  int64_t begin, end;
  team.share(w.items, &begin, &end);
  for (int64_t i = end - 1; i >= begin; --i) {  // what the sums have read last may still be in a cache
    const DepthwiseItem item = w.item(i);
    for (int64_t row = item.begin; row < item.end; row += w.rows) {
      const int64_t rows = min_of(w.rows, item.end - row), kept = row == item.begin ? 0 : 2 * half;
      load_window(w, item, input, row, rows, 2 * half, own.input);
      if (kept) {
        if (kDirect) own.direct.keep(item.units, w.rows, kept);
        own.convolved.keep(item.units, w.rows, kept);
      }
      // The gradient of the convolution is wanted half a window beyond the block; what lies outside the image is zero,
      // what belongs to another item is not summed here.
      const int64_t first = row - half + kept, last = row + rows + half;
      load_rows(w, item, grad_output, first, last, own.grad, 0);
      DepthwiseAhead ahead = ahead_of(w, item, row, 2 * half, i - 1, input);
      DepthwiseAhead grad_ahead = ahead_of(w, item, row, half, i - 1, grad_output);
      const int64_t top = max_of(first, 0), bottom = min_of(last, w.height);
      const int64_t own_top = min_of(max_of(top, item.begin), bottom),
                    own_bottom = max_of(own_top, min_of(bottom, item.end));
      for (int64_t u = 0; u < item.units; ++u) {
        const DepthwiseUnit<Kernel, S> unit(w, constants, item.unit + u, own.taps.get());
        const auto work = [&](int64_t from, int64_t to, const DepthwiseSums* into) {
          grad_of_convolution<Norm>(Ending<Params>(p), w, unit, item.unit + u, to - from,
                                    own.input.at(u, from - row + 2 * half), own.grad.at(u, from - first),
                                    direct_at(u, from - row + half), own.convolved.at(u, from - row + half), ahead,
                                    grad_ahead, into);
        };
        work(top, own_top, nullptr);
        work(own_top, own_bottom, sums);
        work(own_bottom, bottom, nullptr);
        for (int64_t r = first; r < last; ++r) {
          if (r >= 0 && r < w.height) continue;
          __builtin_memset(own.convolved.at(u, r - row + half), 0, size_t(w.pitch) * sizeof(S));
        }
        if (!grad_input) continue;
        const DepthwiseTaps<Kernel, S> flipped(w, constants.weights.get(), item.unit + u, true, own.taps.get());
        grad_of_input<kDirect>(w, flipped, own.convolved.at(u, half), direct_at(u, half), rows, own.grad.at(u, 0));
      }
      if (grad_input) store_rows(w, item, own.grad, row, row + rows, grad_input, streamed);
    }
  }
  if (streamed) end_streams();
}

template <class T, class S>
void write_weights(const DepthwiseWalk<S>& w, const DepthwiseSums& sums, void* grad_weight) {
  if (!grad_weight) return;
  const int64_t count = w.kernel * w.kernel;
  for (int64_t c = 0; c < w.channels; ++c) {
    for (int64_t t = 0; t < count; ++t) {
      from_compute(static_cast<T*>(grad_weight) + c * count + t, S(sums.weight(t)[c]));
    }
  }
}

template <class S>
void write_channels(const DepthwiseWalk<S>& w, const double* values, void* to) {
  if (!to) return;
  for (int64_t c = 0; c < w.channels; ++c) static_cast<S*>(to)[c] = S(values[c]);
}

template <int Kernel, class T, class Params>
bool run_depthwise(const Params& p, const FreluBackward& io, int threads) {
  using S = Compute<T>;
  threads = depthwise_threads(p, threads);
  const DepthwiseWalk<S> w(p, Ending<Params>::kDirect ? 4 : 3, threads);
  const DepthwiseBackwardConstants<S> constants(w);
  const DepthwiseSums every(p.kernel * p.kernel, w.padded);
  if (constants.failed() || every.failed()) return false;
  unpack_weights(w, static_cast<const T*>(io.weight), constants.weights.get());
  unpack_channels(w, io.scale, S(1), constants.scale());
  unpack_channels(w, io.shift, S(0), constants.shift());
  const bool wants_sums = io.grad_weight || io.grad_scale || io.grad_shift;
  bool failed = false;
  parallel(threads, [&](const Team& team) {
    const DepthwiseBackwardScratch<S> own(w, Ending<Params>::kDirect, false, false);
    const DepthwiseSums sums(p.kernel * p.kernel, w.padded);
    if (!team.all(!own.failed() && !sums.failed(), &failed)) return;
    differentiate<Kernel, false>(p, team, w, static_cast<const T*>(io.grad_output), static_cast<const T*>(io.input),
                                 static_cast<T*>(io.grad_input), constants, own, wants_sums ? &sums : nullptr);
    team.in_order([&] { every.add(sums); });
  });
  if (failed) return false;
  write_weights<T>(w, every, io.grad_weight);
  write_channels(w, every.products(), io.grad_scale);
  write_channels(w, every.through(), io.grad_shift);
  return true;
}

template <int Kernel, class T, class Params>
bool run_depthwise(const Params& p, const FreluBatchNormBackward& io, int threads) {
  using S = Compute<T>;
  threads = depthwise_threads(p, threads);
  const DepthwiseWalk<S> w(p, Ending<Params>::kDirect ? 4 : 3, threads);
  const DepthwiseBackwardConstants<S> constants(w);
  const DepthwiseSums every(p.kernel * p.kernel, w.padded);
  if (constants.failed() || every.failed()) return false;
  unpack_weights(w, static_cast<const T*>(io.weight), constants.weights.get());
  unpack_channels(w, io.gamma, S(1), constants.scale());
  unpack_channels(w, io.beta, S(0), constants.shift());
  unpack_channels(w, io.mean, S(0), constants.mean());
  const S* var = static_cast<const S*>(io.var);
  const auto deviation = [&](int64_t c) { return 1 / __builtin_sqrt(double(var[c]) + p.eps); };
  for (int64_t c = 0; c < w.channels; ++c) constants.scale()[c] *= S(deviation(c));
  const T *grad_output = static_cast<const T*>(io.grad_output), *input = static_cast<const T*>(io.input);
  bool failed = false;
  parallel(threads, [&](const Team& team) {
    const DepthwiseBackwardScratch<S> own(w, Ending<Params>::kDirect, reads_directly(p), reads_planes(p));
    const DepthwiseSums sums(p.kernel * p.kernel, w.padded);
    if (!team.all(!own.failed() && !sums.failed(), &failed)) return;
    sum_gradients<Kernel>(p, team, w, grad_output, input, constants, own, sums);
    team.in_order([&] { every.add(sums); });
    if (team.index == 0) {
      const double count = double(p.batch * p.height * p.width);
      for (int64_t c = 0; c < w.channels; ++c) {
        const double scale = constants.scale()[c], by = deviation(c);
        constants.by_one()[c] = S(-scale * every.through()[c] / count);
        constants.by_value()[c] = S(-scale * by * by * every.products()[c] / count);
        every.products()[c] *= by;
      }
    }
    team.barrier();
    if (!io.grad_input && !io.grad_weight) return;
    sums.zero();
    differentiate<Kernel, true>(p, team, w, grad_output, input, static_cast<T*>(io.grad_input), constants, own, &sums);
    team.in_order([&] { every.add(sums); });
  });
  if (failed) return false;
  write_weights<T>(w, every, io.grad_weight);
  write_channels(w, every.products(), io.grad_gamma);
  write_channels(w, every.through(), io.grad_beta);
  return true;
}

template <class T, class Params, class Tensors>
bool depthwise_backward(const Params& p, const Tensors& io, int threads) {
  return with_window<Compute<T>>(
      p.kernel, [&](auto window) { return run_depthwise<decltype(window)::value, T>(p, io, threads); });
}

}  // namespace cellops::CELLOPS_ISA
