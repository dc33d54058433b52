// What squeeze-excitation and ECA share: output[n, c, p] = input[n, c, p] * scale[n, c], where the scales of an image
// follow from its channel means. Forward reads an image twice and writes it once; backward reads input and gradient,
// then the gradient again: the second reading finds the image still in the cache.
//
// An op hands in its rule, one object per thread:
//   void forward(const S* mean, S* scale)                        scales of one image, from its means
//   void backward(const S* mean, const S* grad_scale, S* scale, S* grad_mean, bool add)
//                                                                the same and its derivatives; where `add` is set it
//                                                                adds the parameters' gradients to the thread's sums
#pragma once
#include "../cellops.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/stream.h"

namespace cellops::CELLOPS_ISA {

// Threads that are worth waking: one for every 2^14 elements.
inline int team_size(int64_t elements, int threads) {
  const int64_t most = elements / 16384;
  return most < 1 ? 1 : int(min_of(most, threads));
}

// Images of a batch to the members of a team: whole images each, as long as there are enough; the rest, and single
// images, are worked on together, split by channels.
template <class Body>
inline void for_images(const Team& team, int64_t images, const Body& body) {
  const int64_t alone = images / team.size;
  for (int64_t i = team.index * alone; i < (team.index + 1) * alone; ++i) body(i, Team{0, 1});
  for (int64_t i = team.size * alone; i < images; ++i) body(i, team);
}

// A sum over pixels is taken from sums of so many terms, which are added up in double: in one long sum of float every
// term would be rounded to the digits of the whole.
inline constexpr int64_t kTerms = 512;

template <class S, int Vectors>
CELLOPS_INLINE void add_terms(const Vec<S> (&terms)[Vectors], double* totals) {
  S values[Vectors * kLanes<S>];
  __builtin_memcpy(values, terms, sizeof(values));
  for (int i = 0; i < Vectors * kLanes<S>; ++i) totals[i] += double(values[i]);
}

// Sums over the pixels of `Vectors` vectors of channels from c on, kept in registers; see sum_pixels.
template <bool Product, int Vectors, class T, class S>
inline void sum_rows(const T* a, const T* b, int64_t channels, int64_t pixels, int64_t c, S* sums, S* products) {
  constexpr int lanes = kLanes<S>;
  double total[Vectors * lanes] = {}, total_product[Vectors * lanes] = {};
  for (int64_t first = 0; first < pixels; first += kTerms) {
    Vec<S> sum[Vectors] = {}, product[Vectors] = {};
    for (int64_t p = first; p < min_of(first + kTerms, pixels); ++p) {
      const int64_t at = p * channels + c;
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vec<S> value = load(a + at + v * lanes);
        sum[v] += value;
        if constexpr (Product) product[v] += value * load(b + at + v * lanes);
      }
    }
    add_terms<S>(sum, total);
    if constexpr (Product) add_terms<S>(product, total_product);
  }
  for (int i = 0; i < Vectors * lanes; ++i) {
    sums[c + i] = S(total[i]);
    if constexpr (Product) products[c + i] = S(total_product[i]);
  }
}

// Per channel in [begin, end): the sum of a over the pixels and, where b is given, of a * b.
template <bool Product, class T, class S>
inline void sum_pixels(const T* a, const T* b, int64_t channels, int64_t pixels, bool channels_last, int64_t begin,
                       int64_t end, S* sums, S* products) {
  constexpr int lanes = kLanes<S>;
  if (!channels_last) {
    for (int64_t c = begin; c < end; ++c) {
      const T *x = a + c * pixels, *y = Product ? b + c * pixels : nullptr;
      double total = 0, total_product = 0;
      int64_t p = 0;
      for (int64_t whole = pixels / (2 * lanes); whole > 0; whole -= kTerms) {
        Vec<S> sum[2] = {}, product[2] = {};
        for (const int64_t stop = p + min_of(whole, kTerms) * 2 * lanes; p < stop; p += 2 * lanes) {
          for (int k = 0; k < 2; ++k) {
            const Vec<S> value = load(x + p + k * lanes);
            sum[k] += value;
            if constexpr (Product) product[k] += value * load(y + p + k * lanes);
          }
        }
        total += sum_of<S>(sum[0] + sum[1]);
        if constexpr (Product) total_product += sum_of<S>(product[0] + product[1]);
      }
      for (; p < pixels; ++p) {
        const S value = to_compute(x[p]);
        total += value;
        if constexpr (Product) total_product += value * to_compute(y[p]);
      }
      sums[c] = S(total);
      if constexpr (Product) products[c] = S(total_product);
    }
    return;
  }
  int64_t c = begin;
  for (; c + 8 * lanes <= end; c += 8 * lanes) sum_rows<Product, 8>(a, b, channels, pixels, c, sums, products);
  for (; c + lanes <= end; c += lanes) sum_rows<Product, 1>(a, b, channels, pixels, c, sums, products);
  for (; c < end; ++c) {
    double sum = 0, product = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      const S value = to_compute(a[p * channels + c]);
      sum += value;
      if constexpr (Product) product += value * to_compute(b[p * channels + c]);
    }
    sums[c] = S(sum);
    if constexpr (Product) products[c] = S(product);
  }
}

// output = input * scale + shift for channels [begin, end); shift may be null.
template <bool Shift, class T, class S>
inline void scale_pixels(const T* input, const S* scale, const S* shift, int64_t channels, int64_t pixels,
                         bool channels_last, int64_t begin, int64_t end, T* output, bool streamed) {
  if (!channels_last) {
    for (int64_t c = begin; c < end; ++c) {
      const T* x = input + c * pixels;
      T* y = output + c * pixels;
      const S factor = scale[c], summand = Shift ? shift[c] : S(0);
      const auto vector = [&](int64_t p, bool stream) {
        const Vec<S> value = load(x + p) * factor;
        put(y + p, Shift ? value + summand : value, stream);
      };
      const auto scalar = [&](int64_t p) {
        const S value = to_compute(x[p]) * factor;
        from_compute(y + p, Shift ? value + summand : value);
      };
      each_written<T>(pixels, streamed, vector, scalar);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    const T* x = input + p * channels;
    T* y = output + p * channels;
    const auto vector = [&](int64_t i, bool stream) {
      const int64_t c = begin + i;
      const Vec<S> value = load(x + c) * load(scale + c);
      put(y + c, Shift ? value + load(shift + c) : value, stream);
    };
    const auto scalar = [&](int64_t i) {
      const S value = to_compute(x[begin + i]) * scale[begin + i];
      from_compute(y + begin + i, Shift ? value + shift[begin + i] : value);
    };
    each_written<T>(end - begin, streamed, vector, scalar);
  }
}

// Whether to stream the output of a call on `tensors` tensors of its size.
template <class T, class Params>
inline bool attention_streams(const Params& p, const T* output, int64_t tensors) {
  const int64_t bytes = tensors * p.batch * p.channels * p.pixels * int64_t(sizeof(T));
  return streams(output, p.channels_last ? p.channels : p.pixels, bytes);
}

// A member's share of the channels, in whole vectors and lines of the cache.
inline void share_channels(const Team& team, int64_t channels, int64_t* begin, int64_t* end) {
  constexpr int64_t step = 32;
  team.share(div_up(channels, step), begin, end);
  *begin *= step, *end = min_of(*end * step, channels);
}

template <class T, class Params, class Rule>
inline void attend_forward(const Team& team, const Params& p, const T* input, T* output, Compute<T>* means,
                           Compute<T>* scale, const Rule& rule) {
  using S = Compute<T>;
  const int64_t size = p.channels * p.pixels;
  const bool streamed = attention_streams(p, output, 2);
  for_images(team, p.batch, [&](int64_t image, const Team& members) {
    int64_t begin, end;
    share_channels(members, p.channels, &begin, &end);
    S* mean = means + image * p.channels;
    sum_pixels<false>(input + image * size, static_cast<const T*>(nullptr), p.channels, p.pixels, p.channels_last,
                      begin, end, mean, mean);
    for (int64_t c = begin; c < end; ++c) mean[c] /= S(p.pixels);
    members.barrier();
    rule.forward(mean, scale);
    scale_pixels<false>(input + image * size, scale, scale, p.channels, p.pixels, p.channels_last, begin, end,
                        output + image * size, streamed);
  });
  end_streams();
}

// Scratch of a thread in backward: sums and their gradients.
template <class S>
struct AttendScratch {
  explicit AttendScratch(int64_t channels) : scale(channels), grad_mean(channels) {}
  bool failed() const { return scale.failed() || grad_mean.failed(); }
  const Buffer<S> scale, grad_mean;
};

// means and grad_scales: [N, C], shared. The member that has an image's parameter sums is its team's first.
template <class T, class Params, class Rule>
inline void attend_backward(const Team& team, const Params& p, const T* grad_output, const T* input, T* grad_input,
                            Compute<T>* means, Compute<T>* grad_scales, const AttendScratch<Compute<T>>& own,
                            const Rule& rule) {
  using S = Compute<T>;
  const int64_t size = p.channels * p.pixels;
  const bool streamed = attention_streams(p, grad_input, 3);
  for_images(team, p.batch, [&](int64_t image, const Team& members) {
    int64_t begin, end;
    share_channels(members, p.channels, &begin, &end);
    S *mean = means + image * p.channels, *grad_scale = grad_scales + image * p.channels;
    const T *x = input + image * size, *grad = grad_output + image * size;
    sum_pixels<true>(x, grad, p.channels, p.pixels, p.channels_last, begin, end, mean, grad_scale);
    for (int64_t c = begin; c < end; ++c) mean[c] /= S(p.pixels);
    members.barrier();
    rule.backward(mean, grad_scale, own.scale.get(), own.grad_mean.get(), members.index == 0);
    if (!grad_input) return;
    for (int64_t c = begin; c < end; ++c) own.grad_mean.get()[c] /= S(p.pixels);
    scale_pixels<true>(grad, own.scale.get(), own.grad_mean.get(), p.channels, p.pixels, p.channels_last, begin, end,
                       grad_input + image * size, streamed);
  });
  end_streams();
}

}  // namespace cellops::CELLOPS_ISA
