// Compares the NEON variant of deformable convolution with the plain formula; tests/test_emulated_cpus.py builds and
// runs it.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cellops.h"

namespace cellops::neon {
bool deform_conv2d_forward(const DeformConv2dParams&, const DeformConv2dForward&, int);
bool deform_conv2d_backward(const DeformConv2dParams&, const DeformConv2dBackward&, int);
}  // namespace cellops::neon

using namespace cellops;

namespace {

constexpr int kBatch = 2, kChannels = 37, kHeight = 9, kWidth = 7, kOut = 21, kTaps = 9, kPixels = kHeight * kWidth;

float random_number() {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 23) - 1;
}

std::vector<float> random_numbers(int count, float scale = 1) {
  std::vector<float> numbers(count);
  for (float& number : numbers) number = scale * random_number();
  return numbers;
}

}  // namespace

int main() {
  DeformConv2dParams p{};
  p.batch = kBatch, p.in_channels = kChannels, p.in_height = kHeight, p.in_width = kWidth;
  p.out_channels = kOut, p.out_height = kHeight, p.out_width = kWidth;
  p.kernel_height = p.kernel_width = 3;
  p.stride_height = p.stride_width = p.pad_height = p.pad_width = p.dilation_height = p.dilation_width = 1;
  p.groups = p.offset_groups = 1;

  const auto input = random_numbers(kBatch * kChannels * kPixels),
             offset = random_numbers(kBatch * 2 * kTaps * kPixels, 3), mask = random_numbers(kBatch * kTaps * kPixels),
             weight = random_numbers(kOut * kChannels * kTaps), bias = random_numbers(kOut),
             grad = random_numbers(kBatch * kOut * kPixels);
  std::vector<float> output(grad.size()), grad_input(input.size()), grad_offset(offset.size()), grad_mask(mask.size()),
      grad_weight(weight.size()), grad_bias(bias.size());
  if (!neon::deform_conv2d_forward(
          p, {input.data(), offset.data(), mask.data(), weight.data(), bias.data(), output.data()}, 2) ||
      !neon::deform_conv2d_backward(
          p,
          {grad.data(), input.data(), offset.data(), mask.data(), weight.data(), grad_input.data(), grad_offset.data(),
           grad_mask.data(), grad_weight.data(), grad_bias.data()},
          2)) {
    return 2;
  }

  // <columns' gradient, columns> = <grad_input, input> = <grad_mask, mask>: the samples are linear in both.
  double output_error = 0, weight_error = 0, by_input = 0, by_mask = 0, by_weight = 0;
  std::vector<double> wanted_weight(weight.size());
  for (int n = 0; n < kBatch; ++n) {
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      std::vector<double> columns(kChannels * kTaps);
      for (int k = 0; k < kTaps; ++k) {
        const float* at = &offset[(n * 2 * kTaps + 2 * k) * kPixels + pixel];
        const double y = pixel / kWidth - 1 + k / 3 + at[0], x = pixel % kWidth - 1 + k % 3 + at[kPixels];
        const int top = int(std::floor(y)), left = int(std::floor(x));
        for (int c = 0; c < kChannels; ++c) {
          const auto value = [&](int row, int column) -> double {
            if (row < 0 || column < 0 || row >= kHeight || column >= kWidth) return 0;
            return input[(n * kChannels + c) * kPixels + row * kWidth + column];
          };
          columns[c * kTaps + k] =
              mask[(n * kTaps + k) * kPixels + pixel] *
              ((1 - (y - top)) * ((1 - (x - left)) * value(top, left) + (x - left) * value(top, left + 1)) +
               (y - top) * ((1 - (x - left)) * value(top + 1, left) + (x - left) * value(top + 1, left + 1)));
        }
      }
      for (int o = 0; o < kOut; ++o) {
        const int at = (n * kOut + o) * kPixels + pixel;
        double sum = bias[o];
        for (int i = 0; i < kChannels * kTaps; ++i) {
          sum += weight[o * kChannels * kTaps + i] * columns[i];
          wanted_weight[o * kChannels * kTaps + i] += grad[at] * columns[i];
        }
        output_error = std::fmax(output_error, std::fabs(output[at] - sum));
      }
    }
  }
  for (size_t i = 0; i < weight.size(); ++i) {
    weight_error = std::fmax(weight_error, std::fabs(grad_weight[i] - wanted_weight[i]));
    by_weight += wanted_weight[i] * weight[i];
  }
  for (size_t i = 0; i < input.size(); ++i) by_input += double(grad_input[i]) * input[i];
  for (size_t i = 0; i < mask.size(); ++i) by_mask += double(grad_mask[i]) * mask[i];
  std::printf("errors: output %.1e, grad_weight %.1e; <grad, x> by weight %.6f, input %.6f, mask %.6f\n", output_error,
              weight_error, by_weight, by_input, by_mask);
  const double size = std::fabs(by_weight) + 1;
  return !(output_error < 1e-4 && weight_error < 1e-4 && std::fabs(by_input - by_weight) < 1e-4 * size &&
           std::fabs(by_mask - by_weight) < 1e-4 * size);
}
