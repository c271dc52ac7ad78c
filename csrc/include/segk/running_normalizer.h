// What a running normaliser collects: moments of segment rewards over their relative position.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

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
