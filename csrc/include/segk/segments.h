// Segment boundaries, segment scores and the Bradley-Terry loss. Only action tokens are read.
#pragma once

#include <cstdint>

#include "segk/place.h"
#include "segk/rows.h"

namespace segk {

// ends [T]; exclude_last [N], or null for `exclude_all` in every row. Writes every token of the
// rows. `current`: entropy[t] belongs to the distribution that produced t. Returns the first token
// whose NaN could decide a boundary, else -1; on GPUs always -1, because they would have to be
// waited for.
int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Place place);

// scores [N], counts [N] (segments per row); mask may be null.
void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Place place);

// drewards [T] from dscores [N]: zero wherever no reward was read.
void segment_scores_bwd(const float* dscores, const int32_t* counts, const bool* ends,
                        const bool* mask, Rows rows, bool mean, float* drewards, Place place);

struct BradleyTerryOptions {
  bool mean;
  double smoothing;
  double center_coef;
};

// Row i is chosen over row i + N/2; margin [N/2] may be null. Fills loss [1], scores [N],
// accuracy [1], counts [N] and slopes [N] = d loss / d scores.
void segment_bradley_terry_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                               const float* margin, BradleyTerryOptions options, float* loss,
                               float* scores, float* accuracy, int32_t* counts, float* slopes,
                               void* scratch, Place place);

// drewards [T] from dloss [1] and dscores [N]; either may be null for zeros.
void segment_bradley_terry_bwd(const float* dloss, const float* dscores, const float* slopes,
                               const int32_t* counts, const bool* ends, const bool* mask, Rows rows,
                               bool mean, float* drewards, Place place);

}  // namespace segk
