// How the passes of FReLU walk over images: blocks of rows in the compute type, in which a neighbour is always the same
// distance away.
//
// A vector's lanes are neighbouring pixels of a plane in NCHW and neighbouring channels of a pixel in channels_last; a
// "unit" is what one vector covers of the channels, 1 or `lanes`. In a block the rows of a unit lie one behind the
// other with `half` zero pixels between them, so the loops are the same for both layouts: the neighbour of element i at
// (dy, dx) is i + dy * pitch + dx * step.
#pragma once
#include "../cellops.h"
#include "../common/parallel.h"
#include "../common/simd.h"

namespace cellops::CELLOPS_ISA {

// What a thread works on at a time: rows [begin, end) of some units of an image.
struct FreluItem {
  int64_t image, unit, units, begin, end;
};

template <class S>
struct FreluWalk {
  static constexpr int lanes = kLanes<S>;

  // blocks: how many blocks of rows a thread holds; their rows are chosen so that they stay in the second cache.
  FreluWalk(const FreluParams& p, int64_t blocks, int threads)
      : batch(p.batch), channels(p.channels), height(p.height), width(p.width), kernel(p.kernel), half(p.kernel / 2) {
    channels_last = p.channels_last;
    step = channels_last ? lanes : 1;
    pitch = (width + half) * step;
    units = channels_last ? div_up(channels, lanes) : channels;
    padded = channels_last ? units * lanes : channels;
    // Neighbouring units share an item, so that a pixel's channels are read and written in long runs.
    group = channels_last ? min_of(units, 512 / kVectorBytes) : 1;
    const int64_t budget = (channels_last ? 512 : 64) * 1024 / (blocks * pitch * int64_t(sizeof(S)));
    while (group > 1 && (budget / group < 4 || batch * div_up(units, group) < threads)) group /= 2;
    rows = max_of(1, min_of(height, budget / group));
    groups = div_up(units, group);
    const int64_t whole = batch * groups;
    parts = whole == 0 || whole >= threads ? 1 : max_of(1, min_of(div_up(threads, whole), height / (4 * half + 4)));
    items = whole * parts;
  }

  FreluItem item(int64_t index) const {
    const int64_t part = index % parts, at = index / parts % groups, image = index / parts / groups;
    return {image, at * group, min_of(group, units - at * group), height * part / parts, height * (part + 1) / parts};
  }

  // The values of a unit's channels from an array of `padded` numbers.
  CELLOPS_INLINE Vec<S> of(const S* values, int64_t unit) const {
    return channels_last ? load(values + unit * lanes) : broadcast(values[unit]);
  }

  // Adds the lanes of a sum to those of the unit's channels.
  void add(Vec<S> sum, int64_t unit, double* totals) const {
    for (int i = 0; i < lanes; ++i) totals[channels_last ? unit * lanes + i : unit] += double(sum[i]);
  }

  int64_t batch, channels, height, width, kernel, half;
  int64_t step, pitch;           // elements from a pixel, and from a row, to the next in a block
  int64_t units, padded;         // of an image; its channels, filled up to whole vectors in channels_last
  int64_t group, rows;           // units and rows in a block
  int64_t groups, parts, items;  // groups of units, parts of rows, and all together
  bool channels_last;
};

// Rows of a group of units.
template <class S>
class FreluBlock {
 public:
  FreluBlock(const FreluWalk<S>& walk, int64_t rows)
      : pitch_(walk.pitch),
        front_(round_up(walk.half * walk.step, walk.lanes)),
        // one vector more keeps the units from falling on the same cache sets
        stride_(round_up(front_ + rows * walk.pitch + walk.half * walk.step, walk.lanes) + 3 * walk.lanes),
        memory_(walk.group * stride_) {
    if (!failed()) memory_.zero();
  }
  bool failed() const { return memory_.failed(); }
  S* at(int64_t unit, int64_t row) const { return memory_.get() + unit * stride_ + front_ + row * pitch_; }

  // Moves `count` rows from `first` on to the front.
  void keep(int64_t units, int64_t first, int64_t count) const {
    for (int64_t u = 0; u < units; ++u) {
      __builtin_memmove(at(u, 0), at(u, first), size_t(count * pitch_) * sizeof(S));
    }
  }

 private:
  int64_t pitch_, front_, stride_;
  Buffer<S> memory_;
};

// Reads rows [first, last) of an item's image into a block, from its row `to` on; rows outside the image are zero.
template <class T, class S>
inline void load_rows(const FreluWalk<S>& w, const FreluItem& item, const T* images, int64_t first, int64_t last,
                      const FreluBlock<S>& block, int64_t to) {
  constexpr int lanes = kLanes<S>;
  const int64_t pixels = w.height * w.width;
  const T* image = images + item.image * w.channels * pixels;
  for (int64_t r = first; r < last; ++r, ++to) {
    if (r < 0 || r >= w.height) {
      for (int64_t u = 0; u < item.units; ++u) __builtin_memset(block.at(u, to), 0, size_t(w.pitch) * sizeof(S));
      continue;
    }
    if (!w.channels_last) {
      const T *from = image + item.unit * pixels + r * w.width, *end = image + (item.unit + 1) * pixels;
      S* row = block.at(0, to);
      int64_t x = 0;
      for (; x < w.width && from + x + lanes <= end; x += lanes) store(row + x, load(from + x));
      for (; x < w.width; ++x) row[x] = to_compute(from[x]);
      for (x = w.width; x < w.pitch; ++x) row[x] = 0;
      continue;
    }
    const int64_t left = w.channels - item.unit * lanes, whole = min_of(item.units, left / lanes);
    const T* from = image + r * w.width * w.channels + item.unit * lanes;
    for (int64_t x = 0; x < w.width; ++x, from += w.channels) {
      for (int64_t u = 0; u < whole; ++u) store(block.at(u, to) + x * lanes, load(from + u * lanes));
      if (whole < item.units) store(block.at(whole, to) + x * lanes, load_first<S>(from + whole * lanes, left % lanes));
    }
    for (int64_t u = 0; u < item.units; ++u) {
      __builtin_memset(block.at(u, to) + w.width * lanes, 0, size_t(w.half * lanes) * sizeof(S));
    }
  }
}

// Writes rows of a block, from its row `from` on, to rows [first, last) of an item's image.
template <class T, class S>
inline void store_rows(const FreluWalk<S>& w, const FreluItem& item, const FreluBlock<S>& block, int64_t from,
                       int64_t first, int64_t last, T* images) {
  constexpr int lanes = kLanes<S>;
  const int64_t pixels = w.height * w.width;
  T* image = images + item.image * w.channels * pixels;
  for (int64_t r = first; r < last; ++r, ++from) {
    if (!w.channels_last) {
      // What a row's last vector writes too much is the start of the row to come.
      T *to = image + item.unit * pixels + r * w.width, *end = image + item.unit * pixels + last * w.width;
      const S* row = block.at(0, from);
      int64_t x = 0;
      for (; x < w.width && to + x + lanes <= end; x += lanes) store(to + x, load(row + x));
      for (; x < w.width; ++x) from_compute(to + x, row[x]);
      continue;
    }
    const int64_t left = w.channels - item.unit * lanes, whole = min_of(item.units, left / lanes);
    T* to = image + r * w.width * w.channels + item.unit * lanes;
    for (int64_t x = 0; x < w.width; ++x, to += w.channels) {
      for (int64_t u = 0; u < whole; ++u) store(to + u * lanes, load(block.at(u, from) + x * lanes));
      if (whole < item.units) store_first(to + whole * lanes, load(block.at(whole, from) + x * lanes), left % lanes);
    }
  }
}

// Rows [begin - border, begin + rows + border) of an item's image in a block; all but the first call keep what the one
// before has read of them.
template <class T, class S>
inline void load_window(const FreluWalk<S>& w, const FreluItem& item, const T* images, int64_t begin, int64_t rows,
                        int64_t border, const FreluBlock<S>& block) {
  const int64_t kept = begin == item.begin ? 0 : 2 * border;
  if (kept) block.keep(item.units, w.rows, kept);
  load_rows(w, item, images, begin - border + kept, begin + rows + border, block, kept);
}

// The weights of a unit, tap by tap. Kernel is 0 where the compiler does not know the size; they lie in scratch then.
template <int Kernel, class S>
struct FreluTaps {
  FreluTaps(const FreluWalk<S>& w, const S* weights, int64_t unit, bool flipped, S*) {
    for (int t = 0; t < count; ++t) value[t] = w.of(weights + (flipped ? count - 1 - t : t) * w.padded, unit);
  }
  CELLOPS_INLINE Vec<S> at(int64_t tap) const { return value[tap]; }
  static constexpr int count = Kernel * Kernel;
  Vec<S> value[count];
};
template <class S>
struct FreluTaps<0, S> {
  FreluTaps(const FreluWalk<S>& w, const S* weights, int64_t unit, bool flipped, S* scratch) : from(scratch) {
    const int64_t count = w.kernel * w.kernel;
    for (int64_t t = 0; t < count; ++t) {
      store(scratch + t * w.lanes, w.of(weights + (flipped ? count - 1 - t : t) * w.padded, unit));
    }
  }
  CELLOPS_INLINE Vec<S> at(int64_t tap) const { return load(from + tap * kLanes<S>); }
  const S* from;
};

// Calls body(element, only) for the vectors that cover rows of a block; `only(vector)` has zeros in the lanes that are
// not of these rows. Where `exact` is not set the zeros between the rows count as theirs, which leaves fewer vectors.
struct EveryLane {
  template <class V>
  CELLOPS_INLINE V operator()(V value) const {
    return value;
  }
};
template <class S>
struct FirstLanes {
  VecInt<S> inside;
  CELLOPS_INLINE Vec<S> operator()(Vec<S> value) const { return inside ? value : Vec<S>{}; }
};

template <class S, class Body>
CELLOPS_INLINE void for_rows(const FreluWalk<S>& w, int64_t rows, bool exact, const Body& body) {
  constexpr int lanes = kLanes<S>;
  if (w.channels_last) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = r * w.pitch; i < r * w.pitch + w.width * lanes; i += lanes) body(i, EveryLane{});
    }
    return;
  }
  VecInt<S> index;
  for (int i = 0; i < lanes; ++i) index[i] = i;
  const int64_t runs = exact ? rows : 1, length = exact ? w.width : rows * w.pitch;
  for (int64_t r = 0; r < runs; ++r) {
    int64_t i = 0;
    for (; i + lanes <= length; i += lanes) body(r * w.pitch + i, EveryLane{});
    if (i < length) body(r * w.pitch + i, FirstLanes<S>{index < typename IntOf<S>::type(length - i)});
  }
}

// The convolution at the elements whose window begins at `corner`.
template <int Kernel, class S>
CELLOPS_INLINE Vec<S> convolve(const FreluWalk<S>& w, const FreluTaps<Kernel, S>& taps, const S* corner) {
  const int64_t size = Kernel ? Kernel : w.kernel;
  Vec<S> sum = {};
#pragma GCC unroll 3
  for (int64_t i = 0; i < size; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < size; ++j) sum += load(corner + i * w.pitch + j * w.step) * taps.at(i * size + j);
  }
  return sum;
}

// Weights [C, 1, k, k] as [k * k][padded].
template <class T, class S>
inline void unpack_weights(const FreluWalk<S>& w, const T* weight, S* to) {
  const int64_t count = w.kernel * w.kernel;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t c = 0; c < w.padded; ++c) {
      to[t * w.padded + c] = c < w.channels ? to_compute(weight[c * count + t]) : S(0);
    }
  }
}

// Numbers of channels [C] as [padded]; `absent` stands for a null pointer.
template <class S>
inline void unpack_channels(const FreluWalk<S>& w, const void* values, S absent, S* to) {
  for (int64_t c = 0; c < w.padded; ++c) {
    to[c] = c >= w.channels ? S(0) : values ? static_cast<const S*>(values)[c] : absent;
  }
}

inline int frelu_threads(const FreluParams& p, int threads) {
  const int64_t most = p.batch * p.channels * p.height * p.width * p.kernel * p.kernel / 65536;
  return most < 1 ? 1 : int(min_of(most, threads));
}

}  // namespace cellops::CELLOPS_ISA
