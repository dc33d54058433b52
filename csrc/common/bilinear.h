// Bilinear sampling at a real point of an image whose outside is zero: one truth for every backend.
//
// The template runs on scalars and on vectors of points alike: R is a real type, I the integer type of its width.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace cellops::CELLOPS_ISA {

// Corners in the order (top, left), (top, right), (bottom, left), (bottom, right).
template <class R, class I>
struct Sample {
  R weight[4];      // bilinear weights, not yet times the mask; NaN where a coordinate is NaN
  I index[4];       // y * width + x of the corner, or -1 where it lies outside: its value is an exact zero
  R bottom, right;  // fractions of the point inside its cell; 0 where the point is outside or NaN
  R nan;            // NaN where a coordinate is NaN, else 0
  I top, left;      // of the first corner, which may lie beside the image; 0 where the point is outside or NaN
};

// Where a point lies and how its four corners weigh.
//
// A point counts as inside for -1 <= y < height and -1 <= x < width. At y == -1 the value is 0 by its weights while
// the derivative to y is the row below, as the floor convention's right derivative wants it.
// `none` is -1; ToInt truncates R to I, ToReal converts back.
template <class R, class I, class ToInt, class ToReal>
CELLOPS_HD Sample<R, I> sample_point(R y, R x, R height, R width, I width_int, I last_row, I last_column, R zero,
                                     R nan_value, I none, const ToInt& to_int, const ToReal& to_real) {
  Sample<R, I> s;
  const R one = zero + 1;
  const auto inside = (y >= -one) & (y < height) & (x >= -one) & (x < width);
  const auto is_nan = (y != y) | (x != x);
  y = inside ? y : zero;
  x = inside ? x : zero;
  // Floor: truncate, then step down where that rounded up.
  I top = to_int(y), left = to_int(x);
  top += (to_real(top) > y) ? none : none + 1;
  left += (to_real(left) > x) ? none : none + 1;
  s.bottom = y - to_real(top);
  s.right = x - to_real(left);
  s.top = top;
  s.left = left;
  const auto has_top = inside & (top >= 0), has_bottom = inside & (top < last_row);
  const auto has_left = left >= 0, has_right = left < last_column;
  const I first = top * width_int + left;
  s.index[0] = (has_top & has_left) ? first : none;
  s.index[1] = (has_top & has_right) ? first + 1 : none;
  s.index[2] = (has_bottom & has_left) ? first + width_int : none;
  s.index[3] = (has_bottom & has_right) ? first + width_int + 1 : none;
  s.nan = is_nan ? nan_value : zero;
  s.weight[0] = (one - s.bottom) * (one - s.right) + s.nan;
  s.weight[1] = (one - s.bottom) * s.right + s.nan;
  s.weight[2] = s.bottom * (one - s.right) + s.nan;
  s.weight[3] = s.bottom * s.right + s.nan;
  return s;
}

// Derivatives of the sample along y and x, from the corner values (or from sums over channels of them).
template <class R>
CELLOPS_HD R derivative_y(R right, R v0, R v1, R v2, R v3) {
  return (1 - right) * (v2 - v0) + right * (v3 - v1);
}
template <class R>
CELLOPS_HD R derivative_x(R bottom, R v0, R v1, R v2, R v3) {
  return (1 - bottom) * (v1 - v0) + bottom * (v3 - v2);
}

}  // namespace cellops::CELLOPS_ISA
