// Depthwise convolution with what follows it, forward.
#include "depthwise_forward.h"

namespace cellops::CELLOPS_ISA {

CELLOPS_DISPATCH(depthwise_conv2d_forward, depthwise_forward, DepthwiseConv2dParams, FreluForward)
CELLOPS_DISPATCH(depthwise_conv2d_batch_norm_forward, depthwise_forward, DepthwiseConv2dParams, FreluBatchNormForward)

}  // namespace cellops::CELLOPS_ISA
