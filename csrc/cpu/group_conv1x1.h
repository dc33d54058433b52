// What the files of the grouped 1x1 convolution share: how the batch is cut, and what is done per channel.
//
// Every pixel of every image has a position, counted through. A tile is some neighbouring positions of the channels of
// one or all groups. There are two kinds: by channel (a row of positions for each channel: lanes are positions, so no
// size of a group wastes any) and by position (a row of channels for each position, as channels_last memory has them).
#pragma once
#include "../cellops.h"
#include "../common/activation.h"
#include "../common/gemm.h"
#include "../common/layout.h"
#include "../common/parallel.h"
#include "../common/stream.h"

namespace cellops::CELLOPS_ISA {

// Whether memory is [positions][channels].
inline bool lies_in_rows(const GroupConv1x1Params& p) { return p.channels_last || p.pixels == 1; }

// The channels on one side of the convolution; those of group i are first(i), first(i) + step, ...
struct Channels {
  int64_t count, of_group, step;
  int64_t first(int64_t group) const { return step == 1 ? group * of_group : group; }
};

// The batch as tiles and the tiles as units of work, each for one thread.
struct Tiling {
  // most: positions in a tile, as long as its `channels` stay in half of the second cache, and threads have some tiles.
  // all_groups: whether a tile has them all, as it should where they share cache lines.
  // whole_from: pixels from which on tiles end with their image, that planes are read and written where they lie.
  Tiling(const GroupConv1x1Params& p, int64_t most, int64_t channels, int64_t bytes_of_number, bool all_groups,
         int64_t whole_from, int most_threads)
      : groups(p.groups),
        pixels(p.pixels),
        positions(p.batch * p.pixels),
        in{p.in_channels, p.in_channels / p.groups, 1},
        out{p.out_channels, p.out_channels / p.groups, p.shuffle ? p.groups : 1},
        rows_of_memory(lies_in_rows(p)),
        unit_groups(all_groups ? groups : 1),
        run(pixels % kWhole == 0 && pixels >= whole_from ? pixels : max_of(positions, int64_t(1))) {
    constexpr int64_t kBytes = 196608;
    const int64_t work = positions * max_of(max_of(in.count, out.count), out.count * in.of_group / 16);
    threads = int(max_of(1, min_of(work / 16384, most_threads)));
    most = min_of(most, max_of(int64_t(240), positions * (groups / unit_groups) / (4 * threads)));
    tile = min_of(most, kBytes / (channels * bytes_of_number)) / kStep * kStep;
    tile = max_of(kStep, min_of(tile, round_up(run, kStep)));
    run_tiles = div_up(run, tile);
    tile = round_up(div_up(run, run_tiles), run == pixels ? kStep : kWhole);  // of one size, as there may be few
    tiles = positions / run * run_tiles;
    unit_tiles = all_groups ? 1 : max_of(1, min_of(16, tiles * groups / (8 * threads)));
    units = div_up(tiles, unit_tiles) * (groups / unit_groups);
    fetches = positions * (in.count + out.count) * bytes_of_number > kCacheBytes / 4;
  }

  // A tile: its groups are unit_groups from `group` on.
  struct Place {
    int64_t group, position, count;
  };

  // Calls body(tile, the one after it) for every tile of the member's units; the last has itself after it. Backwards,
  // a pass finds in the cache what the one before it read last.
  template <class Body>
  void for_tiles(const Team& team, bool backwards, const Body& body) const {
    int64_t begin, end;
    team.share(units, &begin, &end);
    if (begin == end) return;
    int64_t unit = backwards ? end - 1 : begin, tile = backwards ? unit_size(unit) - 1 : 0;
    for (Place now = place(unit, tile), next;; now = next) {
      bool last = false;
      if (backwards && --tile < 0) {
        last = --unit < begin;
        tile = last ? 0 : unit_size(unit) - 1;
      } else if (!backwards && ++tile == unit_size(unit)) {
        last = ++unit == end;
        tile = 0;
      }
      next = last ? now : place(unit, tile);
      body(now, next);
      if (last) return;
    }
  }

  // Whether to write a tensor of this side past the caches; the call touches `bytes`.
  template <class T>
  bool streamed(const Channels& side, const T* tensor) const {
    return streamed(side, tensor, rows_of_memory);
  }
  template <class T>
  bool streamed(const Channels& side, const T* tensor, bool in_rows) const {
    return streams(tensor, in_rows ? side.count : pixels, positions * (in.count + out.count) * int64_t(sizeof(T)));
  }

  static constexpr int64_t kStep = 48;  // positions in a panel of the product
  const int64_t groups, pixels, positions;
  const Channels in, out;
  const bool rows_of_memory;  // memory is [positions][channels]
  const int64_t unit_groups;
  const int64_t run;  // neighbouring positions that are cut into tiles: an image's, or all
  int64_t tile;       // positions
  int64_t run_tiles, tiles;
  int threads;
  int64_t unit_tiles, units;
  bool fetches;  // whether the next tile is worth asking for: in the cache it is near enough

 private:
  static constexpr int64_t kWhole = 16;  // positions in the longest vector

  int64_t first_tile(int64_t unit) const { return unit / (groups / unit_groups) * unit_tiles; }
  int64_t unit_size(int64_t unit) const { return min_of(unit_tiles, tiles - first_tile(unit)); }
  Place place(int64_t unit, int64_t tile_of_unit) const {
    const int64_t i = first_tile(unit) + tile_of_unit, at = i % run_tiles * tile;
    return {unit % (groups / unit_groups), i / run_tiles * run + at, min_of(tile, run - at)};
  }
};

// Asks for the memory of the tile after this one while this one's products run, which leave memory idle: a few lines
// for each block of a product. Into the second cache, as a tile with the next one outgrows the first.
class Ahead {
 public:
  // Begins a tile of which products of `work` multiply-adds in all are to come.
  void start(int64_t work) {
    count_ = next_ = 0, at_ = lines_ = asked_ = done_ = 0;
    work_ = work;
  }
  // `rows` pieces of `bytes` each, `step` bytes apart.
  void add(const void* first, int64_t rows, int64_t bytes, int64_t step) {
    if (work_ == 0) return;
    runs_[count_++] = {static_cast<const char*>(first), rows, div_up(bytes, kLine), step};
    lines_ += rows * div_up(bytes, kLine);
  }
  bool asks() const { return count_ > 0; }
  // Before a block of `work` multiply-adds.
  CELLOPS_INLINE void during(int64_t work) {
    if (next_ == count_) return;
    done_ += work;
    ask(int64_t(double(lines_) * double(done_) / double(work_)) - asked_);
  }

 private:
  struct Run {
    const char* row;
    int64_t rows, lines, step;
  };
  void ask(int64_t lines) {
    asked_ += lines;
    while (lines > 0 && next_ < count_) {
      Run& run = runs_[next_];
      const int64_t some = min_of(lines, run.lines - at_);
      for (int64_t i = at_; i < at_ + some; ++i) __builtin_prefetch(run.row + i * kLine, 0, 2);
      lines -= some, at_ += some;
      if (at_ < run.lines) return;
      at_ = 0, run.row += run.step;
      if (--run.rows == 0) ++next_;
    }
  }

  Run runs_[3];
  int count_ = 0, next_ = 0;
  int64_t at_ = 0;  // lines of the row that were asked for
  int64_t lines_ = 0, asked_ = 0, work_ = 1, done_ = 0;
};

// The product of A and B as multiply_blocks has it, in blocks between which the next tile is asked for.
template <class M, int Rows, int Vectors, class Finish>
CELLOPS_INLINE void multiply_ahead(Ahead& ahead, int64_t rows, int64_t columns, int64_t depth,
                                   const typename M::Unit* a, int64_t a_row, int64_t a_step, const typename M::Unit* b,
                                   int64_t b_step, const Finish& finish) {
  if (!ahead.asks()) {
    multiply_blocks<M, Rows, Vectors>(rows, columns, depth, a, a_row, a_step, b, b_step, finish);
    return;
  }
  constexpr int64_t panel = Vectors * kLanes<typename M::Sum>;
  for (int64_t n = 0; n < columns; n += panel) {
    const int64_t width = min_of(panel, columns - n);
    for (int64_t r = 0; r < rows; r += Rows) {
      const int64_t height = min_of(int64_t(Rows), rows - r);
      ahead.during(height * width * depth * M::depth);
      multiply_blocks<M, Rows, Vectors>(height, width, depth, a + r * a_row, a_row, a_step, b + n, b_step, finish, r,
                                        n);
    }
  }
}

// How the convolution lies in memory that an earlier pass kept: as rows of the output's channels or as planes.
enum class Kept { nowhere, in_rows, in_planes };

// Forward keeps the convolution where the output will be, and in its order, or apart for backward, in the order that a
// kind of tile is quickest with. That order stands behind its last number, as the input that backward gets may have
// come to lie in another memory format: what is saved passes through hooks.
template <class S>
inline void write_order(const GroupConv1x1Params& p, Kept kept, S* convolution) {
  convolution[p.batch * p.pixels * p.out_channels] = kept == Kept::in_rows ? S(1) : S(0);
}
template <class S>
inline Kept read_order(const GroupConv1x1Params& p, const S* convolution) {
  if (!convolution) return Kept::nowhere;
  return convolution[p.batch * p.pixels * p.out_channels] == S(1) ? Kept::in_rows : Kept::in_planes;
}

// What a thread's tiles are for.
struct Work {
  bool backward;
  Kept kept;
  bool finds_convolution() const { return backward && kept != Kept::nowhere; }
};

// The weight [O][C / G] in the units of a product, the block of each group on its own, as the work needs it.
template <class M>
struct Weights {
  using Unit = typename M::Unit;
  using S = typename M::Sum;
  Weights(const Tiling& t, Work work, bool by_position)
      : group_in(t.in.of_group),
        group_out(t.out.of_group),
        in_units(div_up(group_in, M::depth)),
        out_units(div_up(group_out, M::depth)),
        groups_(t.groups),
        rows_(t.out.count * in_units),
        columns_(by_position && !work.finds_convolution() ? rows_.count() : 0),
        out_rows_(M::depth > 1 && work.backward ? t.groups * out_units * group_in + kLanes<S> : 0),
        block_(out_rows_.count() ? group_out * group_in + kLanes<S> : 0) {}
  bool failed() const { return rows_.failed() || columns_.failed() || out_rows_.failed() || block_.failed(); }

  template <class T>
  void set(const T* weight) const {
    const int64_t size = group_out * group_in, units = group_out * in_units;
    for (int64_t group = 0; group < groups_; ++group, weight += size) {
      Unit* rows = rows_.get() + group * units;
      if constexpr (M::depth == 1) {
        convert_row(size, weight, rows);
      } else {
        __builtin_memset(static_cast<void*>(rows), 0, size_t(units) * sizeof(Unit));
        for (int64_t o = 0; o < group_out; ++o) {
          __builtin_memcpy(rows + o * in_units, weight + o * group_in, size_t(group_in) * sizeof(T));
        }
        if (out_rows_.count()) {  // what is written behind a row, the next one or nobody has there
          convert_row(size, weight, block_.get());
          pair_rows(group_out, group_in, block_.get(), group_in, out_rows_.get() + group * out_units * group_in,
                    group_in);
        }
      }
      if (columns_.count()) transpose(group_out, in_units, rows, in_units, columns_.get() + group * units, group_out);
    }
  }

  // [output channel][units of input channels], the same transposed, and [units of output channels][input channel].
  const Unit* of(int64_t group) const { return rows_.get() + group * group_out * in_units; }
  const Unit* transposed_of(int64_t group) const { return columns_.get() + group * group_out * in_units; }
  const Unit* backward_of(int64_t group) const {
    return M::depth > 1 ? out_rows_.get() + group * out_units * group_in : of(group);
  }

  const int64_t group_in, group_out, in_units, out_units;

 private:
  const int64_t groups_;
  const Buffer<Unit> rows_, columns_, out_rows_;
  const Buffer<S> block_;  // a group's
};

// What follows the convolution: act(scale * (convolution - centre) + shift), per output channel.
template <class S>
struct Affine {
  explicit Affine(int64_t channels) : centre(channels), scale(channels), shift(channels) {}
  bool failed() const { return centre.failed() || scale.failed() || shift.failed(); }

  // From an op's arguments, which may be null.
  void set(const void* given_scale, const void* given_shift) const {
    for (int64_t o = 0; o < centre.count(); ++o) {
      centre.get()[o] = 0;
      scale.get()[o] = given_scale ? static_cast<const S*>(given_scale)[o] : S(1);
      shift.get()[o] = given_shift ? static_cast<const S*>(given_shift)[o] : S(0);
    }
  }
  // The same of a batch normalisation, with the reciprocal of the standard deviation: channels [begin, end).
  void normalise(const void* gamma, const void* beta, const S* mean, const S* var, double eps, int64_t begin,
                 int64_t end) const {
    for (int64_t o = begin; o < end; ++o) {
      const double deviation = __builtin_sqrt(double(var[o]) + eps);
      centre.get()[o] = mean[o];
      scale.get()[o] = S((gamma ? static_cast<const S*>(gamma)[o] : S(1)) / deviation);
      shift.get()[o] = beta ? static_cast<const S*>(beta)[o] : S(0);
    }
  }

  const Buffer<S> centre, scale, shift;
};

// The gradient to the convolution z from that behind the affine step, grad' = slope * grad:
// affine.scale * grad' + of_apart * (z - affine.centre) + constant. The last two are what a normalisation by the batch
// adds: two passes, one for the sums and one to apply them. A pass that does both has no such normalisation.
template <class S>
struct Chain {
  explicit Chain(int64_t channels) : affine(channels), of_apart(channels), constant(channels) {}
  bool failed() const { return affine.failed() || of_apart.failed() || constant.failed(); }
  const Affine<S> affine;
  const Buffer<S> of_apart, constant;
};

// Sums over positions per channel: of grad' and of grad' * (z - centre).
struct Sums {
  explicit Sums(int64_t channels) : grad(channels), product(channels) {}
  bool failed() const { return grad.failed() || product.failed(); }
  void zero() const { grad.zero(), product.zero(); }
  void add(const Sums& other) const {
    for (int64_t o = 0; o < grad.count(); ++o) {
      grad.get()[o] += other.grad.get()[o];
      product.get()[o] += other.product.get()[o];
    }
  }
  const Buffer<double> grad, product;
};

// What both kinds of tile do with a vector: the same channel, or neighbouring ones, in its lanes.
template <class S>
struct AffineLanes {
  Vec<S> centre, scale, shift;
  template <Activation A>
  CELLOPS_INLINE Vec<S> activated(Vec<S> z) const {
    return activate<A, S>((z - centre) * scale + shift);
  }
};

// Whether an activation is short enough to be written out for each vector of a block in registers.
template <Activation A>
inline constexpr bool finishes_blocks = A == Activation::none || A == Activation::relu || A == Activation::relu6;

template <class S>
struct ChainLanes {
  AffineLanes<S> affine;
  Vec<S> of_apart, constant;
  // grad' from the gradient, and z - centre.
  template <Activation A>
  CELLOPS_INLINE Vec<S> through_activation(Vec<S> z, Vec<S> grad, Vec<S>* apart) const {
    *apart = z - affine.centre;
    return activation_slope<A, S>(*apart * affine.scale + affine.shift) * grad;
  }
  // The gradient to z. Without a normalisation by the batch nothing but grad' counts, not even where z is infinite.
  template <bool OfBatch>
  CELLOPS_INLINE Vec<S> through_affine(Vec<S> grad, Vec<S> apart) const {
    return OfBatch ? grad * affine.scale + (apart * of_apart + constant) : grad * affine.scale;
  }
};

}  // namespace cellops::CELLOPS_ISA
