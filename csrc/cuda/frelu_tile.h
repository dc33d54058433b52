// FReLU's tiles in shared memory: where they lie, how they are loaded, and the window that moves down their columns.
#pragma once
#include "block.h"

namespace cellops::CELLOPS_ISA {

inline constexpr int kFreluThreads = 128, kFreluSegment = 8;
inline constexpr int64_t kSharedBytes = 48 << 10;  // what every device has without being asked

struct FreluView {
  uint32_t images, channels, height, width;
  int kernel, half, channel_block, rows, columns, parts;
  uint32_t channel_blocks, tiles_y, tiles_x;
  bool channels_last, packed;

  CELLOPS_BODY uint64_t tiles() const { return uint64_t(images) * tiles_y * tiles_x; }
  CELLOPS_BODY uint64_t element(uint32_t channel, uint32_t row, uint32_t column) const {
    return channels_last ? (uint64_t(row) * width + column) * channels + channel
                         : (uint64_t(channel) * height + row) * width + column;
  }
};

// The place of a tile: its image's first element, and its first row, column and channel.
struct FreluPlace {
  uint64_t image;
  uint32_t row, column, channel;
};

CELLOPS_BODY FreluPlace place_of(const FreluView& view, uint32_t tile, uint32_t channel_block) {
  const uint32_t x = tile % view.tiles_x, y = tile / view.tiles_x % view.tiles_y;
  const uint64_t image = tile / view.tiles_x / view.tiles_y;
  return {image * view.channels * view.height * view.width, y * view.rows, x * view.columns,
          channel_block * view.channel_block};
}

// A tile in shared memory with `halo` rows and columns around it: element (channel, row, column) from the halo's
// corner.
struct FreluGrid {
  int channel, row, column;  // strides
  int first;                 // of the halo's corner
  int size;

  // `pack`: columns of the tile itself begin at a multiple of it.
  CELLOPS_HD FreluGrid(const FreluView& view, int halo, int pack) {
    const int height = view.rows + 2 * halo, width = view.columns + 2 * halo;
    if (view.channels_last) {
      channel = 1, column = view.channel_block, row = width * column, first = 0, size = height * row;
    } else {
      const int before = (halo + pack - 1) / pack * pack;
      column = 1, row = (before + view.columns + halo + pack - 1) / pack * pack, channel = height * row;
      first = before - halo, size = view.channel_block * channel;
    }
  }
  CELLOPS_HD int at(int c, int r, int x) const { return first + c * channel + r * row + x * column; }
};

// What a thread works on: one channel of the block, and items, which are columns of a segment of rows.
struct FreluThread {
  int channel, item, step;
  CELLOPS_BODY FreluThread(const FreluView& view, int thread) : step(kFreluThreads / view.channel_block) {
    channel = view.channels_last ? thread % view.channel_block : thread / step;
    item = view.channels_last ? thread / view.channel_block : thread % step;
  }
  // The thread that begins at an item of a channel.
  static CELLOPS_BODY int of(const FreluView& view, int channel, int item) {
    return view.channels_last ? item * view.channel_block + channel
                              : channel * (kFreluThreads / view.channel_block) + item;
  }
};

// What a block that sums up works on, a block of channels in a part of the tiles, and the channel of one of its
// threads; one that is beyond the last reads from channel 0 and writes nothing.
struct FreluPart {
  uint32_t channel_block, part, channel;
  FreluThread own;
  bool exists;
  CELLOPS_BODY FreluPart(const FreluView& view, uint32_t block, int thread)
      : channel_block(block % view.channel_blocks), part(block / view.channel_blocks), own(view, thread) {
    channel = channel_block * view.channel_block + own.channel;
    exists = channel < view.channels;
    if (!exists) channel = 0;
  }
};

template <class T, class Block>
CELLOPS_BODY void load_tile(const Block& block, const FreluView& view, const FreluPlace& place, const T* input,
                            int halo, const FreluGrid& grid, T* tile) {
  const T* image = input + place.image;
  const int height = view.rows + 2 * halo, width = view.columns + 2 * halo;
  const auto inside = [&](int channel, int64_t row, int64_t column) {
    return row >= 0 && row < int64_t(view.height) && column >= 0 && column < int64_t(view.width) &&
           place.channel + channel < view.channels;
  };
  const auto load_one = [&](int c, int r, int x) {
    const int64_t row = int64_t(place.row) + r - halo, column = int64_t(place.column) + x - halo;
    tile[grid.at(c, r, x)] =
        inside(c, row, column) ? image[view.element(place.channel + c, uint32_t(row), uint32_t(column))] : T{};
  };
  const auto load_pack = [&](int c, int r, int x) {
    const int64_t row = int64_t(place.row) + r - halo, column = int64_t(place.column) + x - halo;
    Words words{};
    if (inside(c, row, column)) {
      words = *reinterpret_cast<const Words*>(image + view.element(place.channel + c, uint32_t(row), uint32_t(column)));
    }
    *reinterpret_cast<Words*>(tile + grid.at(c, r, x)) = words;
  };
  constexpr int pack = kPack<T>;
  if (view.channels_last) {
    const int packs = view.packed ? view.channel_block / pack : view.channel_block;
    for (int i = block.thread(); i < height * width * packs; i += kFreluThreads) {
      const int pixel = i / packs, c = i % packs;
      if (view.packed) {
        load_pack(c * pack, pixel / width, pixel % width);
      } else {
        load_one(c, pixel / width, pixel % width);
      }
    }
    return;
  }
  if (view.packed) {
    const int packs = view.columns / pack;
    for (int i = block.thread(); i < view.channel_block * height * packs; i += kFreluThreads) {
      load_pack(i / packs / height, i / packs % height, halo + i % packs * pack);
    }
  }
  const int left = view.packed ? 2 * halo : width;  // columns yet to be loaded: those of the halo, or all
  for (int i = block.thread(); i < view.channel_block * height * left; i += kFreluThreads) {
    const int x = i % left, r = i / left % height;
    load_one(i / left / height, r, view.packed && x >= halo ? view.columns + x : x);
  }
}

// Calls work(place) for each tile of a part, with that tile in shared memory.
template <class T, class Block, class Work>
CELLOPS_BODY void each_tile(const Block& block, const FreluView& view, const FreluPart& part, const T* input, int halo,
                            const FreluGrid& grid, T* tile, const Work& work) {
  for (uint32_t index = part.part; index < view.tiles(); index += view.parts) {
    const FreluPlace place = place_of(view, index, part.channel_block);
    block.sync();
    load_tile(block, view, place, input, halo, grid, tile);
    block.sync();
    work(place);
  }
}

// Calls work(row, column, count) for a thread's share of rows x columns results: `count` down a column from that row.
template <class Work>
CELLOPS_BODY void each_segment(const FreluThread& own, int rows, int columns, const Work& work) {
  for (int item = own.item; item < columns * ((rows + kFreluSegment - 1) / kFreluSegment); item += own.step) {
    const int column = item % columns, row = item / columns * kFreluSegment;
    work(row, column, rows - row < kFreluSegment ? rows - row : kFreluSegment);
  }
}

// The same for a tile's results that lie in the image.
template <class Work>
CELLOPS_BODY void each_segment_inside(const FreluView& view, const FreluPlace& place, const FreluThread& own,
                                      const Work& work) {
  each_segment(own, view.rows, view.columns, [&](int row, int column, int count) {
    if (place.column + column >= view.width || place.row + row >= view.height) return;
    const uint32_t left = view.height - place.row - row;
    work(row, column, left < uint32_t(count) ? int(left) : count);
  });
}

// The Kernel x Kernel numbers around a result; Kernel is 0 for any other size.
template <int Kernel, class T>
struct FreluWindow {
  float value[Kernel ? Kernel : 1][Kernel ? Kernel : 1];
  const T* corner;
  int row, column, kernel;

  CELLOPS_BODY float at(int i, int j) const {
    return Kernel ? value[Kernel ? i : 0][Kernel ? j : 0] : to_compute(corner[i * row + j * column]);
  }
  CELLOPS_BODY float middle() const { return at(kernel / 2, kernel / 2); }
  // sum of weights[t] * number t, or of weights[last - t] for the transposed convolution
  template <bool Flipped, class W>
  CELLOPS_BODY float convolve(const W* weights) const {
    float sum = 0;
    if constexpr (Kernel > 0) {
      CELLOPS_UNROLL
      for (int t = 0; t < Kernel * Kernel; ++t) {
        sum += to_compute(weights[Flipped ? Kernel * Kernel - 1 - t : t]) * value[t / Kernel][t % Kernel];
      }
    } else {
      for (int t = 0; t < kernel * kernel; ++t) {
        sum += to_compute(weights[Flipped ? kernel * kernel - 1 - t : t]) * at(t / kernel, t % kernel);
      }
    }
    return sum;
  }
};

// Calls work(i, window) for results i = 0 .. count - 1 down a column, `corner` being the first one's upper left.
template <int Kernel, class T, class Work>
CELLOPS_BODY void walk_down(const T* corner, const FreluGrid& grid, int kernel, int count, const Work& work) {
  FreluWindow<Kernel, T> window;
  window.kernel = Kernel ? Kernel : kernel;
  window.row = grid.row, window.column = grid.column;
  if constexpr (Kernel > 0) {
    CELLOPS_UNROLL
    for (int i = 1; i < Kernel; ++i) {
      CELLOPS_UNROLL
      for (int j = 0; j < Kernel; ++j) window.value[i][j] = to_compute(corner[(i - 1) * grid.row + j * grid.column]);
    }
  }
  for (int r = 0; r < count; ++r) {
    window.corner = corner + r * grid.row;
    if constexpr (Kernel > 0) {
      CELLOPS_UNROLL
      for (int j = 0; j < Kernel; ++j) {
        CELLOPS_UNROLL
        for (int i = 0; i + 1 < Kernel; ++i) window.value[i][j] = window.value[i + 1][j];
        window.value[Kernel - 1][j] = to_compute(window.corner[(Kernel - 1) * grid.row + j * grid.column]);
      }
    }
    work(r, window);
  }
}

// The taps of a channel: in registers for a known size, else where they are.
template <int Kernel, class T>
struct FreluTaps {
  float value[Kernel ? Kernel * Kernel : 1];
  const T* weights;
  CELLOPS_BODY FreluTaps(const FreluView& view, const T* weight, uint32_t channel) {
    weights = weight + uint64_t(channel) * view.kernel * view.kernel;
    CELLOPS_UNROLL
    for (int t = 0; t < Kernel * Kernel; ++t) value[t] = to_compute(weights[t]);
  }
  template <bool Flipped, class U>
  CELLOPS_BODY float convolve(const FreluWindow<Kernel, U>& window) const {
    if constexpr (Kernel > 0) return window.template convolve<Flipped>(value);
    return window.template convolve<Flipped>(weights);
  }
};

CELLOPS_BODY float channel_value(const float* values, uint32_t channel, float absent) {
  return values ? values[channel] : absent;
}

// The gradients of max(x, other): halves where both are equal, all of it to both where one is NaN.
CELLOPS_BODY float gradient_of_first(float grad, float x, float other) {
  return x < other ? 0.f : x == other ? grad * 0.5f : grad;
}

}  // namespace cellops::CELLOPS_ISA
