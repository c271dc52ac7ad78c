// What a running normaliser collects. CPU only: it is kept on the host.
#pragma once

#include <cstdint>

#include "segk/place.h"
#include "segk/rows.h"

namespace segk {

// moments [3, bins]: count, mean and summed squared deviation of the rewards of all segments whose
// relative position (k + 1) / K, times `bins`, rounds to bin + 1 (half to even; 0 counts as 1).
// Returns how many rewards are not finite; if any, the moments mean nothing.
int64_t location_moments(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                         int64_t bins, double* moments, Place place);

}  // namespace segk
