// Every plane sampled at its own offsets: output[n, c, h, w] = bilinear sample of input[n, c] at (h + dy, w + dx),
// clamped to the image. A thread owns a plane, or the planes of a block of channels, and so its part of every gradient.
//
// Lanes hold pixels where the offset lies in planes, channels where it lies channels_last. The input is staged in
// either case; what else lies the other way passes through scratch, a block of channels at a time.
#include "offset_sample2d_points.h"

namespace cellops::CELLOPS_ISA {
namespace {

template <class S, class T>
CELLOPS_PHASE void sample(const Tile<S>& tile, const Runs& given, const S* staged, T* output) {
  const Runs runs = given;
  for (int64_t run = 0; run < runs.count; ++run, output += runs.stride) {
    for (int64_t i = 0; i < runs.length; i += kLanes<S>) {
      const int64_t at = run * runs.step + i;
      Vec<S> top_left, bottom_left, top_right, bottom_right;
      load_quads(staged, tile.cell + at, top_left, bottom_left, top_right, bottom_right);
      const Vec<S> y = load(tile.y + at), x = load(tile.x + at);
      const Vec<S> bottom = y - floor_of<S>(y), right = x - floor_of<S>(x), left = 1 - right;
      const Vec<S> value =
          (1 - bottom) * (left * top_left + right * top_right) + bottom * (left * bottom_left + right * bottom_right);
      store_some(output + i, value, runs.length - i);
    }
  }
}

// The offset's gradient where it is wanted, and what the corners receive.
template <class S, class O, class T>
CELLOPS_PHASE void differentiate(const Grid<S>& grid, Tile<S>* tile, const Runs& given, const S* staged,
                                 const T* grad_output, O* grad_offset) {
  const Runs runs = given;
  const Vec<S> zero = {}, last_row = grid.last_row, last_column = grid.last_column;
  for (int64_t run = 0; run < runs.count; ++run, grad_output += runs.stride) {
    for (int64_t i = 0; i < runs.length; i += kLanes<S>) {
      const int64_t count = runs.length - i, at = run * runs.step + i;
      Vec<S> y = load(tile->y + at), x = load(tile->x + at);
      const auto known = (y == y) & (x == x);
      y = known ? y : zero, x = known ? x : zero;
      const Vec<S> grad = known ? load_some(grad_output + i, count) : zero;
      const Vec<S> bottom = y - floor_of<S>(y), right = x - floor_of<S>(x), top = 1 - bottom, left = 1 - right;
      if (grad_offset) {
        Vec<S> top_left, bottom_left, top_right, bottom_right;
        load_quads(staged, tile->cell + at, top_left, bottom_left, top_right, bottom_right);
        const Vec<S> dy = grad * (left * (bottom_left - top_left) + right * (bottom_right - top_right));
        const Vec<S> dx = grad * (top * (top_right - top_left) + bottom * (bottom_right - bottom_left));
        store_shifts<S>(grad_offset + run * runs.shift_stride, i, count, runs.other,
                        (y > zero) & (y < last_row) ? dy : zero, (x > zero) & (x < last_column) ? dx : zero);
      }
      const Vec<S> above = grad * top, below = grad * bottom;
      store_quads(tile->received + 4 * at, above * left, above * right, below * left, below * right);
    }
  }
}

// sums: [plane][row][column][4], what the corners of each cell receive: upper left, upper right, lower left, lower
// right.
template <class S>
CELLOPS_PHASE void scatter(const Tile<S>& tile, const Runs& given, S* sums) {
  const Runs runs = given;
  const int64_t length = round_up(runs.length, kLanes<S>);  // behind the last point: zeros
  for (int64_t run = 0; run < runs.count; ++run) {
    const int32_t* cell = tile.cell + run * runs.step;
    const S* received = tile.received + 4 * run * runs.step;
    for (int64_t i = 0; i < length; ++i) add_quad(sums + 4 * int64_t(cell[i]), received + 4 * i);
  }
}

// Lanes: the upper left and upper right sums of `row`, joined with the lower ones of the row above it.
template <class S>
CELLOPS_INLINE void join_rows(const S* row, const S* above, Vec<S>& left, Vec<S>& right) {
  constexpr int lanes = kLanes<S>;
  if constexpr (sizeof(S) == 4) {
    using Pairs = Vec<double>;  // as bits
    Pairs joined[4], first, second, unused;
    for (int k = 0; k < 4; ++k) joined[k] = bit_cast<Pairs>(load(row + k * lanes) + load(above + 2 + k * lanes));
    unzip(joined[0], joined[1], first, unused);
    unzip(joined[2], joined[3], second, unused);
    unzip(bit_cast<Vec<S>>(first), bit_cast<Vec<S>>(second), left, right);
  } else {
    for (int i = 0; i < lanes; ++i) {
      left[i] = row[4 * i] + above[4 * i + 2], right[i] = row[4 * i + 1] + above[4 * i + 3];
    }
  }
}

// A plane of the input's gradient from its sums; the row before the first is zero.
template <class S, class T>
inline void gather_sums(const Grid<S>& grid, const S* sums, T* to) {
  constexpr int lanes = kLanes<S>;
  const int64_t height = grid.height, width = grid.width, row = grid.row;
  const T* end = to + height * width;
  for (int64_t y = 0; y < height; ++y, sums += 4 * row, to += width) {
    Vec<S> before = {};
    for (int64_t x = 0; x < width; x += lanes) {
      Vec<S> left, right;
      join_rows(sums + 4 * x, sums + 4 * (x - row), left, right);
      const Vec<S> total = left + shift_in(before, right);
      before = right;
      if (to + x + lanes <= end) {
        store(to + x, total);  // past a row's end, where the next will lie
      } else {
        store_some(to + x, total, width - x);
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
        far_(by_channels_ && 2 * p.batch * p.channels * pixels_ * int64_t(sizeof(O)) > kFetchedFrom),
        turn_offset_(p.offset_channels_last && !by_channels_),
        turn_data_(by_channels_ != p.channels_last),
        data_stride_(turn_data_ ? kBlockPlanes : p.channels),
        other_(by_channels_ || p.interleaved ? 0 : pixels_),
        slots_(round_up(pixels_, kLanes<S>)),
        whole_(kTilePoints / slots_),
        planes_(planes_of_block(p)),
        blocks_(div_up(p.channels, planes_)),
        staged_(2 * planes_ * grid.plane),
        lines_(p.channels_last ? 3 * kBlockPlanes * p.width : 0),
        offset_(turn_offset_ ? 2 * planes_ * pixels_ : 0),
        data_(turn_data_ ? planes_ * pixels_ : 0),
        grad_offset_(turn_offset_ && backward ? 2 * planes_ * pixels_ : 0),
        sums_(backward ? 4 * (grid.row + planes_ * grid.plane + kLanes<S>) : 0) {
    if (failed()) return;
    staged_.zero();
    sums_.zero();
  }

  bool failed() const {
    return staged_.failed() || lines_.failed() || offset_.failed() || data_.failed() || grad_offset_.failed() ||
           sums_.failed();
  }

  static int64_t blocks(const OffsetSample2dParams& p) { return p.batch * div_up(p.channels, planes_of_block(p)); }

  void forward(int64_t block, const OffsetSample2dForward& io) {
    start(block);
    stage(static_cast<const T*>(io.input));
    const O* offset = offset_planes(static_cast<const O*>(io.offset));
    T* output = static_cast<T*>(io.output) + data_at_;
    T* to = turn_data_ ? data_.get() : output;
    for_tiles([&](int64_t channel, int64_t pixel, const Runs& runs, const Origin<S>& origin) {
      if (far_) {
        fetch<false>(offset, 2, pixel, runs.count);
        if (p_.channels_last) {
          fetch<true>(output, 1, pixel, runs.count);
          fetch_next<false>(static_cast<const T*>(io.input) + data_at_, 1, pixel, runs.count);
        }
      }
      locate_tile(runs, origin, offset + shift_at(channel, pixel));
      sample(tile_, runs, staged_.get() + 2 * channel * grid_.plane, to + data_at(channel, pixel));
    });
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
    O* grad_shifts = !grad_offset ? nullptr : turn_offset_ ? grad_offset_.get() : grad_offset + offset_at_;
    const T* grad_output = static_cast<const T*>(io.grad_output) + data_at_;
    if (turn_data_ && by_channels_) {
      planes_to_rows(channels_, 0, pixels_, grad_output, pixels_, data_.get(), kBlockPlanes);
    } else if (turn_data_) {
      rows_to_planes(channels_, pixels_, grad_output, p_.channels, data_.get(), pixels_);
    }
    const T* grad = turn_data_ ? data_.get() : grad_output;
    S* sums = io.grad_input ? sums_.get() + 4 * grid_.row : nullptr;  // behind a row of zeros
    if (sums) __builtin_memset(sums, 0, size_t(4 * planes_ * grid_.plane) * sizeof(S));
    for_tiles([&](int64_t channel, int64_t pixel, const Runs& runs, const Origin<S>& origin) {
      const int64_t at = shift_at(channel, pixel);
      if (far_) {
        fetch<false>(offset, 2, pixel, runs.count);
        if (grad_shifts) fetch<true>(grad_shifts, 2, pixel, runs.count);
        if (p_.channels_last) {
          fetch<false>(grad_output, 1, pixel, runs.count);
          if (grad_shifts) fetch_next<false>(static_cast<const T*>(io.input) + data_at_, 1, pixel, runs.count);
        }
      }
      locate_tile(runs, origin, offset + at);
      differentiate(grid_, &tile_, runs, staged_.get() + 2 * channel * grid_.plane, grad + data_at(channel, pixel),
                    grad_shifts ? grad_shifts + at : nullptr);
      if (sums) scatter(tile_, runs, sums + 4 * channel * grid_.plane);
    });
    if (grad_shifts && turn_offset_) {
      planes_to_rows(2 * channels_, 0, pixels_, grad_shifts, pixels_, grad_offset + offset_at_, 2 * p_.channels);
    }
    if (!sums) return;
    T* grad_input = static_cast<T*>(io.grad_input) + data_at_;
    for (int64_t c = 0; c < channels_; ++c) {
      if (p_.channels_last) {
        gather_sums(grid_, sums + 4 * c * grid_.plane, staged_.get() + c * pixels_);
      } else {
        gather_sums(grid_, sums + 4 * c * grid_.plane, grad_input + c * pixels_);
      }
    }
    if (!p_.channels_last) return;
    const int64_t size = sizeof(T);
    for (int64_t p = 0; p < pixels_; p += kAhead) {
      const int64_t end = min_of(p + kAhead, pixels_);
      fetch_pixels<true>(grad_input, p_.channels * size, channels_ * size, end, min_of(end + kAhead, pixels_));
      planes_to_rows(channels_, p, end, staged_.get(), pixels_, grad_input, p_.channels);
    }
  }

 private:
  static int64_t planes_of_block(const OffsetSample2dParams& p) {
    if (p.channels_last || p.offset_channels_last) return kBlockPlanes;
    return max_of(1, kTilePoints / round_up(p.height * p.width, kLanes<S>));
  }

  void start(int64_t block) {
    const int64_t image = block / blocks_, first = block % blocks_ * planes_;
    channels_ = min_of(planes_, p_.channels - first);
    const int64_t at = image * p_.channels * pixels_;
    data_at_ = at + first * (p_.channels_last ? 1 : pixels_);
    offset_at_ = 2 * (at + first * (p_.offset_channels_last ? 1 : pixels_));
    const bool last = block + 1 == blocks(p_);
    next_ = last ? 0 : (block + 1) % blocks_ > 0 ? planes_ : pixels_ * p_.channels - first;
  }

  // Asks for `numbers` of each channel of `count` pixels, those kAhead behind `pixel`: in the next block
  // where they are behind the last one.
  template <bool Write, class V>
  CELLOPS_INLINE void fetch(const V* block, int64_t numbers, int64_t pixel, int64_t count) const {
    const int64_t size = numbers * int64_t(sizeof(V)), first = pixel + kAhead;
    fetch_pixels<Write>(block, p_.channels * size, channels_ * size, first, min_of(first + count, pixels_));
    fetch_next<Write>(block, numbers, pixel, count);
  }
  // Only those in the next block.
  template <bool Write, class V>
  CELLOPS_INLINE void fetch_next(const V* block, int64_t numbers, int64_t pixel, int64_t count) const {
    const int64_t size = numbers * int64_t(sizeof(V)), first = pixel + kAhead - pixels_;
    fetch_pixels<Write>(block + numbers * next_, p_.channels * size, channels_ * size, max_of(0, first),
                        min_of(first + count, pixels_));
  }

  void stage(const T* input) {
    input += data_at_;
    if (p_.channels_last) {
      stage_rows(grid_, channels_, input, p_.channels, lines_.get(), staged_.get());
    } else {
      for (int64_t c = 0; c < channels_; ++c) {
        stage_plane(grid_, input + c * pixels_, staged_.get() + 2 * c * grid_.plane);
      }
    }
  }

  const O* offset_planes(const O* offset) {
    offset += offset_at_;
    if (!turn_offset_) return offset;
    rows_to_planes(2 * channels_, pixels_, offset, 2 * p_.channels, offset_.get(), pixels_);
    return offset_.get();
  }

  // body(channel of the block, pixel, runs, origin) for each tile of the block, from that channel and pixel on.
  template <class Body>
  void for_tiles(const Body& body) const {
    if (!by_channels_ && whole_ > 0) {
      for (int64_t c = 0; c < channels_; c += whole_) {
        const Runs runs{min_of(whole_, channels_ - c), pixels_, slots_, pixels_, 2 * pixels_, other_};
        body(c, 0, runs, Origin<S>{0, grid_.y.get(), grid_.x.get()});
      }
      return;
    }
    const int64_t step = by_channels_ ? kTilePoints / kBlockPlanes : kTilePoints;
    for (int64_t c = 0; c < (by_channels_ ? 1 : channels_); ++c) {
      for (int64_t row = 0; row < p_.height; row += grid_.rows) {
        const int64_t pixels = min_of(grid_.rows, p_.height - row) * p_.width;
        for (int64_t p = 0; p < pixels; p += step) {
          const int64_t count = min_of(step, pixels - p);
          const Runs by_channels{count, channels_, kBlockPlanes, data_stride_, 2 * p_.channels, other_};
          const Runs by_pixels{1, count, 0, 0, 0, other_};
          body(c, row * p_.width + p, by_channels_ ? by_channels : by_pixels,
               Origin<S>{S(row), grid_.y.get() + p, grid_.x.get() + p});
        }
      }
    }
  }
  void locate_tile(const Runs& runs, const Origin<S>& origin, const O* offset) {
    if (by_channels_) {
      locate<true>(grid_, runs, origin, offset, &tile_);
    } else {
      locate<false>(grid_, runs, origin, offset, &tile_);
    }
  }
  int64_t data_at(int64_t channel, int64_t pixel) const {
    return by_channels_ ? pixel * data_stride_ : channel * pixels_ + pixel;
  }
  int64_t shift_at(int64_t channel, int64_t pixel) const {
    return by_channels_ ? 2 * pixel * p_.channels : 2 * channel * pixels_ + (other_ ? pixel : 2 * pixel);
  }

  const OffsetSample2dParams& p_;
  const Grid<S>& grid_;
  const int64_t pixels_;
  const bool by_channels_;
  const bool far_;  // rows of channels are fetched ahead
  const bool turn_offset_, turn_data_;
  const int64_t data_stride_;      // from one run of channels to the next in data
  const int64_t other_;            // from dy to dx, 0 where they are pairs
  const int64_t slots_, whole_;    // points of a tile that a plane takes, and planes that fit in a tile
  const int64_t planes_, blocks_;  // planes of a block, blocks of an image
  const Buffer<S> staged_, lines_;
  const Buffer<O> offset_;
  const Buffer<T> data_;
  const Buffer<O> grad_offset_;
  const Buffer<S> sums_;
  // Of the block at hand, and how far the next one lies behind it in data that are channels_last.
  int64_t channels_ = 0, data_at_ = 0, offset_at_ = 0, next_ = 0;
  Tile<S> tile_;
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
