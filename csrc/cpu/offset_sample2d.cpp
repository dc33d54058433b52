// Every plane sampled at its own offsets: output[n, c, h, w] = bilinear sample of input[n, c] at (h + dy, w + dx),
// clamped to the image. A thread owns a plane, or the planes of a block of channels, and so its part of every gradient.
//
// Lanes hold pixels where the offset lies in planes, channels where it lies channels_last. The input is staged in
// either case; what else lies the other way passes through scratch, a block of channels at a time.
#include "offset_sample2d_order.h"

namespace cellops::CELLOPS_ISA {
namespace {

template <class S>
struct Corners {
  Vec<S> top_left, top_right, bottom_left, bottom_right;
  Corners(const Tile<S>& tile, int i) {
    unzip(load(tile.upper + 2 * i), load(tile.upper + 2 * i + kLanes<S>), top_left, top_right);
    unzip(load(tile.lower + 2 * i), load(tile.lower + 2 * i + kLanes<S>), bottom_left, bottom_right);
  }
};

template <class S, class Order, class O, class T>
inline void sample(Order order, const Grid<S>& grid, const S* staged, const O* offset, T* output) {
  constexpr int lanes = kLanes<S>;
  Tile<S> tile;
  order.for_tiles([&](int points) {
    for (int i = 0; i < points; i += lanes) order.template locate_vector<false>(offset, i, &tile);
    fetch(grid, staged, points, &tile);
    for (int i = 0; i < points; i += lanes) {
      const Corners<S> v(tile, i);
      const Vec<S> bottom = load(tile.bottom + i), right = load(tile.right + i), top = 1 - bottom, left = 1 - right;
      const Vec<S> value = top * (left * v.top_left + right * v.top_right) +
                           bottom * (left * v.bottom_left + right * v.bottom_right);
      store_some(output + order.at(i), value, order.lanes(i));
    }
  });
}

// sums: [plane][row][column][2], what each cell's left and right corner receive. staged or sums, and with it
// grad_offset, may be null.
template <class S, class Order, class O, class T>
inline void differentiate(Order order, const Grid<S>& grid, const S* staged, const O* offset, const T* grad_output,
                          S* sums, O* grad_offset) {
  constexpr int lanes = kLanes<S>;
  const Vec<S> zero = {};
  Tile<S> tile;
  order.for_tiles([&](int points) {
    for (int i = 0; i < points; i += lanes) order.template locate_vector<true>(offset, i, &tile);
    if (grad_offset) fetch(grid, staged, points, &tile);
    for (int i = 0; i < points; i += lanes) {
      Vec<S> grad = load_some(grad_output + order.at(i), order.lanes(i));
      Vec<S> bottom = load(tile.bottom + i), right = load(tile.right + i);
      const auto known = (bottom == bottom) & (right == right);
      grad = known ? grad : zero, bottom = known ? bottom : zero, right = known ? right : zero;
      const Vec<S> top = 1 - bottom, left = 1 - right;
      if (grad_offset) {
        const Corners<S> v(tile, i);
        VecInt<S> free_y, free_x;
        __builtin_memcpy(&free_y, tile.free_y + i, sizeof(free_y));
        __builtin_memcpy(&free_x, tile.free_x + i, sizeof(free_x));
        const Vec<S> dy = left * (v.bottom_left - v.top_left) + right * (v.bottom_right - v.top_right);
        const Vec<S> dx = top * (v.top_right - v.top_left) + bottom * (v.bottom_right - v.bottom_left);
        order.store_shift(grad_offset, i, free_y ? grad * dy : zero, free_x ? grad * dx : zero);
      }
      if (sums) {
        const Vec<S> above = grad * top, below = grad * bottom;
        Vec<S> a, b;
        zip(above * left, above * right, a, b);
        store(tile.upper + 2 * i, a), store(tile.upper + 2 * i + lanes, b);
        zip(below * left, below * right, a, b);
        store(tile.lower + 2 * i, a), store(tile.lower + 2 * i + lanes, b);
      }
    }
    if (!sums) return;
    for (int i = 0; i < points; ++i) {
      S *upper = sums + 2 * tile.cell[i], *lower = upper + 2 * grid.row;
      store_pair(upper, load_pair(upper) + load_pair(tile.upper + 2 * i));
      store_pair(lower, load_pair(lower) + load_pair(tile.lower + 2 * i));
    }
  });
}

// A plane of the input's gradient from its sums, before whose first lies a zero.
template <class S, class T>
inline void gather_sums(const Grid<S>& grid, const S* sums, T* to) {
  constexpr int lanes = kLanes<S>;
  const T* end = to + grid.height * grid.width;
  for (int64_t y = 0; y < grid.height; ++y, sums += 2 * grid.row, to += grid.width) {
    for (int64_t x = 0; x < grid.width; x += lanes) {
      Vec<S> from_left, from_right;  // as the right corner of the cell before, as the left corner of its own
      unzip(load(sums + 2 * x - 1), load(sums + 2 * x - 1 + lanes), from_left, from_right);
      if (to + x + lanes <= end) {
        store(to + x, from_left + from_right);  // past a row's end, where the next will lie
      } else {
        store_some(to + x, from_left + from_right, grid.width - x);
      }
    }
  }
}

// One thread's work on one block after the other; O is the storage type of the offset.
template <class T, class O>
class Worker {
 public:
  using S = Compute<T>;

  Worker(const OffsetSample2dParams& p, const Grid<S>& grid, bool backward)
      : p_(p),
        grid_(grid),
        pixels_(p.height * p.width),
        by_channels_(p.offset_channels_last && !p.interleaved && grid.plane < int64_t(1) << 27),
        turn_offset_(p.offset_channels_last && !by_channels_),
        turn_data_(by_channels_ != p.channels_last),
        planes_(by_channels_ || turn_offset_ || p.channels_last ? kBlockPlanes : 1),
        staged_(planes_ * grid.plane + kLanes<S>),
        line_(p.channels_last && sizeof(T) == 2 ? kBlockPlanes * p.width : 0),
        offset_(turn_offset_ ? 2 * planes_ * pixels_ : 0),
        data_(turn_data_ ? planes_ * pixels_ : 0),
        grad_offset_(turn_offset_ && backward ? 2 * planes_ * pixels_ : 0),
        sums_(backward ? kPad + 2 * (planes_ * grid.plane + kLanes<S>) : 0) {
    if (failed()) return;
    staged_.zero();
    sums_.zero();
  }

  bool failed() const {
    return staged_.failed() || line_.failed() || offset_.failed() || data_.failed() || grad_offset_.failed() ||
           sums_.failed();
  }

  static int64_t blocks(const OffsetSample2dParams& p) {
    return p.batch * (p.channels_last || p.offset_channels_last ? div_up(p.channels, kBlockPlanes) : p.channels);
  }

  void forward(int64_t block, const OffsetSample2dForward& io) {
    start(block);
    stage(static_cast<const T*>(io.input));
    const O* offset = offset_planes(static_cast<const O*>(io.offset));
    T* output = static_cast<T*>(io.output) + data_at_;
    T* to = turn_data_ ? data_.get() : output;
    if (by_channels_) {
      sample(channel_order(), grid_, staged_.get(), offset, to);
    } else {
      for (int64_t c = 0; c < channels_; ++c) {
        sample(pixel_order(), grid_, staged_.get() + c * grid_.plane, offset + 2 * c * pixels_, to + c * pixels_);
      }
    }
    if (!turn_data_) return;
    if (by_channels_) {
      rows_to_planes(channels_, pixels_, to, kBlockPlanes, output, pixels_);
    } else {
      planes_to_rows(channels_, 0, pixels_, to, pixels_, output, p_.channels);
    }
  }

  void backward(int64_t block, const OffsetSample2dBackward& io) {
    start(block);
    if (io.grad_offset) stage(static_cast<const T*>(io.input));
    const O* offset = offset_planes(static_cast<const O*>(io.offset));
    O* grad_offset = static_cast<O*>(io.grad_offset);
    O* grad_shift = !grad_offset ? nullptr : turn_offset_ ? grad_offset_.get() : grad_offset + offset_at_;
    const T* grad_output = static_cast<const T*>(io.grad_output) + data_at_;
    if (turn_data_ && by_channels_) {
      planes_to_rows(channels_, 0, pixels_, grad_output, pixels_, data_.get(), kBlockPlanes);
    } else if (turn_data_) {
      rows_to_planes(channels_, pixels_, grad_output, p_.channels, data_.get(), pixels_);
    }
    const T* grad = turn_data_ ? data_.get() : grad_output;
    S* sums = io.grad_input ? sums_.get() + kPad : nullptr;
    if (sums) __builtin_memset(sums, 0, size_t(2 * planes_ * grid_.plane) * sizeof(S));
    if (by_channels_) {
      differentiate(channel_order(), grid_, staged_.get(), offset, grad, sums, grad_shift);
    } else {
      for (int64_t c = 0; c < channels_; ++c) {
        differentiate(pixel_order(), grid_, staged_.get() + c * grid_.plane, offset + 2 * c * pixels_,
                      grad + c * pixels_, sums ? sums + 2 * c * grid_.plane : nullptr,
                      grad_shift ? grad_shift + 2 * c * pixels_ : nullptr);
      }
    }
    if (grad_shift && turn_offset_) {
      planes_to_rows(2 * channels_, 0, pixels_, grad_shift, pixels_, grad_offset + offset_at_, 2 * p_.channels);
    }
    if (!sums) return;
    T* grad_input = static_cast<T*>(io.grad_input) + data_at_;
    for (int64_t c = 0; c < channels_; ++c) {
      if (p_.channels_last) {
        gather_sums(grid_, sums + 2 * c * grid_.plane, staged_.get() + c * pixels_);
      } else {
        gather_sums(grid_, sums + 2 * c * grid_.plane, grad_input + c * pixels_);
      }
    }
    if (p_.channels_last) {
      planes_to_rows(channels_, 0, pixels_, staged_.get(), pixels_, grad_input, p_.channels);
    }
  }

 private:
  static constexpr int64_t kPad = 64 / sizeof(S);  // zeros before the sums

  void start(int64_t block) {
    const int64_t blocks = div_up(p_.channels, planes_), image = block / blocks, first = block % blocks * planes_;
    channels_ = min_of(planes_, p_.channels - first);
    const int64_t at = image * p_.channels * pixels_;
    data_at_ = at + first * (p_.channels_last ? 1 : pixels_);
    offset_at_ = 2 * (at + first * (p_.offset_channels_last ? 1 : pixels_));
  }

  void stage(const T* input) {
    const T* end = input + p_.batch * p_.channels * pixels_;
    input += data_at_;
    if (p_.channels_last) {
      stage_rows(grid_, channels_, input, p_.channels, line_.get(), staged_.get());
    } else {
      for (int64_t c = 0; c < channels_; ++c) {
        stage_plane(grid_, input + c * pixels_, end, staged_.get() + c * grid_.plane);
      }
    }
  }

  const O* offset_planes(const O* offset) {
    offset += offset_at_;
    if (!turn_offset_) return offset;
    rows_to_planes(2 * channels_, pixels_, offset, 2 * p_.channels, offset_.get(), pixels_);
    return offset_.get();
  }

  ChannelOrder<S> channel_order() const {
    return ChannelOrder<S>(grid_, channels_, p_.channels, turn_data_ ? kBlockPlanes : p_.channels);
  }
  PixelOrder<S> pixel_order() const { return PixelOrder<S>(grid_, p_.interleaved); }

  const OffsetSample2dParams& p_;
  const Grid<S>& grid_;
  const int64_t pixels_;
  const bool by_channels_, turn_offset_, turn_data_;
  const int64_t planes_;  // of a block
  const Buffer<S> staged_, line_;
  const Buffer<O> offset_;
  const Buffer<T> data_;
  const Buffer<O> grad_offset_;
  const Buffer<S> sums_;
  int64_t channels_ = 0, data_at_ = 0, offset_at_ = 0;  // of the block at hand
};

// work(worker, block) for every block, each by one thread.
template <class T, class O, class Work>
bool for_blocks(const OffsetSample2dParams& p, int threads, bool backward, const Work& work) {
  const Grid<Compute<T>> grid(p.height, p.width);
  if (grid.failed()) return false;
  const int64_t blocks = Worker<T, O>::blocks(p);
  const int64_t points = p.batch * p.channels * p.height * p.width;
  bool failed = false;
  parallel(int(max_of(1, min_of(threads, min_of(blocks, points / 4096)))), [&](const Team& team) {
    Worker<T, O> worker(p, grid, backward);
    if (!team.all(!worker.failed(), &failed)) return;
    int64_t begin, end;
    team.share(blocks, &begin, &end);
    for (int64_t block = begin; block < end; ++block) work(worker, block);
  });
  return !failed;
}

template <class T>
bool forward(const OffsetSample2dParams& p, const OffsetSample2dForward& io, int threads) {
  const auto work = [&](auto& worker, int64_t block) { worker.forward(block, io); };
  if (p.offset_dtype == p.dtype) return for_blocks<T, T>(p, threads, false, work);
  return for_blocks<T, Compute<T>>(p, threads, false, work);
}

template <class T>
bool backward(const OffsetSample2dParams& p, const OffsetSample2dBackward& io, int threads) {
  const auto work = [&](auto& worker, int64_t block) { worker.backward(block, io); };
  if (p.offset_dtype == p.dtype) return for_blocks<T, T>(p, threads, true, work);
  return for_blocks<T, Compute<T>>(p, threads, true, work);
}

}  // namespace

CELLOPS_DISPATCH(offset_sample2d_forward, forward, OffsetSample2dParams, OffsetSample2dForward)
CELLOPS_DISPATCH(offset_sample2d_backward, backward, OffsetSample2dParams, OffsetSample2dBackward)

}  // namespace cellops::CELLOPS_ISA
