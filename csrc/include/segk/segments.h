// Segment boundaries.
#pragma once

#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

// What follows a token in its row: how many action tokens, and whether the entropy of the first of
// them is over the threshold.
struct TokensAhead {
  int64_t count;
  bool over;
};

SEGK_HD inline TokensAhead combine(TokensAhead left, TokensAhead right) {
  return {left.count + right.count, left.count ? left.over : right.over};
}

// Whether an action token ends its segment: `ahead` of its row's `total` action tokens follow it,
// and `over` says that the entropy at the boundary behind it is over the threshold.
SEGK_HD inline bool ends_segment(int64_t ahead, int64_t total, bool over, bool exclude_last) {
  const bool excluded = exclude_last && total > 1;
  if (ahead == 0) return !excluded;
  return over || (ahead == 1 && excluded);
}

// ends [T]; exclude_last [N], or null for `exclude_all` in every row. Writes every token of the
// rows. `current`: entropy[t] belongs to the distribution that produced t. Returns the first token
// whose NaN could decide a boundary, else -1; always -1 on GPUs, where finding it would mean
// waiting for the kernel.
int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Executor executor);

}  // namespace segk
