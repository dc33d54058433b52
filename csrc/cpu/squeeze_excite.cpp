// Squeeze-and-excitation (Hu et al. 2018): an image's channel means, two small matrices, and a factor per channel.
#include "../cellops.h"
#include "../common/activation.h"
#include "../common/layout.h"
#include "channel_attention.h"

namespace cellops::CELLOPS_ISA {
namespace {

template <class S>
struct Weights {
  Weights(int64_t channels, int64_t hidden)
      : first(hidden * channels), second(hidden * channels), bias1(hidden), bias2(channels) {}
  bool failed() const { return first.failed() || second.failed() || bias1.failed() || bias2.failed(); }
  void zero() const { first.zero(), second.zero(), bias1.zero(), bias2.zero(); }
  const Buffer<S> first, second;  // [hidden][channels], both
  const Buffer<S> bias1, bias2;
};

template <class T>
void unpack(const SqueezeExciteParams& p, const void* weight1, const void* bias1, const void* weight2,
            const void* bias2, const Weights<Compute<T>>& to) {
  convert_row(p.hidden * p.channels, static_cast<const T*>(weight1), to.first.get());
  transpose(p.channels, p.hidden, static_cast<const T*>(weight2), p.hidden, to.second.get(), p.channels);
  to.bias1.zero(), to.bias2.zero();
  if (bias1) convert_row(p.hidden, static_cast<const T*>(bias1), to.bias1.get());
  if (bias2) convert_row(p.channels, static_cast<const T*>(bias2), to.bias2.get());
}

template <class S>
S dot(int64_t count, const S* a, const S* b) {
  constexpr int lanes = kLanes<S>;
  Vec<S> sum = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load(a + i) * load(b + i);
  S total = sum_of<S>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

template <class S>
void add_scaled(int64_t count, S factor, const S* from, S* to) {
  constexpr int lanes = kLanes<S>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(to + i) + broadcast(factor) * load(from + i));
  for (; i < count; ++i) to[i] += factor * from[i];
}

template <class S>
class Rule {
 public:
  // sums: the thread's own gradients of the parameters; null in forward.
  Rule(const SqueezeExciteParams& p, const Weights<S>& weights, const Weights<S>* sums)
      : p_(p), weights_(weights), sums_(sums), before_(p.hidden), hidden_(p.hidden), logits_(p.channels) {}
  bool failed() const { return before_.failed() || hidden_.failed() || logits_.failed(); }

  void forward(const S* mean, S* scale) const {
    for (int64_t c = 0; c < p_.channels; ++c) logits_.get()[c] = weights_.bias2.get()[c];
    for (int64_t j = 0; j < p_.hidden; ++j) {
      const S x = weights_.bias1.get()[j] + dot(p_.channels, weights_.first.get() + j * p_.channels, mean);
      before_.get()[j] = x;
      hidden_.get()[j] = p_.activation == Activation::silu ? x * sigmoid(x) : x < 0 ? S(0) : x;
      add_scaled(p_.channels, hidden_.get()[j], weights_.second.get() + j * p_.channels, logits_.get());
    }
    for (int64_t c = 0; c < p_.channels; ++c) scale[c] = gate_value(p_.gate, logits_.get()[c]);
  }

  void backward(const S* mean, const S* grad_scale, S* scale, S* grad_mean, bool add) const {
    forward(mean, scale);
    S* grad_logits = logits_.get();
    for (int64_t c = 0; c < p_.channels; ++c) {
      grad_logits[c] = gate_gradient(p_.gate, logits_.get()[c], scale[c], grad_scale[c]);
      grad_mean[c] = 0;
    }
    if (add) add_scaled(p_.channels, S(1), grad_logits, sums_->bias2.get());
    for (int64_t j = 0; j < p_.hidden; ++j) {
      const int64_t row = j * p_.channels;
      const S x = before_.get()[j], through = dot(p_.channels, weights_.second.get() + row, grad_logits);
      const S gate = sigmoid(x);
      const S grad = p_.activation == Activation::silu ? through * gate * (1 + x * (1 - gate))
                     : x <= 0                          ? S(0)
                                                       : through;
      add_scaled(p_.channels, grad, weights_.first.get() + row, grad_mean);
      if (!add) continue;
      sums_->bias1.get()[j] += grad;
      add_scaled(p_.channels, grad, mean, sums_->first.get() + row);
      add_scaled(p_.channels, hidden_.get()[j], grad_logits, sums_->second.get() + row);
    }
  }

 private:
  const SqueezeExciteParams& p_;
  const Weights<S>& weights_;
  const Weights<S>* sums_;
  const Buffer<S> before_, hidden_, logits_;
};

template <class T>
bool forward(const SqueezeExciteParams& p, const SqueezeExciteForward& io, int threads) {
  using S = Compute<T>;
  const Weights<S> weights(p.channels, p.hidden);
  const Buffer<S> means(p.batch * p.channels);
  if (weights.failed() || means.failed()) return false;
  unpack<T>(p, io.weight1, io.bias1, io.weight2, io.bias2, weights);
  bool failed = false;
  parallel(team_size(p.batch * p.channels * p.pixels, threads), [&](const Team& team) {
    const Rule<S> rule(p, weights, nullptr);
    const Buffer<S> scale(p.channels);
    if (!team.all(!rule.failed() && !scale.failed(), &failed)) return;
    attend_forward(team, p, static_cast<const T*>(io.input), static_cast<T*>(io.output), means.get(), scale.get(),
                   rule);
  });
  return !failed;
}

template <class T, class S>
void write_sums(int64_t count, const S* sums, void* to) {
  if (to) convert_row(count, sums, static_cast<T*>(to));
}

template <class T>
bool backward(const SqueezeExciteParams& p, const SqueezeExciteBackward& io, int threads) {
  using S = Compute<T>;
  const Weights<S> weights(p.channels, p.hidden), total(p.channels, p.hidden);
  const Buffer<S> means(p.batch * p.channels), grad_scales(p.batch * p.channels);
  if (weights.failed() || total.failed() || means.failed() || grad_scales.failed()) return false;
  unpack<T>(p, io.weight1, io.bias1, io.weight2, io.bias2, weights);
  total.zero();
  bool failed = false;
  parallel(team_size(p.batch * p.channels * p.pixels, threads), [&](const Team& team) {
    const Weights<S> sums(p.channels, p.hidden);
    const Rule<S> rule(p, weights, &sums);
    const AttendScratch<S> own(p.channels);
    if (!team.all(!sums.failed() && !rule.failed() && !own.failed(), &failed)) return;
    sums.zero();
    attend_backward(team, p, static_cast<const T*>(io.grad_output), static_cast<const T*>(io.input),
                    static_cast<T*>(io.grad_input), means.get(), grad_scales.get(), own, rule);
    team.in_order([&] {
      add_scaled(p.hidden * p.channels, S(1), sums.first.get(), total.first.get());
      add_scaled(p.hidden * p.channels, S(1), sums.second.get(), total.second.get());
      add_scaled(p.hidden, S(1), sums.bias1.get(), total.bias1.get());
      add_scaled(p.channels, S(1), sums.bias2.get(), total.bias2.get());
    });
  });
  if (failed) return false;
  write_sums<T>(p.hidden * p.channels, total.first.get(), io.grad_weight1);
  write_sums<T>(p.hidden, total.bias1.get(), io.grad_bias1);
  write_sums<T>(p.channels, total.bias2.get(), io.grad_bias2);
  if (io.grad_weight2) {
    transpose(p.hidden, p.channels, total.second.get(), p.channels, static_cast<T*>(io.grad_weight2), p.hidden);
  }
  return true;
}

}  // namespace

CELLOPS_DISPATCH(squeeze_excite_forward, forward, SqueezeExciteParams, SqueezeExciteForward)
CELLOPS_DISPATCH(squeeze_excite_backward, backward, SqueezeExciteParams, SqueezeExciteBackward)

}  // namespace cellops::CELLOPS_ISA
