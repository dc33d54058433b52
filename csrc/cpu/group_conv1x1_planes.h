// Tiles of planes or of rows of channels, by channel: read from memory and written to it.
#pragma once
#include "group_conv1x1.h"

namespace cellops::CELLOPS_ISA {

// Numbers between the rows of a tile: an odd number of cache lines, so that rows do not meet in the same sets of it.
template <class S>
inline int64_t row_stride(const Tiling& t) {
  constexpr int64_t line = kLine / int64_t(sizeof(S));
  return (div_up(t.tile, line) | 1) * line;
}

// Reads and writes one thread's tiles of one side of the convolution.
template <class T>
class PlaneAccess {
 public:
  using S = Compute<T>;
  // in_rows: whether memory is [positions][channels], of which all groups are read and written together, and else
  // planes.
  PlaneAccess(const Tiling& t, const Channels& side, bool in_rows, bool used = true)
      : in_rows(in_rows),
        t_(t),
        side_(side),
        stride_(row_stride<S>(t)),
        tile_(used ? (in_rows ? side.count : side.of_group) * stride_ : 0),
        staging_(used && in_rows ? kRowsAtOnce * side.count : 0) {}
  bool failed() const { return tile_.failed() || staging_.failed(); }

  // Where the rows of a group are written, and how far they lie apart.
  S* row_of(int64_t group) const { return tile_.get() + (in_rows ? side_.first(group) * stride_ : 0); }
  int64_t row_step() const { return in_rows ? side_.step * stride_ : stride_; }
  // Where the rows of a group are read after `read`.
  const S* read_row_of(int64_t group) const { return direct_ ? direct_ : row_of(group); }
  int64_t read_row_step() const { return direct_ ? place_step() : row_step(); }

  // Takes a tile of the tensor: whole vectors of one image where they lie, others as a copy with zeros at its end.
  void read(const T* tensor, int64_t group, int64_t position, int64_t count) {
    direct_ = nullptr;
    if constexpr (sizeof(T) == sizeof(S)) {
      direct_ = place(tensor, group, position, count);
      if (direct_) return;
    }
    const int64_t rows = in_rows ? side_.count : side_.of_group, whole = round_up(count, kLanes<S>);
    if (in_rows) {
      for (int64_t i = 0; i < count; i += kRowsAtOnce) {
        const int64_t some = min_of(kRowsAtOnce, count - i);
        const T* from = tensor + (position + i) * side_.count;
        if constexpr (sizeof(T) == sizeof(S)) {
          transpose(some, side_.count, from, side_.count, tile_.get() + i, stride_);
        } else {
          convert_row(some * side_.count, from, staging_.get());
          transpose(some, side_.count, staging_.get(), side_.count, tile_.get() + i, stride_);
        }
      }
    } else {
      for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
        const T* from = plane(tensor, image, group) + pixel;
        for (int64_t j = 0; j < rows; ++j) {
          convert_row(length, from + j * side_.step * t_.pixels, tile_.get() + j * stride_ + offset);
        }
      });
    }
    for (int64_t j = 0; j < rows && count < whole; ++j) {
      for (int64_t i = count; i < whole; ++i) tile_.get()[j * stride_ + i] = 0;
    }
  }

  // The first row of a tile in a tensor, if it consists of whole vectors of one image; the others follow at place_step.
  template <class Pointer>
  Pointer place(Pointer tensor, int64_t group, int64_t position, int64_t count) const {
    const int64_t image = position / t_.pixels, pixel = position % t_.pixels;
    if (in_rows || count % kLanes<S> != 0 || pixel + count > t_.pixels) return nullptr;
    return plane(tensor, image, group) + pixel;
  }
  int64_t place_step() const { return side_.step * t_.pixels; }

  // Has a tile asked for; of images that are parts of it all that it has channels of, where they lie in one piece.
  void fetch(const T* tensor, const Tiling::Place& tile, Ahead& ahead) const {
    if (in_rows) {
      ahead.add(tensor + tile.position * side_.count, 1, tile.count * side_.count * int64_t(sizeof(T)), 0);
    } else {
      const int64_t image = tile.position / t_.pixels, pixel = tile.position % t_.pixels;
      const int64_t size = t_.pixels * int64_t(sizeof(T)), images = div_up(pixel + tile.count, t_.pixels);
      const int64_t channels = t_.unit_groups * side_.of_group, step = t_.unit_groups > 1 ? 1 : side_.step;
      if (images > 1 && step == 1 && (t_.unit_groups == 1 || t_.pixels <= tile.count)) {
        ahead.add(plane(tensor, image, tile.group), images, channels * size, side_.count * size);
      } else {
        ahead.add(plane(tensor, image, tile.group) + pixel, channels,
                  min_of(tile.count, t_.pixels - pixel) * int64_t(sizeof(T)), step * size);
      }
    }
  }

  template <class Number>
  void write(int64_t group, int64_t position, int64_t count, bool streamed, Number* tensor) const {
    if (in_rows) {
      for (int64_t i = 0; i < count; i += kRowsAtOnce) {
        const int64_t some = min_of(kRowsAtOnce, count - i);
        transpose(side_.count, some, tile_.get() + i, stride_, staging_.get(), side_.count);
        store_run(some * side_.count, staging_.get(), tensor + (position + i) * side_.count, streamed);
      }
    } else {
      write_planes(group, position, count, tile_.get(), stride_, streamed, tensor);
    }
  }
  // The planes of a group from rows that are not this tile's.
  template <class Number>
  void write_planes(int64_t group, int64_t position, int64_t count, const S* rows, int64_t step, bool streamed,
                    Number* tensor) const {
    for_images(position, count, [&](int64_t image, int64_t pixel, int64_t offset, int64_t length) {
      Number* to = plane(tensor, image, group) + pixel;
      for (int64_t j = 0; j < side_.of_group; ++j) {
        store_run(length, rows + j * step + offset, to + j * side_.step * t_.pixels, streamed);
      }
    });
  }

  const bool in_rows;

 private:
  static constexpr int64_t kRowsAtOnce = 16;

  template <class Pointer>
  Pointer plane(Pointer tensor, int64_t image, int64_t group) const {
    return tensor + (image * side_.count + side_.first(group)) * t_.pixels;
  }

  // The parts of a tile that lie in one image each: body(image, pixel, offset in the tile, length).
  template <class Body>
  void for_images(int64_t position, int64_t count, const Body& body) const {
    for (int64_t offset = 0; offset < count;) {
      const int64_t image = (position + offset) / t_.pixels, pixel = (position + offset) % t_.pixels;
      const int64_t length = min_of(count - offset, t_.pixels - pixel);
      body(image, pixel, offset, length);
      offset += length;
    }
  }

  const Tiling& t_;
  const Channels& side_;
  const int64_t stride_;
  const Buffer<S> tile_, staging_;
  const S* direct_ = nullptr;
};

}  // namespace cellops::CELLOPS_ISA
