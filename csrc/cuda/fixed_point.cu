#include "fixed_point.h"

#include "launch.h"

namespace cellops {
CELLOPS_CUDA_ENTRY(fixed_point, FixedPointParams, FixedPoint)
}  // namespace cellops
