// Normalisers of segment rewards over their relative position p in (0, 1], and what a running one
// collects.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/executor.h"
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

// The bin of segment k of `segments`.
SEGK_HD inline int64_t bin_of(int64_t k, int64_t segments, int64_t bins) {
  const double position = static_cast<double>(k + 1) / static_cast<double>(segments);
  const double nearest = nearbyint(position * static_cast<double>(bins));
  return nearest < 1 ? 0 : static_cast<int64_t>(nearest) - 1;
}

// moments [3, bins]: count, mean and summed squared deviation of the rewards of all segments whose
// relative position (k + 1) / K, times `bins`, rounds to bin + 1 (half to even; 0 counts as 1).
// not_finite [2]: how many of those rewards are not finite, and of how many. If none is, both are
// 0; if any is, the moments are.
void location_moments(Floats rewards, const bool* ends, const bool* mask, Rows rows, int64_t bins,
                      double* moments, int64_t* not_finite, void* scratch, Executor executor);

// How many bytes of scratch memory it wants for rows like these.
int64_t location_moments_scratch(Rows rows, int64_t bins);

}  // namespace segk
