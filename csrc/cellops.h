// Every entry point of the native library. No Python, no torch: raw pointers and sizes only.
#pragma once
#include <cstdint>

namespace cellops {

// A Params struct names its fields, in their order, for the keywords of its Python class.

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Activation : int { none = 0, relu = 1, relu6 = 2, gelu = 3, silu = 4, hardswish = 5 };

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
  static constexpr const char* kFields[] = {"batch",
                                            "in_channels",
                                            "in_height",
                                            "in_width",
                                            "out_channels",
                                            "out_height",
                                            "out_width",
                                            "kernel_height",
                                            "kernel_width",
                                            "stride_height",
                                            "stride_width",
                                            "pad_height",
                                            "pad_width",
                                            "dilation_height",
                                            "dilation_width",
                                            "groups",
                                            "offset_groups",
                                            "dtype",
                                            "offset_dtype",
                                            "input_channels_last",
                                            "offset_channels_last",
                                            "mask_channels_last",
                                            "weight_channels_last",
                                            "output_channels_last"};
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

// A tile of output pixels of a deformable convolution on a GPU: the sampling, apart from the products. Sizes as above.
// Columns are [column_groups, count, K, in_channels / column_groups].
struct DeformConv2dTileParams {
  int64_t in_channels, in_height, in_width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
  int64_t dilation_height, dilation_width;
  int64_t offset_groups, column_groups;
  int64_t first, count;  // output pixels, numbered over all images
  Dtype dtype;
  Dtype offset_dtype;  // dtype, or float32 beside a half dtype
  bool offset_channels_last, mask_channels_last;
  static constexpr const char* kFields[] = {"in_channels",
                                            "in_height",
                                            "in_width",
                                            "out_height",
                                            "out_width",
                                            "kernel_height",
                                            "kernel_width",
                                            "stride_height",
                                            "stride_width",
                                            "pad_height",
                                            "pad_width",
                                            "dilation_height",
                                            "dilation_width",
                                            "offset_groups",
                                            "column_groups",
                                            "first",
                                            "count",
                                            "dtype",
                                            "offset_dtype",
                                            "offset_channels_last",
                                            "mask_channels_last"};
};

struct DeformConv2dColumns {
  const void* input;   // [N, H, W, C]
  const void* offset;  // [N, OG * K * 2, OH, OW]
  const void* mask;    // [N, OG * K, OH, OW], or null
  void* columns;
};

struct DeformConv2dCorners {
  const void* input;
  const void* offset;
  const void* mask;
  const void* grad_columns;
  const void* exponents;  // as in FixedPoint; null without grad_input
  void* grad_input;       // [N, H, W, C] int64, added to; or null
  void* grad_offset;      // as offset; or null
  void* grad_mask;        // as mask; or null
  void* columns;          // written; grad_columns itself, or null
};

// Its tile is whole rows of output pixels.
struct DeformConv2dScatter {
  const void* offset;
  const void* mask;
  const void* grad_columns;
  void* grad_input;  // [N, H, W, C] float32, added to
};

// Every plane sampled at its own offsets, bilinearly, coordinates clamped to the image.
struct OffsetSample2dParams {
  int64_t batch, channels, height, width;
  bool interleaved;    // how the offset holds its pairs, see below
  Dtype dtype;         // input, output
  Dtype offset_dtype;  // dtype, or float32 beside a half dtype
  bool channels_last;  // input, output and their gradients
  bool offset_channels_last;
  static constexpr const char* kFields[] = {"batch",        "channels",      "height",
                                            "width",        "interleaved",   "dtype",
                                            "offset_dtype", "channels_last", "offset_channels_last"};
};

struct OffsetSample2dForward {
  const void* input;   // [N, C, H, W]
  const void* offset;  // [N, 2C, H, W], channels (dy, dx) per channel; interleaved: seen as [N * C, H, W, 2] in NCHW
  void* output;        // [N, C, H, W]
};

struct OffsetSample2dBackward {
  const void* grad_output;
  const void* input;
  const void* offset;
  void* grad_input;   // or null
  void* grad_offset;  // or null
};

// The same on a GPU.
struct OffsetSample2dGradients {
  const void* grad_output;
  const void* input;
  const void* offset;
  const void* exponents;  // as in FixedPoint; or null
  void* grad_input;       // float32, or with exponents int64, added to; or null
  void* grad_offset;      // or null
  void* grad_whole;       // written instead of grad_input, as input: where a block holds a map; or null
};

// Sums in fixed point on a GPU, which do not depend on the order of additions: output = sum * 2^-exponent.
struct FixedPointParams {
  int64_t batch, channels, pixels;
  Dtype dtype;         // output
  bool channels_last;  // sums and output
  static constexpr const char* kFields[] = {"batch", "channels", "pixels", "dtype", "channels_last"};
};

struct FixedPoint {
  const void* sums;       // [N, C, pixels] int64
  const void* exponents;  // [N, C] int32, from -250 to 250
  void* output;           // [N, C, pixels]
};

// The funnel activation: output = max(input, scale * dwconv(input) + shift), the convolution kernel x kernel (odd),
// depthwise, with zero padding that keeps the size. Numbers of channels are in the compute type: float32, or float64.
struct FreluParams {
  int64_t batch, channels, height, width, kernel;
  double eps;  // of the batch normalisation
  Dtype dtype;
  bool channels_last;
  static constexpr const char* kFields[] = {"batch",  "channels", "height", "width",
                                            "kernel", "eps",      "dtype",  "channels_last"};
};

struct FreluForward {
  const void* input;   // [N, C, H, W]
  const void* weight;  // [C, 1, kernel, kernel]
  const void* scale;   // [C], or null for 1
  const void* shift;   // [C], or null for 0
  void* output;        // [N, C, H, W]
};

struct FreluBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* scale;
  const void* shift;
  // Each may be null when not wanted.
  void* grad_input;
  void* grad_weight;
  void* grad_scale;
  void* grad_shift;
};

// The same with the convolution normalised by its mean and (biased) variance over the batch:
// scale = gamma / sqrt(var + eps), shift = beta - mean * scale.
struct FreluBatchNormForward {
  const void* input;
  const void* weight;
  const void* gamma;  // [C], or null for 1
  const void* beta;   // [C], or null for 0
  void* output;
  void* mean;  // [C]
  void* var;   // [C]
};

struct FreluBatchNormBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* var;
  // Each may be null when not wanted.
  void* grad_input;
  void* grad_weight;
  void* grad_gamma;
  void* grad_beta;
};

// Depthwise convolution with what follows it: output = act(scale * dwconv(input) + shift), its sizes and tensors those
// of the funnel activation, with batch statistics too.
struct DepthwiseConv2dParams {
  int64_t batch, channels, height, width, kernel;
  Activation activation;
  double eps;
  Dtype dtype;
  bool channels_last;
  static constexpr const char* kFields[] = {"batch",      "channels", "height", "width",        "kernel",
                                            "activation", "eps",      "dtype",  "channels_last"};
};

// The funnel activation on a GPU: output = max(input, (dwconv(input) - mean) * scale + shift). Its caller cuts the
// image into tiles. Every [C] is float32 and may be null: mean, shift, by_value and by_one for 0, scale for 1.
struct FreluTileParams {
  int64_t batch, channels, height, width, kernel;
  int64_t channel_block;  // channels of a tile, a power of two up to 64
  int64_t rows, columns;  // pixels of a tile
  int64_t parts;          // of the tiles, each summed by one block for every channel block; at most their number
  Dtype dtype;
  bool channels_last;
  static constexpr const char* kFields[] = {"batch", "channels", "height", "width", "kernel",       "channel_block",
                                            "rows",  "columns",  "parts",  "dtype", "channels_last"};
};

struct FreluTileForward {
  const void* input;   // [N, C, H, W]
  const void* weight;  // [C, 1, kernel, kernel]
  const void* mean;
  const void* scale;
  const void* shift;
  void* output;  // [N, C, H, W]
};

struct FreluTileStatistics {
  const void* input;
  const void* weight;
  void* statistics;  // [parts, 3, C] float32: number of results, their mean, and squared distances from it
};

struct FreluTileSums {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* mean;
  const void* scale;
  const void* shift;
  void* sums;  // [parts, 2, C] float32: of the gradient through the convolution, and of it times (convolution - mean)
};

// The convolution's gradient is scale * (what goes through it) + (convolution - mean) * by_value + by_one.
struct FreluTileBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* mean;
  const void* scale;
  const void* shift;
  const void* by_value;
  const void* by_one;
  void* grad_input;
  void* sums;  // [parts, C, kernel * kernel + 2] float32, zeroed: gradients of the taps, and the two sums as above
};

// Squeeze-and-excitation: output = input * gate(fc2(act(fc1(mean over pixels)))).
enum class Gate : int { sigmoid = 0, hard_sigmoid = 1 };

struct SqueezeExciteParams {
  int64_t batch, channels, pixels, hidden;
  Activation activation;  // relu or silu
  Gate gate;
  Dtype dtype;
  bool channels_last;  // input, output and their gradients
  static constexpr const char* kFields[] = {"batch",      "channels", "pixels", "hidden",
                                            "activation", "gate",     "dtype",  "channels_last"};
};

struct SqueezeExciteForward {
  const void* input;    // [N, C, pixels]
  const void* weight1;  // [hidden, C]
  const void* bias1;    // [hidden], or null
  const void* weight2;  // [C, hidden]
  const void* bias2;    // [C], or null
  void* output;         // [N, C, pixels]
};

struct SqueezeExciteBackward {
  const void* grad_output;
  const void* input;
  const void* weight1;
  const void* bias1;
  const void* weight2;
  const void* bias2;
  // Each may be null when not wanted.
  void* grad_input;
  void* grad_weight1;
  void* grad_bias1;
  void* grad_weight2;
  void* grad_bias2;
};

// Efficient channel attention: output = input * sigmoid(conv1d over channels(mean over pixels)), zero padding.
struct EcaParams {
  int64_t batch, channels, pixels, taps;
  Dtype dtype;
  bool channels_last;
  static constexpr const char* kFields[] = {"batch", "channels", "pixels", "taps", "dtype", "channels_last"};
};

struct EcaForward {
  const void* input;   // [N, C, pixels]
  const void* weight;  // [taps]
  void* output;
};

struct EcaBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  void* grad_input;   // or null
  void* grad_weight;  // or null
};

// Grouped 1x1 convolution: output = shuffle(act(scale * conv(input) + shift)). The shuffle writes channel
// i * (O / G) + j of the convolution to output channel j * G + i.
struct GroupConv1x1Params {
  int64_t batch, in_channels, out_channels, pixels, groups;
  Activation activation;
  bool shuffle;
  double eps;  // of the batch normalisation; the plain op has none
  Dtype dtype;
  bool channels_last;  // input, output and their gradients
  static constexpr const char* kFields[] = {"batch",      "in_channels", "out_channels", "pixels", "groups",
                                            "activation", "shuffle",     "eps",          "dtype",  "channels_last"};
};

// Of the type that the op computes in, not of dtype: scale, shift, gamma, beta, mean, var and their gradients.
struct GroupConv1x1Forward {
  const void* input;   // [N, C, pixels]
  const void* weight;  // [O, C / G]
  const void* scale;   // [O], or null for 1
  const void* shift;   // [O], or null for 0
  void* output;        // [N, O, pixels]
};

struct GroupConv1x1Backward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* scale;
  const void* shift;
  // Each may be null when not wanted.
  void* grad_input;
  void* grad_weight;
  void* grad_scale;
  void* grad_shift;
};

// The same with scale and shift from gamma, beta and the batch's own mean and (biased) variance of the convolution.
struct GroupConv1x1BatchNormForward {
  const void* input;
  const void* weight;
  const void* gamma;  // [O], or null for 1
  const void* beta;   // [O], or null for 0
  void* output;
  void* mean;         // [O]
  void* var;          // [O]
  void* convolution;  // [N * O * H * W + 1] of the compute type, in an order that the last number tells; or null
};

struct GroupConv1x1BatchNormBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* var;
  const void* convolution;  // null where it must be computed again
  // Each may be null when not wanted.
  void* grad_input;
  void* grad_weight;
  void* grad_gamma;
  void* grad_beta;
};

// Spatial attention: output = input * sigmoid(a map of one number for each pixel).
struct SpatialAttentionParams {
  int64_t batch, channels, height, width, kernel;
  bool pool;  // the map is a convolution of the channels' maximum and mean; else of the channels themselves
  Dtype dtype;
  bool channels_last;  // input, output and their gradients
  static constexpr const char* kFields[] = {"batch",  "channels", "height", "width",
                                            "kernel", "pool",     "dtype",  "channels_last"};
};

struct SpatialAttentionForward {
  const void* input;   // [N, C, H, W]
  const void* weight;  // [1, pool ? 2 : C, kernel, kernel]
  const void* bias;    // [1], or null
  void* output;        // [N, C, H, W]
};

struct SpatialAttentionBackward {
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* bias;
  // Each may be null when not wanted.
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
};

// <op>_cpu(params, tensors, threads) for every line of ops.inc. Throws std::bad_alloc where scratch memory is lacking.
#define X(name, Params, Tensors) void name##_cpu(const Params&, const Tensors&, int threads);
#include "cpu/ops.inc"
#undef X

// <op>_cuda(params, tensors, device, stream) for every line of ops.inc, in a build with the CUDA kernels: float32,
// bfloat16 and float16 on a CUDA stream of that device. Gradients that are scattered are float32 and added to, whatever
// dtype says; they come zeroed. Throws std::runtime_error where a launch fails, std::invalid_argument for what the
// kernels cannot take.
#define X(name, Params, Tensors) void name##_cuda(const Params&, const Tensors&, int device, void* stream);
#include "cuda/ops.inc"
#undef X

// Instruction-set variants of the CPU kernels, best last; `isa_name` is the one in use.
// It is chosen at load: the best that the CPU has, or the one that CELLOPS_ISA names.
int isa_count();
const char* isa_name_at(int index);
bool isa_supported(int index);
const char* isa_name();

}  // namespace cellops
