// Depthwise convolution with what follows it, backward.
#include "depthwise_backward.h"

namespace cellops::CELLOPS_ISA {

CELLOPS_DISPATCH(depthwise_conv2d_backward, depthwise_backward, DepthwiseConv2dParams, FreluBackward)
CELLOPS_DISPATCH(depthwise_conv2d_batch_norm_backward, depthwise_backward, DepthwiseConv2dParams,
                 FreluBatchNormBackward)

}  // namespace cellops::CELLOPS_ISA
