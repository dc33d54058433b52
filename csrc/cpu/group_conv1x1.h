// What forward and backward of the grouped 1x1 convolution share: the batch in tiles.
//
// Every pixel of every image has a position, counted through. A tile is some neighbouring positions of some channels,
// one row of numbers (of the compute type) for each channel. Lanes are positions, so no size of a group wastes any; the
// two memory formats differ in how a tile is read and written, and in how many channels it is worth reading at once.
#pragma once
#include "../cellops.h"
#include "../common/activation.h"
#include "../common/gemm.h"
#include "../common/layout.h"
#include "../common/parallel.h"

namespace cellops::CELLOPS_ISA {

// The channels on one side of the convolution; those of group i are first(i), first(i) + step, ...
struct Channels {
  int64_t count, of_group, step;
  int64_t first(int64_t group) const { return step == 1 ? group * of_group : group; }
};

// The batch as tiles and the tiles as units of work, each for one thread.
struct Tiling {
  Tiling(const GroupConv1x1Params& p, int64_t bytes_of_number, int most_threads)
      : groups(p.groups),
        pixels(p.pixels),
        positions(p.batch * p.pixels),
        in{p.in_channels, p.in_channels / p.groups, 1},
        out{p.out_channels, p.out_channels / p.groups, p.shuffle ? p.groups : 1},
        by_position(p.channels_last || p.pixels == 1) {
    constexpr int64_t kStep = 48;                    // whole panels of multiply_tile, of every vector width
    constexpr int64_t kMost = 240, kBytes = 196608;  // a tile of input and one of output: they stay in the second cache
    rows_in = by_position ? in.count : in.of_group;
    rows_out = by_position ? out.count : out.of_group;
    tile = kBytes / ((rows_in + rows_out) * bytes_of_number) / kStep * kStep;
    tile = max_of(kStep, min_of(min_of(tile, kMost), round_up(positions, kStep)));
    stride = tile + 16;  // so that rows do not meet in one set of the first cache
    const int64_t work = positions * max_of(max_of(in.count, out.count), out.count * in.of_group / 16);
    threads = int(max_of(1, min_of(work / 16384, most_threads)));
    // All groups of a tile, where they share its cache lines; else so many tiles of a group that threads have 8 units.
    unit_groups = by_position ? groups : 1;
    const int64_t tiles = div_up(positions, tile) * (groups / unit_groups);
    unit_positions = by_position ? tile : tile * max_of(1, min_of(16, tiles / (8 * threads)));
    units = div_up(positions, unit_positions) * (groups / unit_groups);
  }

  // Calls body(group, position, count) for every tile of the member's units; its groups are unit_groups from `group`
  // on.
  template <class Body>
  void for_tiles(const Team& team, const Body& body) const {
    const int64_t parts = groups / unit_groups;
    int64_t begin, end;
    team.share(units, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / parts * unit_positions, last = min_of(first + unit_positions, positions);
      for (int64_t q = first; q < last; q += tile) body(unit % parts, q, min_of(tile, last - q));
    }
  }

  // Where the rows of a group begin in a tile, and how far they lie apart.
  int64_t row_of(const Channels& side, int64_t group) const { return by_position ? side.first(group) * stride : 0; }
  int64_t row_step(const Channels& side) const { return by_position ? side.step * stride : stride; }

  const int64_t groups, pixels, positions;
  const Channels in, out;
  const bool by_position;     // memory is [positions][channels]
  int64_t rows_in, rows_out;  // of a tile
  int64_t tile, stride;       // positions in a tile, and from one of its rows to the next
  int threads;
  int64_t unit_groups, unit_positions, units;
};

// Positions by position: from 16 rows of memory, which half types pass in the compute type.
inline constexpr int64_t kRowsAtOnce = 16;
template <class T>
inline int64_t staging_size(const Tiling& t) {
  return sizeof(T) == 2 ? kRowsAtOnce * max_of(t.in.count, t.out.count) : 0;
}

// The parts of a tile that lie in one image each: body(image, pixel, offset in the tile, length).
template <class Body>
inline void for_images_of_tile(int64_t pixels, int64_t position, int64_t count, const Body& body) {
  for (int64_t offset = 0; offset < count;) {
    const int64_t image = (position + offset) / pixels, pixel = (position + offset) % pixels;
    const int64_t length = min_of(count - offset, pixels - pixel);
    body(image, pixel, offset, length);
    offset += length;
  }
}

// Reads a tile from a tensor; fills it with zeros up to whole vectors.
template <class T, class S>
inline void load_tile(const Tiling& t, const Channels& side, const T* tensor, int64_t group, int64_t position,
                      int64_t count, S* tile, S* staging) {
  const int64_t rows = t.by_position ? side.count : side.of_group;
  if (t.by_position) {
    for (int64_t i = 0; i < count; i += kRowsAtOnce) {
      const int64_t some = min_of(kRowsAtOnce, count - i);
      const T* from = tensor + (position + i) * side.count;
      if constexpr (sizeof(T) == 2) {
        convert_row(some * side.count, from, staging);
        transpose(some, side.count, staging, side.count, tile + i, t.stride);
      } else {
        transpose(some, side.count, from, side.count, tile + i, t.stride);
      }
    }
  } else {
    for_images_of_tile(t.pixels, position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
      const T* from = tensor + (image * side.count + side.first(group)) * t.pixels + pixel;
      for (int64_t j = 0; j < rows; ++j) {
        convert_row(length, from + j * side.step * t.pixels, tile + j * t.stride + offset);
      }
    });
  }
  const int64_t whole = round_up(count, kLanes<S>);
  if (count == whole) return;
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t i = count; i < whole; ++i) tile[j * t.stride + i] = 0;
  }
}

// Writes a tile to a tensor.
template <class T, class S>
inline void store_tile(const Tiling& t, const Channels& side, const S* tile, int64_t group, int64_t position,
                       int64_t count, T* tensor, S* staging) {
  if (t.by_position) {
    for (int64_t i = 0; i < count; i += kRowsAtOnce) {
      const int64_t some = min_of(kRowsAtOnce, count - i);
      T* to = tensor + (position + i) * side.count;
      if constexpr (sizeof(T) == 2) {
        transpose(side.count, some, tile + i, t.stride, staging, side.count);
        convert_row(some * side.count, staging, to);
      } else {
        transpose(side.count, some, tile + i, t.stride, to, side.count);
      }
    }
    return;
  }
  for_images_of_tile(t.pixels, position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
    T* to = tensor + (image * side.count + side.first(group)) * t.pixels + pixel;
    for (int64_t j = 0; j < side.of_group; ++j) {
      convert_row(length, tile + j * t.stride + offset, to + j * side.step * t.pixels);
    }
  });
}

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

// Zero in the lanes from `count` on.
template <class S>
CELLOPS_INLINE Vec<S> keep_first(Vec<S> value, int64_t count) {
  for (int i = 0; i < kLanes<S>; ++i) value[i] = i < count ? value[i] : S(0);
  return value;
}

}  // namespace cellops::CELLOPS_ISA
