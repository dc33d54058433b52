// Spatial attention: every pixel is scaled by the sigmoid of a logit, which is a convolution of the channels ("conv")
// or of their maximum and mean ("pool", Woo et al. 2018).
//
// All channels of a pixel are needed for its logit, and then all of them are scaled. An image is therefore worked on in
// bands of rows that stay in the second cache from the first pass to the last: memory is read once and written once.
// With a kernel larger than one pixel the passes follow one another at a distance of half a kernel: the first ends at
// row r, the logits at r - half, their gradients' way back to the input at r - 2 half.
#include "../cellops.h"
#include "../common/activation.h"
#include "../common/layout.h"
#include "channel_attention.h"
#include "spatial_attention_maps.h"
#include "spatial_attention_passes.h"

namespace cellops::CELLOPS_ISA {
namespace {

// Bytes that the passes keep in the second cache: the band that one works on, those between it and the first pass, and
// the next, which is being fetched.
constexpr int64_t kBandBytes = 640 << 10;

// One image, or at first the whole batch.
template <class T>
struct Tensors {
  const T *grad_output, *input;
  T *output, *grad_input;
  bool last = false;  // no image follows
};

// What follows from the sizes.
struct Shape {
  // `tensors` of the input's size are read, of elements of `bytes` bytes.
  Shape(const SpatialAttentionParams& p, int64_t tensors, int64_t bytes)
      : pixels(p.height * p.width),
        taps(p.kernel * p.kernel),
        half(p.kernel / 2),
        maps(p.pool ? 2 : taps),
        weights(taps * (p.pool ? 2 : p.channels)),
        pointwise(taps == 1 && !p.pool) {
    const int64_t pixel = p.channels * tensors * bytes;
    band_pixels = max_of(1, (kBandBytes / pixel - tensors * half * p.width) / 2);
    band_rows = min_of(p.height, max_of(1, band_pixels / p.width));
    if (band_rows > 2) band_rows = band_rows / 2 * 2;  // more often whole vectors
    band_pixels = pointwise ? min_of(pixels, round_up(band_pixels, 64)) : band_rows * p.width;
    window_rows = min_of(p.height, band_rows + 3 * half + kLine / p.width + 1);
  }
  int64_t pixels, taps, half;
  int64_t maps;     // that the convolution takes its terms from: one for each tap, or maximum and mean
  int64_t weights;  // kept as [taps][channels], or [2][taps]
  bool pointwise;   // no neighbours
  int64_t band_rows, band_pixels, window_rows;
};

// One thread's work. The window holds maps, then these:
enum Extra { kDot, kTies, kScale, kGradLogits, kExtras };

template <bool Backward, class T>
class Worker {
 public:
  using S = Compute<T>;

  Worker(const SpatialAttentionParams& p, const Shape& shape, const S* weight, S bias, bool want_weight, bool streamed)
      : p_(p),
        shape_(shape),
        weight_(weight),
        bias_(bias),
        want_weight_(want_weight),
        run_{0, 0, p.channels, shape.pixels, p.channels_last, streamed},
        flat_stride_(round_up(shape.band_pixels + 2 * p.width, kLine) + kLine),
        flat_(flat_stride_ * (shape.maps + kExtras)),
        row_(shape.pointwise ? 0 : 2 * round_up(p.width, kLanes<S>)),
        zeros_(shape.pointwise ? 0 : p.width + kLanes<S>),
        sums_(Backward ? shape.weights : 0) {}

  bool failed() const { return flat_.failed() || row_.failed() || zeros_.failed() || sums_.failed(); }
  void zero() const { zeros_.zero(), sums_.zero(); }
  const S* grad_weight() const { return sums_.get(); }
  S grad_bias() const { return grad_bias_; }

  // Without neighbours: all passes, band by band.
  void pointwise(const Tensors<T>& io, const Team& team) {
    int64_t begin, end;
    team.share(div_up(shape_.pixels, kLine), &begin, &end);
    begin *= kLine, end = min_of(end * kLine, shape_.pixels);
    S *map = flat(0), *dot = flat(shape_.maps + kDot);  // of responses, then of the logits' gradients
    for (run_.first = begin; run_.first < end; run_.first += run_.count) {
      run_.count = min_of(shape_.band_pixels, end - run_.first);
      look_ahead(io, run_.first + run_.count, end);
      respond<Backward>(run_, io.input, io.grad_output, weight_, 1, flats(0), dot);
      grad_bias_ += gate_row<Backward>(run_.count, map, bias_, dot, flat(shape_.maps + kScale), map);
      finish(io, 0);
    }
  }

  // With neighbours: one image alone, at the distance that the kernel asks for.
  void alone(const Tensors<T>& io, Window<S>& window) {
    window.reset();
    int64_t gated = 0, done = 0;  // rows, pixels
    for (int64_t first = 0; first < p_.height; first += shape_.band_rows) {
      const int64_t last = min_of(first + shape_.band_rows, p_.height), lag = last == p_.height ? 0 : shape_.half;
      fill(io, window, first, last);
      gate(window, gated, max_of(gated, last - lag));
      gated = max_of(gated, last - lag);
      const int64_t ready = max_of(0, Backward ? gated - lag : gated) * p_.width;
      const int64_t whole = last < p_.height ? ready / kLine * kLine : ready;  // lines of the output
      finish_pixels(io, window, done, max_of(done, whole), last);
      done = max_of(done, whole);
      window.move(min_of(done / p_.width, gated) - shape_.half);
    }
  }

  // The same by a team, pass by pass, in a window as high as the image.
  void together(const Tensors<T>& io, Window<S>& window, const Team& team) {
    if (team.index == 0) window.reset();
    team.barrier();
    int64_t begin, end;
    team.share(p_.height, &begin, &end);
    for (int64_t first = begin; first < end; first += shape_.band_rows) {
      fill(io, window, first, min_of(first + shape_.band_rows, end));
    }
    team.barrier();
    gate(window, begin, end);
    team.barrier();
    const auto line = [&](int64_t row) { return row < p_.height ? row * p_.width / kLine * kLine : shape_.pixels; };
    finish_pixels(io, window, line(begin), line(end), end);
    team.barrier();
  }

 private:
  S* flat(int64_t map) const { return flat_.get() + map * flat_stride_; }
  Maps<S> flats(int64_t map) const { return {flat(map), flat_stride_}; }

  void set_rows(int64_t first, int64_t last) {
    run_.first = first * p_.width;
    run_.count = (last - first) * p_.width;
  }

  // Sets what the last pass fetches for the first: the pixels from `next` on or, past `end`, the next image's.
  void look_ahead(const Tensors<T>& io, int64_t next, int64_t end) {
    const int64_t image = p_.channels * shape_.pixels;
    run_.ahead = next < end ? (next - run_.first) * run_.pixel_step()
                 : io.last  ? 0
                            : image - run_.first * run_.pixel_step();
  }

  // First pass over rows [first, last), at most a band of them.
  void fill(const Tensors<T>& io, const Window<S>& window, int64_t first, int64_t last) {
    set_rows(first, last);
    S *dot = flat(shape_.maps + kDot), *ties = flat(shape_.maps + kTies);
    if (p_.pool) {
      pool_channels<Backward>(run_, io.input, io.grad_output, flat(0), flat(1), ties, dot);
    } else {
      respond<Backward>(run_, io.input, io.grad_output, weight_, shape_.taps, flats(0), dot);
    }
    for (int64_t map = 0; map < shape_.maps + (!Backward ? 0 : p_.pool ? 2 : 1); ++map) {
      for (int64_t y = first; y < last; ++y) {
        __builtin_memcpy(window.row(map, y), flat(map) + (y - first) * p_.width, p_.width * sizeof(S));
      }
    }
  }

  // body(part, i, taps): the taps of row i of the kernel, as the logits of row y see them; outside the image, zeros.
  template <class Body>
  void each_kernel_row(const Window<S>& window, int64_t y, const Body& body) const {
    const int64_t parts = p_.pool ? 2 : 1, k = p_.kernel;
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < k; ++i) {
        const int64_t row = y + i - shape_.half;
        const S* weights = p_.pool ? weight_ + (part * k + i) * k : &kOne;
        if (row < 0 || row >= p_.height) {
          body(part, i, Taps<S>{k, zeros_.get(), 0, weights, p_.pool});
        } else if (p_.pool) {
          body(part, i, Taps<S>{k, window.padded(part, row), 1, weights, 1});
        } else {
          body(part, i, Taps<S>{k, window.padded(i * k, row), window.map_step() + 1, weights, 0});
        }
      }
    }
  }

  // Logits and what they need of both sides, for rows whose neighbours have their maps.
  void gate(const Window<S>& window, int64_t first, int64_t last) {
    const int64_t padded_width = round_up(p_.width, kLanes<S>);
    S *row = row_.get(), *scale = row + padded_width;
    for (int64_t y = first; y < last; ++y) {
      __builtin_memset(row, 0, padded_width * sizeof(S));
      each_kernel_row(window, y, [&](int64_t, int64_t, const Taps<S>& taps) { add_taps(p_.width, taps, row); });
      grad_bias_ += gate_row<Backward>(p_.width, row, bias_, window.row(shape_.maps + kDot, y), scale, row);
      __builtin_memcpy(window.row(shape_.maps + kScale, y), scale, p_.width * sizeof(S));
      if (!Backward) continue;
      __builtin_memcpy(window.row(shape_.maps + kGradLogits, y), row, p_.width * sizeof(S));
      if (!p_.pool || !want_weight_) continue;
      for (int64_t x = p_.width; x < padded_width; ++x) row[x] = 0;
      each_kernel_row(window, y, [&](int64_t part, int64_t i, const Taps<S>& taps) {
        dot_taps(p_.width, taps, row, sums_.get() + (part * p_.kernel + i) * p_.kernel);
      });
    }
  }

  // body(i, row): the gradients of the logits as the first tap of row i of the kernel sees them from the pixels of row
  // y, null outside the image; the next taps see them one pixel further to the left.
  template <class Body>
  void each_row_back(const Window<S>& window, int64_t y, const Body& body) const {
    for (int64_t i = 0; i < p_.kernel; ++i) {
      const int64_t row = y - i + shape_.half;
      const bool inside = row >= 0 && row < p_.height;
      body(i, inside ? window.padded(shape_.maps + kGradLogits, row) + 2 * shape_.half : nullptr);
    }
  }

  // Last pass over pixels whose neighbours have their logits; `next` is the row at which the first pass goes on.
  void finish_pixels(const Tensors<T>& io, const Window<S>& window, int64_t begin, int64_t end, int64_t next) {
    const int64_t step = round_up(shape_.band_pixels, kLine);
    for (run_.first = begin; run_.first < end; run_.first += run_.count) {
      run_.count = min_of(step, end - run_.first);
      look_ahead(io, run_.first - begin + next * p_.width, shape_.pixels);
      const int64_t first = run_.first / p_.width, last = div_up(run_.first + run_.count, p_.width);
      for (int64_t y = first; y < last; ++y) gather(window, y, (y - first) * p_.width);
      finish(io, run_.first - first * p_.width);
    }
  }

  // What the last pass needs of row y, to the flat maps from `at` on.
  void gather(const Window<S>& window, int64_t y, int64_t at) {
    const auto copy = [&](const S* from, S* to) { __builtin_memcpy(to + at, from, p_.width * sizeof(S)); };
    copy(window.row(shape_.maps + kScale, y), flat(shape_.maps + kScale));
    if (!Backward) return;
    if (!p_.pool) {
      each_row_back(window, y, [&](int64_t i, const S* row) {
        for (int64_t j = 0; j < p_.kernel; ++j) copy(row ? row - j : zeros_.get(), flat(i * p_.kernel + j));
      });
      return;
    }
    copy(window.row(0, y), flat(shape_.maps + kDot));
    for (int64_t part = 0; part < 2; ++part) {
      S* sums = row_.get();
      __builtin_memset(sums, 0, round_up(p_.width, kLanes<S>) * sizeof(S));
      each_row_back(window, y, [&](int64_t i, const S* row) {
        if (row) add_taps(p_.width, Taps<S>{p_.kernel, row, -1, weight_ + (part * p_.kernel + i) * p_.kernel, 1}, sums);
      });
      const S* ties = window.row(shape_.maps + kTies, y);
      for (int64_t x = 0; x < p_.width; ++x) sums[x] /= part ? S(p_.channels) : ties[x];
      copy(sums, flat(part));
    }
  }

  // Last pass over the run, whose numbers lie in the flat maps from `at` on.
  void finish(const Tensors<T>& io, int64_t at) {
    const S* scale = flat(shape_.maps + kScale) + at;
    const Maps<S> grads{flat(0) + at, flat_stride_};
    if constexpr (!Backward) {
      scale_run(run_, io.input, scale, io.output);
    } else if (p_.pool) {
      if (!io.grad_input) return;
      grad_through_pool(run_, io.grad_output, io.input, scale, flat(shape_.maps + kDot) + at, grads[0], grads[1],
                        io.grad_input);
    } else {
      if (io.grad_input) {
        grad_through_taps(run_, io.grad_output, scale, weight_, shape_.taps, grads, io.grad_input);
      }
      if (want_weight_) correlate(run_, io.input, shape_.taps, grads, sums_.get());
    }
  }

  static constexpr S kOne = 1;
  const SpatialAttentionParams& p_;
  const Shape& shape_;
  const S* weight_;
  const S bias_;
  const bool want_weight_;
  Run run_;
  S grad_bias_ = 0;
  const int64_t flat_stride_;
  const Buffer<S> flat_;  // maps of one band, without margins
  const Buffer<S> row_, zeros_;
  const Buffer<S> sums_;  // gradient of the weight
};

// Runs the passes over every image and, in backward, adds up the threads' gradients of weight and bias.
template <bool Backward, class T, class S = Compute<T>>
bool attend(const SpatialAttentionParams& p, const T* weight, const T* bias, const Tensors<T>& io, S* grad_weight,
            S* grad_bias, int threads) {
  const Shape shape(p, Backward ? 2 : 1, sizeof(T));
  const int64_t size = p.channels * shape.pixels;
  const Buffer<S> weights(shape.weights);
  if (weights.failed()) return false;
  if (p.pool) {
    convert_row(shape.weights, weight, weights.get());
  } else {
    transpose(p.channels, shape.taps, weight, shape.taps, weights.get(), p.channels);
  }
  const bool streamed = streams(Backward ? io.grad_input : io.output, p.channels_last ? p.channels : shape.pixels,
                                (Backward ? 3 : 2) * p.batch * size * int64_t(sizeof(T)));
  const int team_wanted = team_size(p.batch * size, threads);
  const int64_t maps = shape.pointwise ? 0 : shape.maps + kExtras;
  Window<S> shared(maps, p.height, p.width, shape.half);
  bool failed = false;
  parallel(team_wanted, [&](const Team& team) {
    Worker<Backward, T> worker(p, shape, weights.get(), bias ? S(to_compute(*bias)) : S(0), grad_weight, streamed);
    Window<S> own(maps, shape.window_rows, p.width, shape.half);
    bool ok = !worker.failed();
    if (p.batch >= team.size) ok = own.allocate() && ok;
    if (p.batch % team.size && team.index == 0) ok = shared.allocate() && ok;
    if (!team.all(ok, &failed)) return;
    worker.zero();
    for_images(team, p.batch, [&](int64_t image, const Team& members) {
      const auto moved = [&](auto* tensor) { return tensor ? tensor + image * size : tensor; };
      const Tensors<T> one{moved(io.grad_output), moved(io.input), moved(io.output), moved(io.grad_input),
                           image + 1 == p.batch};
      if (shape.pointwise) {
        worker.pointwise(one, members);
      } else if (members.size == 1) {
        worker.alone(one, own);
      } else {
        worker.together(one, shared, members);
      }
    });
    end_streams();
    if (!Backward) return;
    team.in_order([&] {
      for (int64_t i = 0; grad_weight && i < shape.weights; ++i) grad_weight[i] += worker.grad_weight()[i];
      *grad_bias += worker.grad_bias();
    });
  });
  return !failed;
}

template <class T>
bool forward(const SpatialAttentionParams& p, const SpatialAttentionForward& io, int threads) {
  const Tensors<T> tensors{nullptr, static_cast<const T*>(io.input), static_cast<T*>(io.output), nullptr};
  return attend<false>(p, static_cast<const T*>(io.weight), static_cast<const T*>(io.bias), tensors,
                       static_cast<Compute<T>*>(nullptr), static_cast<Compute<T>*>(nullptr), threads);
}

template <class T>
bool backward(const SpatialAttentionParams& p, const SpatialAttentionBackward& io, int threads) {
  using S = Compute<T>;
  const int64_t weights = p.kernel * p.kernel * (p.pool ? 2 : p.channels);
  const Buffer<S> grad_weight(io.grad_weight ? weights : 0);
  if (grad_weight.failed()) return false;
  grad_weight.zero();
  S grad_bias = 0;
  const Tensors<T> tensors{static_cast<const T*>(io.grad_output), static_cast<const T*>(io.input), nullptr,
                           static_cast<T*>(io.grad_input)};
  if (!attend<true>(p, static_cast<const T*>(io.weight), static_cast<const T*>(io.bias), tensors, grad_weight.get(),
                    &grad_bias, threads)) {
    return false;
  }
  if (io.grad_weight && p.pool) convert_row(weights, grad_weight.get(), static_cast<T*>(io.grad_weight));
  if (io.grad_weight && !p.pool) {
    const int64_t taps = p.kernel * p.kernel;
    transpose(taps, p.channels, grad_weight.get(), p.channels, static_cast<T*>(io.grad_weight), taps);
  }
  if (io.grad_bias) from_compute(static_cast<T*>(io.grad_bias), grad_bias);
  return true;
}

}  // namespace

CELLOPS_DISPATCH(spatial_attention_forward, forward, SpatialAttentionParams, SpatialAttentionForward)
CELLOPS_DISPATCH(spatial_attention_backward, backward, SpatialAttentionParams, SpatialAttentionBackward)

}  // namespace cellops::CELLOPS_ISA
