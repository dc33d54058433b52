// Which kind of tile, and which product, a grouped 1x1 convolution takes.
#pragma once
#include "group_conv1x1_by_channel.h"
#include "group_conv1x1_by_position.h"

namespace cellops::CELLOPS_ISA {

template <class Tile>
struct Kind {
  using type = Tile;
};

// Calls run(Kind of tile). Groups of one input channel would make pairs that are half nothing, and behind a
// normalisation the gradient to their weight is what rounding leaves of zero: the more, the shorter the operands.
template <class T, class Run>
bool with_kind_of_tile(const GroupConv1x1Params& p, const Run& run) {
  using M = MultiplyFor<T>;
  if (ByPosition<T, M>::fits(p)) return run(Kind<ByPosition<T, M>>{});
  if (p.in_channels == p.groups) return run(Kind<ByChannel<T, Multiply<Compute<T>>>>{});
  return run(Kind<ByChannel<T, M>>{});
}

}  // namespace cellops::CELLOPS_ISA
