// Normalisers of segment rewards over their relative position p in (0, 1].
#pragma once

#include <cstdint>

#include "segk/rows.h"

namespace segk {

constexpr int kMaxKnots = 64;
constexpr int kCurveNumbers = 4 + 3 * kMaxKnots;  // of a packed curve, at most

// (reward - mean) / std, the latter floored.
SEGK_HD inline float normalize(float reward, float mean, float std, float min_std) {
  return (reward - mean) / (std < min_std ? min_std : std);
}

// Mean and standard deviation as functions of p:
//   mean(p) = mean_slope ln p + table_mean(p),  std(p) = max(std_slope ln p + table_std(p),
//   min_std)
// with tables that are linear between knots and constant beyond the ends. A log line has one knot,
// a table has no slopes, a scalar has neither. Number is float, or what reads as one.
template <class Number>
struct PackedCurve {
  // mean_slope, std_slope, min_std, the number of knots, then their positions, means and stds.
  // Null, or no knots: rewards stay as they are.
  const Number* packed;

  SEGK_HD int32_t n_knots() const { return packed ? static_cast<int32_t>(packed[3]) : 0; }

  // There must be a knot.
  SEGK_HD float normalize(float reward, float p, float log_p) const {
    const int32_t count = n_knots();
    const Number* positions = packed + 4;
    int32_t right = 0;
    while (right < count && positions[right] < p) ++right;
    const int32_t left = right > 0 ? right - 1 : 0;
    if (right == count) right = left;
    float weight = 0;
    if (left != right) weight = (p - positions[left]) / (positions[right] - positions[left]);
    const float mean = height(positions + count, left, right, weight) + packed[0] * log_p;
    const float std = height(positions + 2 * count, left, right, weight) + packed[1] * log_p;
    return segk::normalize(reward, mean, std, packed[2]);
  }

 private:
  SEGK_HD static float height(const Number* heights, int32_t left, int32_t right, float weight) {
    const float at_left = heights[left];
    return left == right ? at_left : at_left + weight * (heights[right] - at_left);
  }
};
using Curve = PackedCurve<float>;

}  // namespace segk
