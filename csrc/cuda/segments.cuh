// Finds the ends of segments, tile by tile.
#pragma once

#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/segments.h"

namespace segk {

// The ends of one row, tile by tile from the last to the first.
class EndFinder {
 public:
  __device__ EndFinder(Group group, const Boundaries& boundaries, bool exclude_last)
      : group_(group), boundaries_(boundaries), exclude_last_(exclude_last) {}

  // The items whose entropy is over the threshold.
  template <class Entropy>
  __device__ uint32_t over(const Entropy& entropy) const {
    float nats[kItems];
    entropy.unpack(nats);
    uint32_t over = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) over |= nats[i] > boundaries_.threshold ? 1u << i : 0;
    return over;
  }

  // The ends among a tile's action tokens. Of a row that has one action token alone: see below.
  __device__ uint32_t operator()(Items items, uint32_t action, uint32_t over) {
    over &= action;
    // As if the thread's action tokens were combined one by one.
    const TokensAhead mine{__popc(action), (over & (0u - action)) != 0};
    const auto [ahead, all] = group_.scan<From::right>(mine, behind_, TokensAhead{0, false});
    behind_ = all;

    uint32_t ends = over;
    if (boundaries_.current) {
      ends = 0;
      bool over_next = ahead.over;
#pragma unroll
      for (int i = kItems - 1; i >= 0; --i) {
        if (!has(action, i)) continue;
        if (over_next) ends |= 1u << i;
        over_next = has(over, i);
      }
    }
    // The last two action tokens of the row have rules of their own.
    uint32_t left = action;
    for (int32_t n = ahead.count; n < 2 && left != 0; ++n) {
      const int i = 31 - __clz(left);
      const uint32_t token = 1u << i;
      if (n == 0) last_ = items.first + i;
      const bool is_end = ends_segment(n, n + 2, (ends & token) != 0, exclude_last_);
      ends = is_end ? ends | token : ends & ~token;
      left ^= token;
    }
    return ends;
  }

  // Whether the tiles so far have one action token together. If they are the whole row, it is an
  // end, whatever was said of it.
  __device__ bool one_token() const { return behind_.count == 1; }

  // For rows of several tiles, when the ends of all of them have been stored.
  __device__ void finish(bool* ends) const {
    if (one_token() && last_ >= 0) ends[last_] = true;
  }

 private:
  Group group_;
  const Boundaries& boundaries_;
  bool exclude_last_;
  TokensAhead behind_{0, false};
  int64_t last_ = -1;  // the row's last action token, where this thread has it
};

}  // namespace segk
