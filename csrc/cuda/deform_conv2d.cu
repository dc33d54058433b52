#include "deform_conv2d.h"
#include "deform_conv2d_scatter.h"

#include "launch.h"

namespace cellops {
CELLOPS_CUDA_ENTRY(deform_conv2d_columns, DeformConv2dTileParams, DeformConv2dColumns)
CELLOPS_CUDA_ENTRY(deform_conv2d_corners, DeformConv2dTileParams, DeformConv2dCorners)
CELLOPS_CUDA_ENTRY(deform_conv2d_scatter, DeformConv2dTileParams, DeformConv2dScatter)
}  // namespace cellops
