// Where the taps of deformable convolution look: output pixels of a tile to corners and weights in the input.
#pragma once
#include "../cellops.h"
#include "../common/bilinear.h"
#include "../common/layout.h"
#include "../common/simd.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int kTile = 96;  // most output pixels handled at once; a multiple of kRows on every instruction set
inline constexpr int kTileRoom = kTile + 16;

// A tensor [batch, channels, pixels] in either memory format.
struct Planes {
  const void* data;
  int64_t channels, channel_stride, pixel_stride, image_stride;
  Planes(const void* data, int64_t channels, int64_t pixels, bool channels_last)
      : data(data),
        channels(channels),
        channel_stride(channels_last ? 1 : pixels),
        pixel_stride(channels_last ? channels : 1),
        image_stride(channels * pixels) {}
  int64_t at(int64_t image, int64_t channel, int64_t pixel) const {
    return image * image_stride + channel * channel_stride + pixel * pixel_stride;
  }
};

template <class To, class From>
inline void gather(int64_t count, const From* from, int64_t stride, To* to) {
  if (stride == 1) {
    convert_row(count, from, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_compute(from[i * stride]);
  }
}

template <class To, class From>
inline void spread(int64_t count, const From* from, To* to, int64_t stride) {
  if (stride == 1) {
    convert_row(count, from, to);
  } else {
    for (int64_t i = 0; i < count; ++i) from_compute(to + i * stride, from[i]);
  }
}

// Output pixels first, first + 1, ... of the whole batch, in the order of memory.
template <class S>
struct Tile {
  int64_t count;
  S base_y[kTileRoom], base_x[kTileRoom];  // where tap (0, 0) lies without its offset
  int64_t image_row[kTileRoom];            // the input image's first row of pixels
};

// The four corners that one tap of one offset group reads for each pixel of a tile.
template <class S>
struct Corners {
  S weight[4][kTileRoom];  // bilinear weight times mask
  int32_t index[4][kTileRoom];
  S bottom[kTileRoom], right[kTileRoom], mask[kTileRoom], nan[kTileRoom];
  S offset_y[kTileRoom], offset_x[kTileRoom];
};

template <class T>
struct Input {
  const T* rows;  // [image][pixel][row], from the channel that column 0 stands for
  int64_t row;    // elements from one pixel to the next
  const T* zero;  // a row of zeros: what corners outside the image read
};

template <class T, class S>
CELLOPS_INLINE const T* corner_row(const Input<T>& input, const Tile<S>& tile, const Corners<S>& corners, int corner,
                                   int64_t i, int64_t channel) {
  const int32_t index = corners.index[corner][i];
  return index < 0 ? input.zero : input.rows + (tile.image_row[i] + index) * input.row + channel;
}

template <class S>
struct Scatter {
  S* rows;  // [pixel][row], from the block's first channel
  int64_t row;
  S* outside;  // takes what falls outside the image
};

// The pass over the corners for one offset group's channels; see deform_conv2d_backward.cpp.
template <bool Dots, bool Columns, bool Add, class T, class S>
inline void corner_pass(const Input<T>& input, const Scatter<S>& scatter, const Tile<S>& tile,
                        const Corners<S>& corners, int64_t channel, int64_t channels, int64_t stride,
                        const S* grad_columns, S* columns, S* dots) {
  constexpr int lanes = kLanes<S>;
  for (int64_t i = 0; i < tile.count; ++i, grad_columns += stride, columns += stride, dots += 4) {
    const T* from[4];
    S* to[4];
    S weight[4], sum[4] = {};
    Vec<S> dot[4] = {};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      from[k] = corner_row(input, tile, corners, k, i, channel);
      weight[k] = corners.weight[k][i];
      const int32_t index = corners.index[k][i];
      to[k] = index < 0 ? scatter.outside : scatter.rows + index * scatter.row + channel;
    }
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) {
      const Vec<S> grad = Dots || Add ? load(grad_columns + c) : Vec<S>{};
      Vec<S> sample = {};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if constexpr (Dots || Columns) {
          const Vec<S> value = load(from[k] + c);
          if constexpr (Dots) dot[k] += grad * value;
          if constexpr (Columns) sample += broadcast(weight[k]) * value;
        }
      }
      if constexpr (Columns) store(columns + c, sample);
      if constexpr (Add) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) store(to[k] + c, load(to[k] + c) + broadcast(weight[k]) * grad);
      }
    }
    if constexpr (Dots) sums_of(dot[0], dot[1], dot[2], dot[3], sum);
    for (; c < channels; ++c) {
      S sample = 0;
      for (int k = 0; k < 4; ++k) {
        if constexpr (Dots || Columns) {
          const S value = to_compute(from[k][c]);
          if constexpr (Dots) sum[k] += grad_columns[c] * value;
          if constexpr (Columns) sample += weight[k] * value;
        }
      }
      if constexpr (Columns) columns[c] = sample;
      if constexpr (Add) {
        for (int k = 0; k < 4; ++k) to[k][c] += weight[k] * grad_columns[c];
      }
    }
    if constexpr (Dots) __builtin_memcpy(dots, sum, sizeof(sum));
  }
}

template <class T>
class Points {
 public:
  using S = Compute<T>;

  Points(const DeformConv2dParams& p, const void* offset, const void* mask)
      : p_(p),
        taps_(p.kernel_height * p.kernel_width),
        pixels_(p.out_height * p.out_width),
        offset_(offset, 2 * p.offset_groups * taps_, pixels_, p.offset_channels_last),
        mask_(mask, p.offset_groups * taps_, pixels_, p.mask_channels_last) {}

  // Pixels [first, first + count) of the batch; input images are stored from `first_image` on.
  void start(int64_t first, int64_t count, int64_t first_image, Tile<S>* tile) {
    tile->count = count;
    first_ = first;
    const int64_t in_pixels = p_.in_height * p_.in_width;
    int64_t image = first / pixels_, pixel = first % pixels_;
    int64_t y = pixel / p_.out_width, x = pixel % p_.out_width;
    for (int64_t i = 0; i < count; ++i) {
      tile->base_y[i] = S(y * p_.stride_height - p_.pad_height);
      tile->base_x[i] = S(x * p_.stride_width - p_.pad_width);
      tile->image_row[i] = (image - first_image) * in_pixels;
      if (++x == p_.out_width) {
        x = 0;
        if (++y == p_.out_height) y = 0, ++image;
      }
    }
    tap_ = group_ = -1;
  }

  // Fills `corners` for one tap and offset group, unless they are there already.
  void locate(const Tile<S>& tile, int64_t tap, int64_t group, Corners<S>* corners) {
    if (tap == tap_ && group == group_) return;
    tap_ = tap, group_ = group;
    const int64_t channel = group * taps_ + tap;
    for (int64_t i = 0; i < tile.count;) {
      const int64_t image = (first_ + i) / pixels_, pixel = (first_ + i) % pixels_;
      const int64_t run = min_of(tile.count - i, pixels_ - pixel);
      gather_offset(run, offset_.at(image, 2 * channel, pixel), corners->offset_y + i);
      gather_offset(run, offset_.at(image, 2 * channel + 1, pixel), corners->offset_x + i);
      if (mask_.data) {
        gather(run, static_cast<const T*>(mask_.data) + mask_.at(image, channel, pixel), mask_.pixel_stride,
               corners->mask + i);
      }
      i += run;
    }
    constexpr int lanes = kLanes<S>;
    using R = Vec<S>;
    using I = VecInt<S>;
    const S tap_y = S(tap / p_.kernel_width * p_.dilation_height), tap_x = S(tap % p_.kernel_width * p_.dilation_width);
    const R height = broadcast(S(p_.in_height)), width = broadcast(S(p_.in_width)), zero = {},
            nan = broadcast(S(__builtin_nan("")));
    using Int = typename IntOf<S>::type;
    const I width_int = I{} + Int(p_.in_width), last_row = I{} + Int(p_.in_height - 1),
            last_column = I{} + Int(p_.in_width - 1), none = I{} - 1;
    const auto to_int = [](R value) { return __builtin_convertvector(value, I); };
    const auto to_real = [](I value) { return __builtin_convertvector(value, R); };
    for (int64_t i = 0; i < tile.count; i += lanes) {
      const R y = (load(tile.base_y + i) + tap_y) + load(corners->offset_y + i);
      const R x = (load(tile.base_x + i) + tap_x) + load(corners->offset_x + i);
      const auto s =
          sample_point<R, I>(y, x, height, width, width_int, last_row, last_column, zero, nan, none, to_int, to_real);
      const R mask = mask_.data ? load(corners->mask + i) : zero + 1;
      for (int corner = 0; corner < 4; ++corner) {
        store(corners->weight[corner] + i, s.weight[corner] * mask);
        const auto index = __builtin_convertvector(s.index[corner], Index);
        __builtin_memcpy(corners->index[corner] + i, &index, sizeof(index));
      }
      store(corners->bottom + i, s.bottom);
      store(corners->right + i, s.right);
      store(corners->nan + i, s.nan);
    }
  }

 private:
  using Index = typename VectorOf<int32_t, 4 * kLanes<S>>::type;

  void gather_offset(int64_t count, int64_t at, S* to) const {
    if (p_.offset_dtype == p_.dtype) {
      gather(count, static_cast<const T*>(offset_.data) + at, offset_.pixel_stride, to);
    } else if constexpr (sizeof(T) == 2) {
      gather(count, static_cast<const float*>(offset_.data) + at, offset_.pixel_stride, to);
    }
  }

  const DeformConv2dParams& p_;
  const int64_t taps_, pixels_;
  const Planes offset_, mask_;
  int64_t first_ = 0, tap_ = -1, group_ = -1;
};

}  // namespace cellops::CELLOPS_ISA
