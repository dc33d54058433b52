// Depthwise convolutions and what follows them: how their passes walk over images, in blocks of rows in the compute
// type, in which a neighbour is always the same distance away.
//
// A vector's lanes are neighbouring pixels of a plane in NCHW and neighbouring channels of a pixel in channels_last,
// and in NCHW too where rows are short: planes are turned around on their way into a block then. A "unit" is what one
// vector covers of the channels, 1 or `lanes`. In a block the rows of a unit lie one behind the other with at least
// `half` zero pixels between them, so that the loops are the same for all: the neighbour at (dy, dx) of element i is
// i + dy * pitch + dx * step.
//
// While a block is worked on the next one is fetched into the second cache, a line for each vector: what is read and
// what is computed takes about the same time, and the processor does not look that far ahead by itself.
#pragma once
#include "../cellops.h"
#include "../common/activation.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/stream.h"

namespace cellops::CELLOPS_ISA {

// What follows the convolution and its affine map z: the funnel's maximum of x and z.
struct Funnel {
  explicit Funnel(const FreluParams&) {}
  static constexpr bool kDirect = true;  // x has a part of the gradient that does not pass the convolution
  template <class S>
  CELLOPS_INLINE Vec<S> value(Vec<S> x, Vec<S> z) const {
    return x > z ? x : z;
  }
  // What of the gradient goes to z: equals share it, what is NaN passes all.
  template <class S>
  CELLOPS_INLINE Vec<S> through(Vec<S> grad, Vec<S> x, Vec<S> z) const {
    return x > z ? Vec<S>{} : x == z ? grad * S(0.5) : grad;
  }
};

// Or an activation of z. Which one is asked for each vector: a branch that is always foreseen costs two of a vector's
// thirty cycles and more, and loops for each activation would cost minutes to compile.
struct Activated {
  explicit Activated(const DepthwiseConv2dParams& p) : activation(p.activation) {}
  static constexpr bool kDirect = false;
  template <class S>
  CELLOPS_INLINE Vec<S> value(Vec<S>, Vec<S> z) const {
    if (activation == Activation::none) return z;
    Vec<S> y{};
    with_activation(activation, [&](auto tag) CELLOPS_INLINE_LAMBDA { y = activate<tag.value, S>(z); });
    return y;
  }
  template <class S>
  CELLOPS_INLINE Vec<S> through(Vec<S> grad, Vec<S>, Vec<S> z) const {
    if (activation == Activation::none) return grad;
    Vec<S> slope{};
    with_activation(activation, [&](auto tag) CELLOPS_INLINE_LAMBDA { slope = activation_slope<tag.value, S>(z); });
    return grad * slope;
  }
  Activation activation;
};

template <class Params>
struct EndingOf;
template <>
struct EndingOf<FreluParams> {
  using type = Funnel;
};
template <>
struct EndingOf<DepthwiseConv2dParams> {
  using type = Activated;
};
template <class Params>
using Ending = typename EndingOf<Params>::type;

// Calls work(size) with the size of the window as a constant, 0 for any: 3x3 in float32 has loops of its own.
template <int Size>
struct WindowTag {
  static constexpr int value = Size;
};
template <class S, class Work>
bool with_window(int64_t kernel, const Work& work) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (kernel == 3) return work(WindowTag<3>());
  }
  return work(WindowTag<0>());
}

// Whether the planes of an NCHW image are turned around in blocks: where rows are so short that they leave lanes empty,
// and with them most planes so small that what is done once for each weighs; and channels fill three quarters of their
// vectors. With vectors of 16, rows of 28 gain in training what they lose in evaluation, a tenth.
template <class S, class Params>
bool turns_planes(const Params& p) {
  constexpr int64_t widest = kVectorBytes == 64 ? 24 : 28;
  return sizeof(S) == sizeof(float) && !p.channels_last && p.width <= widest &&
         4 * p.channels >= 3 * round_up(p.channels, kLanes<S>);
}

// What a thread works on at a time: rows [begin, end) of some units of an image.
struct DepthwiseItem {
  int64_t image, unit, units, begin, end;
};

template <class S>
struct DepthwiseWalk {
  static constexpr int lanes = kLanes<S>;

  // blocks: how many blocks of rows a thread holds; their rows are chosen so that they stay in the second cache.
  template <class Params>
  DepthwiseWalk(const Params& p, int64_t blocks, int threads)
      : batch(p.batch), channels(p.channels), height(p.height), width(p.width), kernel(p.kernel), half(p.kernel / 2) {
    channels_last = p.channels_last;
    turned = turns_planes<S>(p);
    by_channel = channels_last || turned;
    step = by_channel ? lanes : 1;
    // Rows much shorter than a vector are worked on as one long row; else each begins with a vector of its own.
    flat = !by_channel && width <= lanes / 2;
    pitch = by_channel || flat ? (width + half) * step : max_of(width + half, round_up(width, lanes));
    result_pitch = by_channel || flat ? pitch : width;
    units = by_channel ? div_up(channels, lanes) : channels;
    padded = by_channel ? units * lanes : channels;
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

  DepthwiseItem item(int64_t index) const {
    const int64_t part = index % parts, at = index / parts % groups, image = index / parts / groups;
    return {image, at * group, min_of(group, units - at * group), height * part / parts, height * (part + 1) / parts};
  }

  // Whether the caches are to be passed by where these images are written.
  template <class T>
  bool streams(const T* images) const {
    const int64_t row = channels_last ? channels : kLine;
    return !turned && cellops::CELLOPS_ISA::streams(images, row, bytes(sizeof(T)));
  }
  // Of an input and an output.
  int64_t bytes(int64_t element) const { return 2 * batch * channels * height * width * element; }

  // The values of a unit's channels from an array of `padded` numbers.
  CELLOPS_INLINE Vec<S> of(const S* values, int64_t unit) const {
    return by_channel ? load(values + unit * lanes) : broadcast(values[unit]);
  }

  // Adds the lanes of a sum to those of the unit's channels.
  void add(Vec<S> sum, int64_t unit, double* totals) const {
    for (int i = 0; i < lanes; ++i) totals[by_channel ? unit * lanes + i : unit] += double(sum[i]);
  }

  int64_t batch, channels, height, width, kernel, half;
  int64_t step, pitch;           // elements from a pixel, and from a row, to the next in a block
  int64_t result_pitch;          // from a row to the next in a block of results: planes' touch, as in the image
  int64_t units, padded;         // of an image; its channels, filled up to whole units
  int64_t group, rows;           // units and rows in a block
  int64_t groups, parts, items;  // groups of units, parts of rows, and all together
  bool channels_last, turned;    // where the images' channels lie; whether planes are turned around in a block
  bool by_channel, flat;         // whether a vector's lanes are channels; rows that are one long row
};

// The lanes below `count` of a vector.
template <class S>
struct FirstLanes {
  explicit FirstLanes(int64_t count) : count(count) {}
  CELLOPS_INLINE Vec<S> operator()(Vec<S> value) const { return keep_first<S>(value, count); }
  CELLOPS_INLINE Vec<S> get(const S* from) const { return load_first<S>(from, count); }
  CELLOPS_INLINE void put(S* to, Vec<S> value) const { store_first(to, value, count); }
  int64_t count;
};
struct EveryLane {
  template <class V>
  CELLOPS_INLINE V operator()(V value) const {
    return value;
  }
  template <class S>
  CELLOPS_INLINE Vec<S> get(const S* from) const {
    return load(from);
  }
  template <class S, class V>
  CELLOPS_INLINE void put(S* to, V value) const {
    store(to, value);
  }
};

// The weights of a unit, tap by tap. Kernel is 0 where the compiler does not know the size; they lie in scratch then.
//
// What is stored might be these weights, or a DepthwiseAhead, as far as the compiler sees, and would be read again for
// every vector. So loops over windows have copies of both that are theirs alone, and copy a DepthwiseAhead back.
template <int Kernel, class S>
struct DepthwiseTaps {
  DepthwiseTaps(const DepthwiseWalk<S>& w, const S* weights, int64_t unit, bool flipped, S*) {
    for (int t = 0; t < count; ++t) value[t] = w.of(weights + (flipped ? count - 1 - t : t) * w.padded, unit);
  }
  CELLOPS_INLINE Vec<S> at(int64_t tap) const { return value[tap]; }
  static constexpr int count = Kernel * Kernel;
  Vec<S> value[count];
};
template <class S>
struct DepthwiseTaps<0, S> {
  DepthwiseTaps(const DepthwiseWalk<S>& w, const S* weights, int64_t unit, bool flipped, S* scratch) : from(scratch) {
    const int64_t count = w.kernel * w.kernel;
    for (int64_t t = 0; t < count; ++t) {
      store(scratch + t * w.lanes, w.of(weights + (flipped ? count - 1 - t : t) * w.padded, unit));
    }
  }
  CELLOPS_INLINE Vec<S> at(int64_t tap) const { return load(from + tap * kLanes<S>); }
  const S* from;
};

// Rows that a loop over 3x3 windows works on at once: as many as 32 or 16 registers hold sums of beside the weights.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRowsAtOnce = 4;
#else
inline constexpr int kRowsAtOnce = 2;
#endif

// How many rows of a block, one below the other, a loop's body works on at once: their windows overlap, so fewer values
// are loaded for each.
template <int Count, int Step>
struct Rows {
  static constexpr int count = Count;
  static constexpr int step = Step;  // elements from a pixel to the next
};

template <int Most, int Step, class S, class Body>
CELLOPS_INLINE void for_rows_of(const DepthwiseWalk<S>& w, int64_t rows, const Body& body, int64_t r = 0) {
  constexpr int lanes = kLanes<S>;
  const int64_t length = w.width * Step, whole = length / lanes * lanes;
  const FirstLanes<S> rest(length - whole);
  const auto on_rows = [&](int64_t r, auto block) CELLOPS_INLINE_LAMBDA {
    const int64_t row = r * w.pitch, result = r * w.result_pitch;
    for (int64_t i = 0; i < whole; i += lanes) body(row + i, result + i, EveryLane{}, block);
    if (Step == 1 && whole < length) body(row + whole, result + whole, rest, block);
  };
  for (; r + Most <= rows; r += Most) on_rows(r, Rows<Most, Step>{});
  if constexpr (Most > 1) for_rows_of<Most / 2, Step>(w, rows, body, r);
}

// Calls body(element, result, only, Rows) for the vectors that cover rows of a block, on `Most` rows at once, on half
// as many where fewer are left; `result` is the element's place in a block of results, `only(vector)` has zeros in the
// lanes that are not of these rows. With `flat` the rows are one long row, and the zeros between them part of it.
template <int Most, class S, class Body>
CELLOPS_INLINE void for_rows(const DepthwiseWalk<S>& w, int64_t rows, bool flat, const Body& body) {
  if (w.by_channel) {
    for_rows_of<Most, kLanes<S>>(w, rows, body);
  } else if (!flat) {
    for_rows_of<Most, 1>(w, rows, body);
  } else {
    constexpr int lanes = kLanes<S>;
    const int64_t length = rows * w.pitch;
    int64_t i = 0;
    for (; i + lanes <= length; i += lanes) body(i, i, EveryLane{}, Rows<1, 1>{});
    if (i < length) body(i, i, FirstLanes<S>(length - i), Rows<1, 1>{});
  }
}

// The convolution at the elements whose windows begin at `corner`, on `Count` rows, and the elements themselves.
template <int Kernel, int Count, int Step, class S>
CELLOPS_INLINE void convolve(int64_t kernel, int64_t pitch, const DepthwiseTaps<Kernel, S>& taps, const S* corner,
                             Rows<Count, Step>, Vec<S>* sums, Vec<S>* centres) {
  const int64_t size = Kernel ? Kernel : kernel, half = size / 2;
#pragma GCC unroll 4
  for (int r = 0; r < Count; ++r) sums[r] = Vec<S>{};
#pragma GCC unroll 6
  for (int64_t i = 0; i < size + Count - 1; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < size; ++j) {
      Vec<S> value = load(corner + i * pitch + j * Step);
      // Loaded once for all rows: as operands in memory of their products most would cross a line each time.
      if constexpr (Kernel > 0 && Count > 1) keep_in_register<S>(value);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        if (i >= r && i - r < size) sums[r] += value * taps.at((i - r) * size + j);
        if (Kernel > 0 && i - r == half && j == half) centres[r] = value;
      }
    }
  }
  for (int r = 0; Kernel == 0 && r < Count; ++r) centres[r] = load(corner + (half + r) * pitch + half * Step);
}

// Calls body(element, result, only, convolved, value) for the vectors that cover rows of a block at `x`: as for_rows,
// with the convolution and the elements themselves.
template <int Kernel, class S, class Body>
CELLOPS_INLINE void for_windows(const DepthwiseWalk<S>& w, int64_t rows, bool flat,
                                const DepthwiseTaps<Kernel, S>& given_taps, const S* x, const Body& body) {
  const DepthwiseTaps<Kernel, S> taps = given_taps;
  const int64_t pitch = w.pitch, result_pitch = w.result_pitch;
  const S* corner = x - w.half * (pitch + w.step);
  for_rows<kRowsAtOnce>(w, rows, flat, [&](int64_t at, int64_t to, const auto& only, auto block) CELLOPS_INLINE_LAMBDA {
    Vec<S> convolved[block.count], values[block.count];
    convolve<Kernel>(w.kernel, pitch, taps, corner + at, block, convolved, values);
#pragma GCC unroll 4
    for (int r = 0; r < block.count; ++r) {
      body(at + r * pitch, to + r * result_pitch, only, convolved[r], values[r]);
    }
  });
}

// Fetches what lies ahead in an image, one vector's worth a step.
class DepthwiseAhead {
 public:
  // From row `row` of an item on.
  template <class T, class S>
  DepthwiseAhead(const DepthwiseWalk<S>& w, const DepthwiseItem& item, int64_t row, const T* images)
      : step_(w.lanes * sizeof(T)) {
    const int64_t pixels = w.height * w.width, image = item.image * w.channels * pixels;
    if (w.channels_last) {
      at_ = reinterpret_cast<const char*>(images + image + row * w.width * w.channels + item.unit * w.lanes);
      run_ = item.units * step_;
      gap_ = w.channels * int64_t(sizeof(T)) - run_;
    } else {
      const int64_t channel = item.unit * (w.turned ? w.lanes : 1),
                    read = w.turned ? max_of(1, min_of(w.rows, w.height - row)) : w.height;
      at_ = reinterpret_cast<const char*>(images + image + channel * pixels + row * w.width);
      run_ = read * w.width * int64_t(sizeof(T));
      gap_ = pixels * int64_t(sizeof(T)) - run_;
    }
    end_ = at_ + run_;
  }
  CELLOPS_INLINE void fetch() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    if (at_ >= end_) at_ += gap_, end_ = at_ + run_;
  }

 private:
  const char *at_, *end_;
  int64_t step_, run_, gap_;
};

// The rows that are read after those of a block: the item's next, or the next item's first.
template <class T, class S>
inline DepthwiseAhead ahead_of(const DepthwiseWalk<S>& w, const DepthwiseItem& item, int64_t row, int64_t border,
                               int64_t next, const T* images) {
  if (row + w.rows < item.end) return DepthwiseAhead(w, item, row + w.rows + border, images);
  const DepthwiseItem other = w.item(max_of(0, min_of(next, w.items - 1)));
  return DepthwiseAhead(w, other, other.begin, images);
}

// Weights [C, 1, k, k] as [k * k][padded].
template <class T, class S>
inline void unpack_weights(const DepthwiseWalk<S>& w, const T* weight, S* to) {
  const int64_t count = w.kernel * w.kernel;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t c = 0; c < w.padded; ++c) {
      to[t * w.padded + c] = c < w.channels ? to_compute(weight[c * count + t]) : S(0);
    }
  }
}

// Numbers of channels [C] as [padded]; `absent` stands for a null pointer.
template <class S>
inline void unpack_channels(const DepthwiseWalk<S>& w, const void* values, S absent, S* to) {
  for (int64_t c = 0; c < w.padded; ++c) {
    to[c] = c >= w.channels ? S(0) : values ? static_cast<const S*>(values)[c] : absent;
  }
}

template <class Params>
int depthwise_threads(const Params& p, int threads) {
  const int64_t most = p.batch * p.channels * p.height * p.width * p.kernel * p.kernel / 65536;
  return most < 1 ? 1 : int(min_of(most, threads));
}

}  // namespace cellops::CELLOPS_ISA
