// Segment boundaries.
#pragma once

#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

// What follows a token in its row: how many action tokens, where 2 may stand for any more, and
// whether the entropy of the first of them is over the threshold.
struct TokensAhead {
  int32_t count;
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

// Where entropies cut.
struct Boundaries {
  float threshold;
  bool current;              // entropy[t] belongs to the distribution that produced t
  const bool* exclude_last;  // [N], or null for `exclude_all` in every row
  bool exclude_all;

  SEGK_HD bool excludes_last(int64_t row) const {
    return exclude_last ? exclude_last[row] : exclude_all;
  }
};

// ends [T]: writes every token of the rows. Returns the first token whose NaN could decide a
// boundary, else -1; always -1 on GPUs, where finding it would mean waiting for the kernel.
int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, Boundaries boundaries, bool* ends,
                     Executor executor);

}  // namespace segk
