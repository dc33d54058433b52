// The passes of spatial attention over all channels of a run of pixels. They see an image as [channels][pixels] or
// [pixels][channels], and maps as one number for each pixel of the run; what lies between the passes, the convolution
// of the maps, knows rows and columns and stands in spatial_attention.cpp.
#pragma once
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/stream.h"

namespace cellops::CELLOPS_ISA {

// A run of `count` pixels of an image from `first` on.
struct Run {
  int64_t first, count, channels, pixels;
  bool channels_last;
  bool streamed;  // what is written passes the caches by
  // Elements from here to what the first pass reads next. In NCHW the last pass, which only writes to memory, fetches
  // it: a run is a strided piece of each channel, which the hardware does not foresee (12 % on an AMD EPYC).
  int64_t ahead = 0;
  int64_t pixel_step() const { return channels_last ? channels : 1; }
  template <class T>
  T* at(T* image) const {
    return image + first * pixel_step();
  }
};

CELLOPS_INLINE void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Maps of a run: map i begins at data + i * stride. Every map has room for a whole vector past its last pixel.
template <class S>
struct Maps {
  S* data;
  int64_t stride;
  S* operator[](int64_t i) const { return data + i * stride; }
};

// body.vectors(p) for whole vectors, body.scalar(p) for the pixels that are left.
template <class S, class Vector, class Scalar>
CELLOPS_INLINE void each_pixel(int64_t count, const Vector& vector, const Scalar& scalar) {
  int64_t p = 0;
  for (; p + kLanes<S> <= count; p += kLanes<S>) vector(p);
  for (; p < count; ++p) scalar(p);
}

// body(c, constant) with the constant `Block` for whole blocks of channels, then with 1.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int Block, class Body>
CELLOPS_INLINE void in_blocks(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + Block <= count; i += Block) body(i, Constant<Block>{});
  for (; i < count; ++i) body(i, Constant<1>{});
}

// First pass: numbers of each pixel drawn from its channels. Where `grad` is given, `dot` becomes sum_c grad * input.

// responses[t] = sum_c weight[t][c] * input; weight is [taps][channels].
template <bool Backward, class T, class S>
void respond(const Run& run, const T* input, const T* grad, const S* weight, int64_t taps, const Maps<S>& responses,
             S* dot) {
  constexpr int lanes = kLanes<S>;
  const int64_t channels = run.channels, pixels = run.pixels;
  if (!run.channels_last) {
    for (int64_t t = 0; t < taps; ++t) __builtin_memset(responses[t], 0, run.count * sizeof(S));
    if constexpr (Backward) __builtin_memset(dot, 0, run.count * sizeof(S));
    in_blocks<4>(channels, [&](int64_t c, auto block) {
      constexpr int B = decltype(block)::value;
      const T *x = run.at(input) + c * pixels, *g = Backward ? run.at(grad) + c * pixels : nullptr;
      const auto vector = [&](int64_t p) {
        Vec<S> value[B];
        for (int b = 0; b < B; ++b) value[b] = load(x + b * pixels + p);
        if constexpr (Backward) {
          Vec<S> sum = load(dot + p);
          for (int b = 0; b < B; ++b) sum += value[b] * load(g + b * pixels + p);
          store(dot + p, sum);
        }
        for (int64_t t = 0; t < taps; ++t) {
          Vec<S> sum = load(responses[t] + p);
          for (int b = 0; b < B; ++b) sum += broadcast(weight[t * channels + c + b]) * value[b];
          store(responses[t] + p, sum);
        }
      };
      const auto scalar = [&](int64_t p) {
        for (int b = 0; b < B; ++b) {
          const S value = to_compute(x[b * pixels + p]);
          if constexpr (Backward) dot[p] += value * to_compute(g[b * pixels + p]);
          for (int64_t t = 0; t < taps; ++t) responses[t][p] += weight[t * channels + c + b] * value;
        }
      };
      each_pixel<S>(run.count, vector, scalar);
    });
    return;
  }
  const int64_t whole = channels / lanes * lanes;
  in_blocks<4>(run.count, [&](int64_t p, auto block) {
    constexpr int P = decltype(block)::value;  // pixels at a time
    const T *x = run.at(input) + p * channels, *g = Backward ? run.at(grad) + p * channels : nullptr;
    for (int64_t t = 0; t < taps; ++t) {
      const S* row = weight + t * channels;
      const bool last = Backward && t == taps - 1;
      Vec<S> sum[4] = {}, product[4] = {};
      for (int i = 0; i < P; ++i) {  // in the order of memory, which the hardware foresees
        for (int64_t c = 0; c < whole; c += lanes) {
          const Vec<S> value = load(x + i * channels + c);
          sum[i] += load(row + c) * value;
          if constexpr (Backward) {
            if (last) product[i] += value * load(g + i * channels + c);
          }
        }
      }
      S totals[4], products[4];
      sums_of(sum[0], sum[1], sum[2], sum[3], totals);
      if (last) sums_of(product[0], product[1], product[2], product[3], products);
      for (int64_t c = whole; c < channels; ++c) {
        for (int i = 0; i < P; ++i) {
          const S value = to_compute(x[i * channels + c]);
          totals[i] += row[c] * value;
          if constexpr (Backward) {
            if (last) products[i] += value * to_compute(g[i * channels + c]);
          }
        }
      }
      for (int i = 0; i < P; ++i) responses[t][p + i] = totals[i];
      if (last) {
        for (int i = 0; i < P; ++i) dot[p + i] = products[i];
      }
    }
  });
}

// One more value for a maximum and, in backward, the number of values that reach it. A NaN may be passed over: it
// comes to the logit through the mean.
template <bool Backward, class V>
CELLOPS_INLINE void rise(V value, V* top, V* ties) {
  if constexpr (Backward) *ties = value > *top ? V{} + 1 : value == *top ? *ties + 1 : *ties;
  *top = value > *top ? value : *top;
}

// maxima, means and, in backward, ties: the number of channels that reach the maximum.
template <bool Backward, class T, class S>
void pool_channels(const Run& run, const T* input, const T* grad, S* maxima, S* means, S* ties, S* dot) {
  constexpr int lanes = kLanes<S>;
  const int64_t channels = run.channels, pixels = run.pixels;
  const S lowest = -S(__builtin_huge_valf());
  if (!run.channels_last) {
    for (int64_t p = 0; p < run.count; ++p) {
      maxima[p] = lowest, means[p] = 0;
      if constexpr (Backward) ties[p] = 0, dot[p] = 0;
    }
    in_blocks<4>(channels, [&](int64_t c, auto block) {
      constexpr int B = decltype(block)::value;
      const T *x = run.at(input) + c * pixels, *g = Backward ? run.at(grad) + c * pixels : nullptr;
      const auto vector = [&](int64_t p) {
        Vec<S> top = load(maxima + p), sum = load(means + p), count = {}, product = {};
        if constexpr (Backward) count = load(ties + p), product = load(dot + p);
        for (int b = 0; b < B; ++b) {
          const Vec<S> value = load(x + b * pixels + p);
          rise<Backward>(value, &top, &count);
          sum += value;
          if constexpr (Backward) product += value * load(g + b * pixels + p);
        }
        store(maxima + p, top), store(means + p, sum);
        if constexpr (Backward) store(ties + p, count), store(dot + p, product);
      };
      const auto scalar = [&](int64_t p) {
        for (int b = 0; b < B; ++b) {
          const S value = to_compute(x[b * pixels + p]);
          rise<Backward>(value, maxima + p, ties + p);
          means[p] += value;
          if constexpr (Backward) dot[p] += value * to_compute(g[b * pixels + p]);
        }
      };
      each_pixel<S>(run.count, vector, scalar);
    });
  } else {
    const int64_t whole = channels / lanes * lanes;
    in_blocks<4>(run.count, [&](int64_t p, auto block) {
      constexpr int P = decltype(block)::value;
      const T *x = run.at(input) + p * channels, *g = Backward ? run.at(grad) + p * channels : nullptr;
      Vec<S> top[4], sum[4] = {}, count[4] = {}, product[4] = {};
      for (int i = 0; i < 4; ++i) top[i] = broadcast(lowest);
      for (int i = 0; i < P; ++i) {
        for (int64_t c = 0; c < whole; c += lanes) {
          const Vec<S> value = load(x + i * channels + c);
          rise<Backward>(value, &top[i], &count[i]);
          sum[i] += value;
          if constexpr (Backward) product[i] += value * load(g + i * channels + c);
        }
      }
      S tops[4], totals[4], counts[4] = {}, products[4];
      maxima_of(top[0], top[1], top[2], top[3], tops);
      sums_of(sum[0], sum[1], sum[2], sum[3], totals);
      if constexpr (Backward) {
        for (int i = 0; i < 4; ++i) count[i] = top[i] == broadcast(tops[i]) ? count[i] : Vec<S>{};
        sums_of(count[0], count[1], count[2], count[3], counts);
        sums_of(product[0], product[1], product[2], product[3], products);
      }
      for (int i = 0; i < P; ++i) {
        for (int64_t c = whole; c < channels; ++c) {
          const S value = to_compute(x[i * channels + c]);
          rise<Backward>(value, &tops[i], &counts[i]);
          totals[i] += value;
          if constexpr (Backward) products[i] += value * to_compute(g[i * channels + c]);
        }
        maxima[p + i] = tops[i], means[p + i] = totals[i];
        if constexpr (Backward) ties[p + i] = counts[i], dot[p + i] = products[i];
      }
    });
  }
  for (int64_t p = 0; p < run.count; ++p) means[p] /= S(channels);
}

// Second pass: what each element becomes.

// output = input * scale.
template <class T, class S>
void scale_run(const Run& run, const T* input, const S* scale, T* output) {
  const T* x = run.at(input);
  T* y = run.at(output);
  if (run.channels_last) {
    for (int64_t p = 0; p < run.count; ++p, x += run.channels, y += run.channels) {
      const S factor = scale[p];
      const auto vector = [&](int64_t c, bool streamed) { put(y + c, load(x + c) * factor, streamed); };
      const auto scalar = [&](int64_t c) { from_compute(y + c, to_compute(x[c]) * factor); };
      each_written<T>(run.channels, run.streamed, vector, scalar);
    }
    return;
  }
  in_blocks<2>(run.channels, [&](int64_t c, auto block) {
    const T* from = x + c * run.pixels;
    T* to = y + c * run.pixels;
    const auto vector = [&](int64_t p, bool streamed) {
      const Vec<S> factor = load(scale + p);
      for (int64_t b = 0; b < block.value; ++b) {
        fetch(from + b * run.pixels + p + run.ahead);
        put(to + b * run.pixels + p, load(from + b * run.pixels + p) * factor, streamed);
      }
    };
    const auto scalar = [&](int64_t p) {
      for (int64_t b = 0; b < block.value; ++b) {
        from_compute(to + b * run.pixels + p, to_compute(from[b * run.pixels + p]) * scale[p]);
      }
    };
    each_written<T>(run.count, run.streamed, vector, scalar);
  });
}

// grad_input = grad * scale + sum_t weight[t][c] * shifted[t].
template <class T, class S>
void grad_through_taps(const Run& run, const T* grad, const S* scale, const S* weight, int64_t taps,
                       const Maps<S>& shifted, T* grad_input) {
  const int64_t channels = run.channels, pixels = run.pixels;
  const T* g = run.at(grad);
  T* to = run.at(grad_input);
  if (run.channels_last) {
    for (int64_t p = 0; p < run.count; ++p, g += channels, to += channels) {
      const auto vector = [&](int64_t c, bool streamed) {
        Vec<S> sum = load(g + c) * scale[p];
        for (int64_t t = 0; t < taps; ++t) sum += load(weight + t * channels + c) * shifted[t][p];
        put(to + c, sum, streamed);
      };
      const auto scalar = [&](int64_t c) {
        S sum = to_compute(g[c]) * scale[p];
        for (int64_t t = 0; t < taps; ++t) sum += weight[t * channels + c] * shifted[t][p];
        from_compute(to + c, sum);
      };
      each_written<T>(channels, run.streamed, vector, scalar);
    }
    return;
  }
  in_blocks<4>(channels, [&](int64_t c, auto block) {
    constexpr int B = decltype(block)::value;
    const T* from = g + c * pixels;
    T* first = to + c * pixels;
    const auto vector = [&](int64_t p, bool streamed) {
      const Vec<S> factor = load(scale + p);
      Vec<S> sum[B];
      for (int b = 0; b < B; ++b) {
        fetch(from + b * pixels + p + run.ahead);
        sum[b] = load(from + b * pixels + p) * factor;
      }
      for (int64_t t = 0; t < taps; ++t) {
        const Vec<S> value = load(shifted[t] + p);
        for (int b = 0; b < B; ++b) sum[b] += value * weight[t * channels + c + b];
      }
      for (int b = 0; b < B; ++b) put(first + b * pixels + p, sum[b], streamed);
    };
    const auto scalar = [&](int64_t p) {
      for (int b = 0; b < B; ++b) {
        S sum = to_compute(from[b * pixels + p]) * scale[p];
        for (int64_t t = 0; t < taps; ++t) sum += weight[t * channels + c + b] * shifted[t][p];
        from_compute(first + b * pixels + p, sum);
      }
    };
    each_written<T>(run.count, run.streamed, vector, scalar);
  });
}

// grad_input = grad * scale + through_mean + (where input is the maximum: through_max).
template <class T, class S>
void grad_through_pool(const Run& run, const T* grad, const T* input, const S* scale, const S* maxima,
                       const S* through_max, const S* through_mean, T* grad_input) {
  const T *g = run.at(grad), *x = run.at(input);
  T* to = run.at(grad_input);
  if (run.channels_last) {
    for (int64_t p = 0; p < run.count; ++p, g += run.channels, x += run.channels, to += run.channels) {
      const S factor = scale[p], top = maxima[p], at_top = through_max[p], mean = through_mean[p];
      const auto vector = [&](int64_t c, bool streamed) {
        const Vec<S> more = load(x + c) == broadcast(top) ? broadcast(at_top) : Vec<S>{};
        put(to + c, load(g + c) * factor + mean + more, streamed);
      };
      const auto scalar = [&](int64_t c) {
        const S more = to_compute(x[c]) == top ? at_top : S(0);
        from_compute(to + c, to_compute(g[c]) * factor + mean + more);
      };
      each_written<T>(run.channels, run.streamed, vector, scalar);
    }
    return;
  }
  for (int64_t c = 0; c < run.channels; ++c, g += run.pixels, x += run.pixels, to += run.pixels) {
    const auto vector = [&](int64_t p, bool streamed) {
      fetch(x + p + run.ahead), fetch(g + p + run.ahead);
      const Vec<S> more = load(x + p) == load(maxima + p) ? load(through_max + p) : Vec<S>{};
      put(to + p, load(g + p) * load(scale + p) + load(through_mean + p) + more, streamed);
    };
    const auto scalar = [&](int64_t p) {
      const S more = to_compute(x[p]) == maxima[p] ? through_max[p] : S(0);
      from_compute(to + p, to_compute(g[p]) * scale[p] + through_mean[p] + more);
    };
    each_written<T>(run.count, run.streamed, vector, scalar);
  }
}

// sums[t][c] += sum over the run of input * shifted[t].
template <class T, class S>
void correlate(const Run& run, const T* input, int64_t taps, const Maps<S>& shifted, S* sums) {
  constexpr int lanes = kLanes<S>;
  const int64_t channels = run.channels, pixels = run.pixels;
  const T* x = run.at(input);
  if (!run.channels_last) {
    in_blocks<4>(channels, [&](int64_t c, auto block) {
      constexpr int B = decltype(block)::value;
      for (int64_t t = 0; t < taps; ++t) {
        Vec<S> sum[4] = {};
        S rest[4] = {};
        const auto vector = [&](int64_t p) {
          const Vec<S> value = load(shifted[t] + p);
          for (int b = 0; b < B; ++b) {
            if (t == 0) fetch(x + (c + b) * pixels + p + run.ahead);
            sum[b] += load(x + (c + b) * pixels + p) * value;
          }
        };
        const auto scalar = [&](int64_t p) {
          for (int b = 0; b < B; ++b) rest[b] += to_compute(x[(c + b) * pixels + p]) * shifted[t][p];
        };
        each_pixel<S>(run.count, vector, scalar);
        S totals[4];
        sums_of(sum[0], sum[1], sum[2], sum[3], totals);
        for (int b = 0; b < B; ++b) sums[t * channels + c + b] += totals[b] + rest[b];
      }
    });
    return;
  }
  in_blocks<8>(channels / lanes, [&](int64_t v, auto block) {
    constexpr int B = decltype(block)::value;
    const int64_t c = v * lanes;
    for (int64_t t = 0; t < taps; ++t) {
      Vec<S> sum[B];
      for (int b = 0; b < B; ++b) sum[b] = Vec<S>{};
      for (int64_t p = 0; p < run.count; ++p) {
        const Vec<S> value = broadcast(shifted[t][p]);
        for (int b = 0; b < B; ++b) {
          sum[b] += load(x + p * channels + c + b * lanes) * value;
        }
      }
      for (int b = 0; b < B; ++b) {
        S* to = sums + t * channels + c + b * lanes;
        store(to, load(to) + sum[b]);
      }
    }
  });
  for (int64_t c = channels / lanes * lanes; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      S sum = 0;
      for (int64_t p = 0; p < run.count; ++p) sum += to_compute(x[p * channels + c]) * shifted[t][p];
      sums[t * channels + c] += sum;
    }
  }
}

}  // namespace cellops::CELLOPS_ISA
