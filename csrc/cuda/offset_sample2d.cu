#include "offset_sample2d_region.h"

#include "launch.h"

namespace cellops {
CELLOPS_CUDA_ENTRY(offset_sample2d_forward, OffsetSample2dParams, OffsetSample2dForward)
CELLOPS_CUDA_ENTRY(offset_sample2d_backward, OffsetSample2dParams, OffsetSample2dGradients)
}  // namespace cellops
