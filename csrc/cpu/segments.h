// Finds the ends of segments in the rows of a stream.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "segk/segments.h"

namespace segk {

// The smallest of the tokens that threads report, -1 without one.
class FirstToken {
 public:
  void report(int64_t token) {
    int64_t known = token_.load(std::memory_order_relaxed);
    while ((known < 0 || token < known) && !token_.compare_exchange_weak(known, token)) {
    }
  }
  int64_t get() const { return token_.load(); }

 private:
  std::atomic<int64_t> token_{-1};
};

constexpr TokensAhead kNoTokens{0, false};

template <class Entropy>
struct EndFinder {
  Entropy entropy;
  Flags mask;
  Boundaries boundaries;
  uint8_t* ends;
  FirstToken* nan;  // that could decide a boundary

  void operator()(const Row& row, Scan<TokensAhead>& scan) const {
    const bool exclude_last = boundaries.excludes_last(row.index);
    scan.walk(
        row, [&](int64_t begin, int64_t end) { return summarize(begin, end); },
        [&](int64_t begin, int64_t end, TokensAhead before, TokensAhead after) {
          const int64_t token = walk(begin, end, before, after, exclude_last);
          if (token >= 0) nan->report(token);
        });
  }

 private:
  TokensAhead summarize(int64_t begin, int64_t end) const {
    const int64_t first = first_true(begin, end, mask);
    if (first == end) return kNoTokens;
    const bool more = first_true(first + 1, end, mask) < end;
    return {more ? 2 : 1, entropy[first] > boundaries.threshold};
  }

  // Marks the ends of a block; returns the first token whose NaN could decide a boundary, or -1.
  int64_t walk(int64_t begin, int64_t end, TokensAhead before, TokensAhead after,
               bool exclude_last) const {
    const uint8_t any_nan = mark(begin, end, entropy, mask, boundaries.threshold, ends);
    if (boundaries.current) {
      uint8_t over = after.over;
      for (int64_t t = end - 1; t >= begin; --t) {
        const uint8_t here = ends[t];
        ends[t] = mask[t] & over;
        over = mask[t] ? here : over;
      }
    }
    const int64_t total = before.count + count_true(begin, end, mask) + after.count;
    int64_t t = end;
    for (int64_t ahead = after.count; ahead <= 1; ++ahead) {
      t = last_true(begin, t, mask);
      if (t < begin) break;
      ends[t] = ends_segment(ahead, total, ends[t], exclude_last);
    }
    return any_nan ? first_nan(begin, end, before) : -1;
  }

  // Marks the action tokens over the threshold; returns whether one of them is NaN. Static, with
  // arguments of its own: bytes that are written could be members, which would be read every time.
  static uint8_t mark(int64_t begin, int64_t end, Entropy entropy, Flags mask, float threshold,
                      uint8_t* marks) {
    uint8_t any_nan = 0;
    for (int64_t t = begin; t < end; ++t) {
      const float h = entropy[t];
      any_nan |= mask[t] & static_cast<uint8_t>(h != h);
      marks[t] = mask[t] & static_cast<uint8_t>(h > threshold);
    }
    return any_nan;
  }

  int64_t first_nan(int64_t begin, int64_t end, TokensAhead before) const {
    int64_t t = begin;
    // The entropy of the row's first action token decides about no token before it.
    if (boundaries.current && before.count == 0) t = first_true(begin, end, mask) + 1;
    while (t < end && !(mask[t] && entropy[t] != entropy[t])) ++t;
    return t < end ? t : -1;
  }
};

}  // namespace segk
