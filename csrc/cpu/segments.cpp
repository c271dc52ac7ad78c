#include "segk/segments.h"

#include <atomic>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/storage.h"

namespace segk {
namespace {

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

struct Boundaries {
  float threshold;
  bool current;

  template <class Entropy>
  TokensAhead summarize(Entropy entropy, Flags mask, int64_t begin, int64_t end) const {
    const int64_t count = count_true(begin, end, mask);
    if (count == 0) return {0, false};
    return {count, entropy[first_true(begin, end, mask)] > threshold};
  }

  // Marks the ends of a block; returns the first token whose NaN could decide a boundary, or -1.
  template <class Entropy>
  int64_t walk(Entropy entropy, Flags mask, int64_t begin, int64_t end, TokensAhead before,
               TokensAhead after, bool exclude_last, uint8_t* ends) const {
    uint8_t any_nan = 0;
    for (int64_t t = begin; t < end; ++t) {
      const float h = entropy[t];
      any_nan |= mask[t] & static_cast<uint8_t>(h != h);
      ends[t] = mask[t] & static_cast<uint8_t>(h > threshold);
    }
    if (current) {
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
    return any_nan ? first_nan(entropy, mask, begin, end, before) : -1;
  }

 private:
  template <class Entropy>
  int64_t first_nan(Entropy entropy, Flags mask, int64_t begin, int64_t end,
                    TokensAhead before) const {
    int64_t t = begin;
    // The entropy of the row's first action token decides about no token before it.
    if (current && before.count == 0) t = first_true(begin, end, mask) + 1;
    while (t < end && !(mask[t] && entropy[t] != entropy[t])) ++t;
    return t < end ? t : -1;
  }
};

}  // namespace

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Executor executor) {
  FirstToken nan;
  const Boundaries boundaries{threshold, current};
  const Flags actions = flags_of(mask);
  uint8_t* out = reinterpret_cast<uint8_t*>(ends);
  with_storage(
      [&](auto h) {
        Scan<TokensAhead> scan({0, false});
        for_each_row(rows, actions, kQuickTokensPerTask, executor, [&](const Row& row) {
          const bool exclude = exclude_last ? exclude_last[row.index] : exclude_all;
          scan.walk(
              row,
              [&](int64_t begin, int64_t end) {
                return boundaries.summarize(h, actions, begin, end);
              },
              [&](int64_t begin, int64_t end, TokensAhead before, TokensAhead after) {
                const int64_t token =
                    boundaries.walk(h, actions, begin, end, before, after, exclude, out);
                if (token >= 0) nan.report(token);
              });
        });
      },
      entropy);
  return nan.get();
}

}  // namespace segk
