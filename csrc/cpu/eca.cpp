// Efficient channel attention (Wang et al. 2020): an image's channel means, a short convolution over the channels with
// zero padding, a sigmoid, and a factor per channel.
#include "../cellops.h"
#include "../common/activation.h"
#include "../common/layout.h"
#include "channel_attention.h"

namespace cellops::CELLOPS_ISA {
namespace {

template <class S>
class Rule {
 public:
  // sums: the thread's own gradient of the weight [taps]; null in forward. logits: [channels] of scratch.
  Rule(const EcaParams& p, const S* weight, S* sums, S* logits)
      : p_(p), half_(p.taps / 2), weight_(weight), sums_(sums), logits_(logits) {}

  void forward(const S* mean, S* scale) const {
    for (int64_t c = 0; c < p_.channels; ++c) {
      S sum = 0;
      for (int64_t k = max_of(0, half_ - c); k < min_of(p_.taps, p_.channels + half_ - c); ++k) {
        sum += weight_[k] * mean[c + k - half_];
      }
      scale[c] = sigmoid(sum);
    }
  }

  void backward(const S* mean, const S* grad_scale, S* scale, S* grad_mean, bool add) const {
    forward(mean, scale);
    for (int64_t c = 0; c < p_.channels; ++c) {
      logits_[c] = grad_scale[c] * scale[c] * (1 - scale[c]);
      grad_mean[c] = 0;
    }
    for (int64_t c = 0; c < p_.channels; ++c) {
      for (int64_t k = max_of(0, half_ - c); k < min_of(p_.taps, p_.channels + half_ - c); ++k) {
        grad_mean[c + k - half_] += weight_[k] * logits_[c];
        if (add) sums_[k] += mean[c + k - half_] * logits_[c];
      }
    }
  }

 private:
  const EcaParams& p_;
  const int64_t half_;
  const S* weight_;
  S *sums_, *logits_;
};

template <class T>
bool forward(const EcaParams& p, const EcaForward& io, int threads) {
  using S = Compute<T>;
  const Buffer<S> weight(p.taps), means(p.batch * p.channels);
  if (weight.failed() || means.failed()) return false;
  convert_row(p.taps, static_cast<const T*>(io.weight), weight.get());
  bool failed = false;
  parallel(team_size(p.batch * p.channels * p.pixels, threads), [&](const Team& team) {
    const Buffer<S> scale(p.channels);
    if (!team.all(!scale.failed(), &failed)) return;
    attend_forward(team, p, static_cast<const T*>(io.input), static_cast<T*>(io.output), means.get(), scale.get(),
                   Rule<S>(p, weight.get(), nullptr, nullptr));
  });
  return !failed;
}

template <class T>
bool backward(const EcaParams& p, const EcaBackward& io, int threads) {
  using S = Compute<T>;
  const Buffer<S> weight(p.taps), total(p.taps), means(p.batch * p.channels), grad_scales(p.batch * p.channels);
  if (weight.failed() || total.failed() || means.failed() || grad_scales.failed()) return false;
  convert_row(p.taps, static_cast<const T*>(io.weight), weight.get());
  total.zero();
  bool failed = false;
  parallel(team_size(p.batch * p.channels * p.pixels, threads), [&](const Team& team) {
    const Buffer<S> sums(p.taps), logits(p.channels);
    const AttendScratch<S> own(p.channels);
    if (!team.all(!sums.failed() && !logits.failed() && !own.failed(), &failed)) return;
    sums.zero();
    attend_backward(team, p, static_cast<const T*>(io.grad_output), static_cast<const T*>(io.input),
                    static_cast<T*>(io.grad_input), means.get(), grad_scales.get(), own,
                    Rule<S>(p, weight.get(), sums.get(), logits.get()));
    team.in_order([&] {
      for (int64_t k = 0; k < p.taps; ++k) total.get()[k] += sums.get()[k];
    });
  });
  if (failed) return false;
  if (io.grad_weight) convert_row(p.taps, total.get(), static_cast<T*>(io.grad_weight));
  return true;
}

}  // namespace

CELLOPS_DISPATCH(eca_forward, forward, EcaParams, EcaForward)
CELLOPS_DISPATCH(eca_backward, backward, EcaParams, EcaBackward)

}  // namespace cellops::CELLOPS_ISA
