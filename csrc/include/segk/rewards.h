// From segment rewards to token rewards.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "segk/executor.h"
#include "segk/normalizer.h"
#include "segk/rows.h"

namespace segk {

enum class Spread : int32_t { even = 0, repeat = 1, last = 2 };

// How the reward of a segment is credited to its tokens.
struct Credit {
  Curve curve;
  Spread spread;
  bool mean;  // reduction: divide by the number of segments
  float clip;
  bool curve_on_gpu = false;  // the curve is in the GPU's memory, where the host cannot read it

  // The token reward in segment k of `segments`, which is `length` tokens long. `from` is the curve
  // or a copy of it.
  template <class Number>
  SEGK_HD float token_reward(PackedCurve<Number> from, float reward, int64_t k, int64_t segments,
                             int64_t length) const {
    const float total = static_cast<float>(segments);
    const float position = static_cast<float>(k + 1) / total;
    const float normalized =
        from.n_knots() == 0 ? reward : from.normalize(reward, position, logf(position));
    return spread_and_clip(reward, normalized, total, static_cast<float>(length));
  }
  // The same, given the normalised reward.
  SEGK_HD float spread_and_clip(float reward, float normalized, float segments,
                                float length) const {
    if (!(fabsf(reward) <= FLT_MAX)) return NAN;  // clipping would make infinity plausible
    if (spread == Spread::even) normalized /= length;
    if (mean) normalized /= segments;
    // Comparisons, not fmin and fmax: NaN stays NaN.
    if (normalized < -clip) return -clip;
    return normalized > clip ? clip : normalized;
  }
};

// A run of tokens of one row, cut into segments by the ends in it.
struct SegmentRun {
  int64_t segments;   // ends
  int64_t first_end;  // token of the first one
  int64_t head;       // action tokens up to the first end; without one, all of them
  int64_t tail;       // action tokens behind the last end; without one, all of them
};

SEGK_HD inline SegmentRun combine(SegmentRun left, SegmentRun right) {
  return {left.segments + right.segments, left.segments ? left.first_end : right.first_end,
          left.segments ? left.head : left.head + right.head,
          right.segments ? right.tail : left.tail + right.tail};
}

// What an end needs to know of the tokens of its row before it: how many ends, and how many action
// tokens since the last of them.
struct EndsBefore {
  int32_t ends;
  int32_t since;
};

SEGK_HD inline EndsBefore combine(EndsBefore left, EndsBefore right) {
  return {left.ends + right.ends, right.ends ? right.since : left.since + right.since};
}

// The token reward of the segment that ends first in a run of tokens; 0 where none ends in it.
struct FirstEnd {
  float token_reward;
  bool found;
};

SEGK_HD inline FirstEnd combine(FirstEnd left, FirstEnd right) { return left.found ? left : right; }

// Writes every token: 0 where mask is false, and there it reads nothing.
void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Executor executor);

}  // namespace segk
