// The funnel activation (Ma et al. 2020), forward: the larger of x and a depthwise convolution around it.
#include "depthwise_forward.h"

namespace cellops::CELLOPS_ISA {

CELLOPS_DISPATCH(frelu_forward, depthwise_forward, FreluParams, FreluForward)
CELLOPS_DISPATCH(frelu_batch_norm_forward, depthwise_forward, FreluParams, FreluBatchNormForward)

}  // namespace cellops::CELLOPS_ISA
