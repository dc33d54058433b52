#include "frelu.h"

#include "launch.h"

namespace cellops {
CELLOPS_CUDA_ENTRY(frelu_forward, FreluTileParams, FreluTileForward)
CELLOPS_CUDA_ENTRY(frelu_statistics, FreluTileParams, FreluTileStatistics)
CELLOPS_CUDA_ENTRY(frelu_sums, FreluTileParams, FreluTileSums)
CELLOPS_CUDA_ENTRY(frelu_backward, FreluTileParams, FreluTileBackward)
}  // namespace cellops
