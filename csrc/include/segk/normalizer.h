// Normalisers of segment rewards over their relative position p in (0, 1], and what a running one
// collects.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

// Mean and standard deviation as functions of p:
//   mean(p) = mean_slope ln p + table_mean(p),  std(p) = max(std_slope ln p + table_std(p),
//   min_std)
// with tables that are linear between knots and constant beyond the ends. A log line has one knot,
// a table has no slopes, a scalar has neither.
struct Curve {
  float mean_slope;
  float std_slope;
  float min_std;
  int32_t n_knots;     // 0: rewards stay as they are
  const float* knots;  // [3, n_knots]: positions, means, stds

  SEGK_HD float normalize(float reward, float p) const {
    return n_knots == 0 ? reward : normalize(reward, p, logf(p));
  }
  // Given log p; there must be a knot.
  SEGK_HD float normalize(float reward, float p, float log_p) const {
    const float* means = knots + n_knots;
    const float* stds = means + n_knots;
    int32_t right = 0;
    while (right < n_knots && knots[right] < p) ++right;
    const int32_t left = right > 0 ? right - 1 : 0;
    if (right == n_knots) right = left;
    float table_mean = means[left];
    float table_std = stds[left];
    if (left != right) {
      const float weight = (p - knots[left]) / (knots[right] - knots[left]);
      table_mean += weight * (means[right] - table_mean);
      table_std += weight * (stds[right] - table_std);
    }
    return normalize_by(reward, log_p, table_mean, table_std);
  }
  SEGK_HD float normalize_by(float reward, float log_p, float table_mean, float table_std) const {
    const float mean = table_mean + mean_slope * log_p;
    const float std = table_std + std_slope * log_p;
    return (reward - mean) / (std < min_std ? min_std : std);
  }
};

// moments [3, bins]: count, mean and summed squared deviation of the rewards of all segments whose
// relative position (k + 1) / K, times `bins`, rounds to bin + 1 (half to even; 0 counts as 1).
// Returns how many rewards are not finite; if any, the moments mean nothing. CPU only.
int64_t location_moments(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                         int64_t bins, double* moments, Executor executor);

}  // namespace segk
