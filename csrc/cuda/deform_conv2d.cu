#include "deform_conv2d.h"

#include "launch.h"

namespace cellops {
CELLOPS_CUDA_ENTRY(deform_conv2d_columns, DeformConv2dTileParams, DeformConv2dColumns)
CELLOPS_CUDA_ENTRY(deform_conv2d_corners, DeformConv2dTileParams, DeformConv2dCorners)
}  // namespace cellops
