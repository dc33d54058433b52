// Every entry point of the native library. No Python, no torch: raw pointers and sizes only.
#pragma once
#include <cstdint>

namespace cellops {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Sizes, layouts and dtypes of one deformable convolution; the same for forward and backward.
// Every 4-D tensor is dense, either NCHW or, where its flag is set, channels_last (NHWC in memory).
// K = kernel_height * kernel_width, taps row-major; G = groups; OG = offset_groups.
struct DeformConv2dParams {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
  int64_t dilation_height, dilation_width;
  int64_t groups, offset_groups;
  Dtype dtype;         // input, mask, weight, bias, output
  Dtype offset_dtype;  // dtype, or float32 beside a half dtype
  bool input_channels_last, offset_channels_last, mask_channels_last, weight_channels_last, output_channels_last;
};

struct DeformConv2dForward {
  const void* input;   // [N, C, H, W]
  const void* offset;  // [N, OG * K * 2, OH, OW], (dy, dx) per tap
  const void* mask;    // [N, OG * K, OH, OW], or null
  const void* weight;  // [O, C / G, KH, KW]
  const void* bias;    // [O], or null
  void* output;        // [N, O, OH, OW]
};

struct DeformConv2dBackward {
  const void* grad_output;  // [N, O, OH, OW], layout of output
  const void* input;
  const void* offset;
  const void* mask;  // or null
  const void* weight;
  // Outputs; each may be null when not wanted. Layouts and dtypes are those of the tensors they belong to.
  void* grad_input;
  void* grad_offset;
  void* grad_mask;
  void* grad_weight;
  void* grad_bias;
};

void deform_conv2d_forward_cpu(const DeformConv2dParams&, const DeformConv2dForward&, int threads);
void deform_conv2d_backward_cpu(const DeformConv2dParams&, const DeformConv2dBackward&, int threads);

// Instruction-set variants of the CPU kernels, best last; `isa_name` is the one in use.
// It is chosen at load: the best that the CPU has, or the one that CELLOPS_ISA names.
int isa_count();
const char* isa_name_at(int index);
bool isa_supported(int index);
const char* isa_name();

}  // namespace cellops
