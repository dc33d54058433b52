// Deformable convolution, modulated or not (Dai et al. 2017; Zhu et al. 2019):
//
//   output[n, o, p] = bias[o] + sum over taps t and channels c of o's group of
//                               weight[o, c, t] * mask[n, g, t, p] * (input[n, c] sampled at point(n, g, t, p))
//   point(n, g, t, p) = p * stride - pad + t * dilation + offset[n, g, t, p]
//
// Never builds the im2col buffer. Input rows are read channels-last, so each corner is a run of neighbouring channels
// (an NCHW image is transposed into scratch first). A thread samples a tile of at most kTile output pixels straight
// into the left operand of a register-blocked product, at most kDepth columns at a time: both stay in the second
// cache. Backward multiplies the tile's output gradient by the weight of one tap at a time, and a single pass over the
// four corners then gives the offset's and mask's gradients (dot products over channels), the columns again (for the
// weight's gradient) and the scattered input gradient. Threads share images and blocks of channels, never a sum, so
// results do not depend on timing.
#include "../cellops.h"
#include "../common/gemm.h"
#include "../common/layout.h"
#include "../common/parallel.h"
#include "deform_conv2d_plan.h"
#include "deform_conv2d_points.h"

namespace cellops::CELLOPS_ISA {
namespace {

// columns[i][c] = the masked sample of channel + c at the tile's i-th pixel.
template <class T, class E>
void sample_columns(const Input<T>& input, const Tile<Compute<T>>& tile, const Corners<Compute<T>>& corners,
                    int64_t channel, int64_t channels, E* columns, int64_t stride) {
  using S = Compute<T>;
  constexpr int lanes = kLanes<S>;
  for (int64_t i = 0; i < tile.count; ++i, columns += stride) {
    const T *a = corner_row(input, tile, corners, 0, i, channel), *b = corner_row(input, tile, corners, 1, i, channel),
            *c = corner_row(input, tile, corners, 2, i, channel), *d = corner_row(input, tile, corners, 3, i, channel);
    const S wa = corners.weight[0][i], wb = corners.weight[1][i], wc = corners.weight[2][i], wd = corners.weight[3][i];
    const Vec<S> va = broadcast(wa), vb = broadcast(wb), vc = broadcast(wc), vd = broadcast(wd);
    int64_t k = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2 && sizeof(E) == 2) {  // even and odd channels apart: half the conversions
      const auto even = [](const T* from) { return bit_cast<Vec<S>>(_mm512_slli_epi32(_mm512_loadu_si512(from), 16)); };
      const auto odd = [](const T* from) {
        return bit_cast<Vec<S>>(_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(int(0xffff0000u))));
      };
      for (; k + 2 * lanes <= channels; k += 2 * lanes) {
        _mm512_storeu_si512(columns + k,
                            weave(va * even(a + k) + vb * even(b + k) + vc * even(c + k) + vd * even(d + k),
                                  va * odd(a + k) + vb * odd(b + k) + vc * odd(c + k) + vd * odd(d + k)));
      }
    }
#endif
    for (; k + lanes <= channels; k += lanes) {
      store(columns + k, va * load(a + k) + vb * load(b + k) + vc * load(c + k) + vd * load(d + k));
    }
    for (; k < channels; ++k) {
      from_compute(columns + k,
                   wa * to_compute(a[k]) + wb * to_compute(b[k]) + wc * to_compute(c[k]) + wd * to_compute(d[k]));
    }
  }
}

template <class T, class M>
class Forward {
  using S = Compute<T>;
  using E = typename M::Element;

 public:
  Forward(const DeformConv2dParams& p, const DeformConv2dForward& io, int threads)
      : p_(p),
        io_(io),
        threads_(team_size(p, threads)),
        depthwise_(is_depthwise(p)),
        plan_(p),
        pixels_(p.out_height * p.out_width),
        in_pixels_(p.in_height * p.in_width),
        group_room_(depthwise_ ? 1 : round_up(plan_.group_outputs, kLanes<S>)),
        sum_row_(round_up(p.groups * group_room_, kLanes<S>)),
        chunk_(p.input_channels_last ? p.batch : min_of(p.batch, threads_)),
        taps_(p.kernel_height * p.kernel_width),
        packed_(depthwise_ ? taps_ * p.in_channels : plan_.packed_size * M::depth),
        bias_(sum_row_),
        zero_(p.in_channels + kLanes<S>),
        rows_(p.input_channels_last ? 0 : chunk_ * in_pixels_ * p.in_channels) {}

  bool run() {
    if (plan_.failed() || packed_.failed() || bias_.failed() || zero_.failed() || rows_.failed()) return false;
    zero_.zero();
    bias_.zero();
    if (io_.bias) {
      for (int64_t o = 0; o < p_.out_channels; ++o) {
        bias_.get()[column_of(o)] = to_compute(static_cast<const T*>(io_.bias)[o]);
      }
    }
    bool failed = false;
    parallel(threads_, [&](Team team) {
      // A wide sum takes a shorter tile, so that a thread's scratch stays within the second cache.
      const int64_t room = (int64_t(1) << 17) / (sum_row_ + kRowStride<M>) / kRows * kRows;
      const int64_t tile = max_of(kRows, min_of(min_of(kTile, room), round_up(chunk_ * pixels_, kRows)));
      Buffer<E> columns(tile * kRowStride<M> * M::depth);
      Buffer<S> sums(tile * sum_row_ + kPanel<S>);
      Buffer<Tile<S>> points(1);
      Buffer<Corners<S>> corners(1);
      const bool ready = !columns.failed() && !sums.failed() && !points.failed() && !corners.failed();
      pack(team);
      if (!team.all(ready, &failed)) return;
      for (int64_t image = 0; image < p_.batch; image += chunk_) {
        const int64_t images = min_of(chunk_, p_.batch - image);
        if (!p_.input_channels_last) {
          if (image) team.barrier();  // the rows of the images before are still being read
          to_rows(team, image, images);
          team.barrier();
        }
        sample_images(team, image, images, tile, columns.get(), sums.get(), points.get(), corners.get());
      }
    });
    return !failed;
  }

 private:
  int64_t column_of(int64_t out) const { return out / plan_.group_outputs * group_room_ + out % plan_.group_outputs; }

  void pack(const Team& team) {
    const T* weight = static_cast<const T*>(io_.weight);
    if (depthwise_) {
      if (team.index == 0) pack_depthwise(p_, weight, packed_.get());
      return;
    }
    const WeightStrides strides(p_);
    int64_t begin, end;
    team.share(plan_.product_count * plan_.panels, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      pack_weight<M>(plan_, plan_.products.get()[i / plan_.panels], i % plan_.panels, weight, strides.out,
                     strides.channel, strides.tap, packed_.get());
    }
  }

  void to_rows(const Team& team, int64_t image, int64_t images) {
    int64_t begin, end;
    team.share(images * in_pixels_, &begin, &end);
    while (begin < end) {
      const int64_t slot = begin / in_pixels_, first = begin % in_pixels_;
      const int64_t last = min_of(in_pixels_, first + end - begin);
      planes_to_rows(p_.in_channels, first, last,
                     static_cast<const T*>(io_.input) + (image + slot) * p_.in_channels * in_pixels_, in_pixels_,
                     rows_.get() + slot * in_pixels_ * p_.in_channels, p_.in_channels);
      begin += last - first;
    }
  }

  void sample_images(const Team& team, int64_t image, int64_t images, int64_t tile, E* columns, S* sums,
                     Tile<S>* points, Corners<S>* corners) {
    const Input<T> input{p_.input_channels_last ? static_cast<const T*>(io_.input) : rows_.get(), p_.in_channels,
                         zero_.get()};
    Points<T> locator(p_, io_.offset, io_.mask);
    // Whole strips of kRows pixels to each thread, and tiles of equal size within its share.
    const int64_t total = images * pixels_;
    int64_t begin, end;
    team.share(div_up(total, kRows), &begin, &end);
    begin *= kRows, end = min_of(end * kRows, total);
    const int64_t tiles = div_up(end - begin, tile);
    const int64_t step = tiles ? round_up(div_up(end - begin, tiles), kRows) : 0;
    for (; begin < end; begin += step) {
      const int64_t count = min_of(step, end - begin);
      locator.start(image * pixels_ + begin, count, p_.input_channels_last ? 0 : image, points);
      for (int64_t i = 0; i < count; ++i) convert_row(sum_row_, bias_.get(), sums + i * sum_row_);
      // The strip's last rows are multiplied too, and thrown away: zeros, for denormal rubbish would be slow.
      const int64_t rest = round_up(count, kRows) - count, row = kRowStride<M> * M::depth;
      __builtin_memset(static_cast<void*>(columns + count * row), 0, size_t(rest * row) * sizeof(E));
      if (depthwise_) {
        multiply_depthwise(input, *points, locator, corners, columns, sums);
      } else {
        multiply(input, *points, locator, corners, columns, sums);
      }
      write(image * pixels_ + begin, count, sums);
    }
  }

  void multiply(const Input<T>& input, const Tile<S>& tile, Points<T>& locator, Corners<S>* corners, E* columns,
                S* sums) {
    const int64_t group_channels = p_.in_channels / p_.offset_groups;
    for (int64_t i = 0; i < plan_.product_count; ++i) {
      const Product& product = plan_.products.get()[i];
      for (int64_t j = product.first_segment; j < product.last_segment; ++j) {
        const Segment& segment = plan_.segments.get()[j];
        for (int64_t c = 0; c < segment.channels;) {
          const int64_t channel = segment.channel + c, group = channel / group_channels;
          const int64_t run = min_of(segment.channels - c, (group + 1) * group_channels - channel);
          locator.locate(tile, segment.tap, group, corners);
          sample_columns(input, tile, *corners, channel, run, columns + segment.column + c, kRowStride<M> * M::depth);
          c += run;
        }
      }
      if (M::depth > 1 && product.columns % M::depth) {
        E* last = columns + product.column + product.columns;
        for (int64_t r = 0; r < tile.count; ++r) from_compute(last + r * kRowStride<M> * M::depth, S(0));
      }
      const int64_t depth = div_up(product.columns, M::depth);
      using Unit = typename M::Unit;
      multiply_packed<M, true>(tile.count, plan_.group_outputs, depth,
                               reinterpret_cast<const Unit*>(columns + product.column), kRowStride<M>,
                               reinterpret_cast<const Unit*>(packed_.get()) + product.packed, depth * kPanel<S>,
                               sums + product.group * group_room_, sum_row_);
    }
  }

  void multiply_depthwise(const Input<T>& input, const Tile<S>& tile, Points<T>& locator, Corners<S>* corners,
                          E* columns, S* sums) {
    const int64_t group_channels = p_.in_channels / p_.offset_groups, stride = kRowStride<M> * M::depth;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      for (int64_t channel = 0; channel < p_.in_channels;) {
        const int64_t group = channel / group_channels;
        const int64_t run = min_of(min_of(kDepth<M>, p_.in_channels - channel), (group + 1) * group_channels - channel);
        locator.locate(tile, tap, group, corners);
        sample_columns(input, tile, *corners, channel, run, columns, stride);
        const E* weight = packed_.get() + tap * p_.in_channels + channel;
        for (int64_t i = 0; i < tile.count; ++i) {
          S* sum = sums + i * sum_row_ + channel;
          const E* column = columns + i * stride;
          for (int64_t c = 0; c < run; ++c) sum[c] += to_compute(column[c]) * to_compute(weight[c]);
        }
        channel += run;
      }
    }
  }

  void write(int64_t first, int64_t count, const S* sums) {
    T* output = static_cast<T*>(io_.output);
    const int64_t outputs = plan_.group_outputs, out = p_.out_channels;
    if (depthwise_ || p_.groups == 1) {
      write_group(first, count, sums, out, output);
      return;
    }
    for (int64_t g = 0; g < p_.groups; ++g) {
      write_group(first, count, sums + g * group_room_, outputs,
                  output + g * outputs * (p_.output_channels_last ? 1 : pixels_));
    }
  }

  void write_group(int64_t first, int64_t count, const S* sums, int64_t outputs, T* output) {
    if (p_.output_channels_last) {
      for (int64_t i = 0; i < count; ++i) {
        convert_row(outputs, sums + i * sum_row_, output + (first + i) * p_.out_channels);
      }
      return;
    }
    for (int64_t i = 0; i < count;) {
      const int64_t image = (first + i) / pixels_, pixel = (first + i) % pixels_;
      const int64_t run = min_of(count - i, pixels_ - pixel);
      rows_to_planes(outputs, run, sums + i * sum_row_, sum_row_, output + image * p_.out_channels * pixels_ + pixel,
                     pixels_);
      i += run;
    }
  }

  const DeformConv2dParams& p_;
  const DeformConv2dForward& io_;
  const int threads_;
  const bool depthwise_;
  const Plan<M> plan_;
  const int64_t pixels_, in_pixels_, group_room_, sum_row_, chunk_, taps_;
  const Buffer<E> packed_;
  const Buffer<S> bias_;
  const Buffer<T> zero_;
  const Buffer<T> rows_;
};

template <class T>
bool forward(const DeformConv2dParams& p, const DeformConv2dForward& io, int threads) {
  if (is_depthwise(p)) return Forward<T, Multiply<Compute<T>>>(p, io, threads).run();
  return Forward<T, MultiplyFor<T>>(p, io, threads).run();
}

}  // namespace

CELLOPS_DISPATCH(deform_conv2d_forward, forward, DeformConv2dParams, DeformConv2dForward)

}  // namespace cellops::CELLOPS_ISA
