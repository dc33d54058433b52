// The funnel activation, backward.
#include "depthwise_backward.h"

namespace cellops::CELLOPS_ISA {

CELLOPS_DISPATCH(frelu_backward, depthwise_backward, FreluParams, FreluBackward)
CELLOPS_DISPATCH(frelu_batch_norm_backward, depthwise_backward, FreluParams, FreluBatchNormBackward)

}  // namespace cellops::CELLOPS_ISA
