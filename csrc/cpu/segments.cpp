#include "segk/segments.h"

#include <atomic>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/storage.h"
#include "segk/operators.h"

namespace segk {
namespace {

// The smallest offending token that any thread met.
class FirstToken {
 public:
  void meet(int64_t token) {
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
  Following summarize(Entropy entropy, Flags mask, int64_t begin, int64_t end) const {
    const int64_t count = count_true(begin, end, mask);
    if (count == 0) return {0, false};
    return {count, entropy[first_true(begin, end, mask)] > threshold};
  }

  // Marks the ends of a block; returns the first token whose NaN could decide a boundary, or -1.
  template <class Entropy>
  int64_t walk(Entropy entropy, Flags mask, int64_t begin, int64_t end, Following before,
               Following after, bool exclude_last, uint8_t* ends) const {
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
    for (int64_t left = after.count; left <= 1; ++left) {
      t = last_true(begin, t, mask);
      if (t < begin) break;
      ends[t] = ends_segment(left, total, ends[t], exclude_last);
    }
    return any_nan ? first_nan(entropy, mask, begin, end, before) : -1;
  }

 private:
  template <class Entropy>
  int64_t first_nan(Entropy entropy, Flags mask, int64_t begin, int64_t end,
                    Following before) const {
    int64_t t = begin;
    // No token stands before the row's first action token, for whose end it could decide.
    if (current && before.count == 0) t = first_true(begin, end, mask) + 1;
    while (t < end && !(mask[t] && entropy[t] != entropy[t])) ++t;
    return t < end ? t : -1;
  }
};

template <class RowGradient>
void scatter_rows(RowGradient dscore, const int32_t* counts, const bool* ends, const bool* mask,
                  Rows rows, bool mean, float* drewards, Place place) {
  const Flags marks = flags_of(ends);
  const Flags inside = mask ? flags_of(mask) : marks;
  for_each_row(rows, marks, kQuickTokensPerTask, place, [&](const Row& row) {
    const float gradient = segment_gradient(dscore(row.index), counts[row.index], mean);
    row.blocks([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        drewards[t] = keep(marks[t] & inside[t], gradient);
      }
    });
  });
}

}  // namespace

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Place place) {
  FirstToken nan;
  const Boundaries boundaries{threshold, current};
  const Flags actions = flags_of(mask);
  uint8_t* out = reinterpret_cast<uint8_t*>(ends);
  with_storage(
      [&](auto h) {
        Scan<Following> scan({0, false});
        for_each_row(rows, actions, kQuickTokensPerTask, place, [&](const Row& row) {
          const bool exclude = exclude_last ? exclude_last[row.index] : exclude_all;
          scan.walk(
              row,
              [&](int64_t begin, int64_t end) {
                return boundaries.summarize(h, actions, begin, end);
              },
              [&](int64_t begin, int64_t end, Following before, Following after) {
                const int64_t met =
                    boundaries.walk(h, actions, begin, end, before, after, exclude, out);
                if (met >= 0) nan.meet(met);
              });
        });
      },
      entropy);
  return nan.get();
}

void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Place place) {
  const Flags marks = flags_of(ends);
  const Flags inside = mask ? flags_of(mask) : marks;
  with_storage(
      [&](auto r) {
        Scan<SegmentSum> scan({0, 0});
        for_each_row(rows, marks, kQuickTokensPerTask, place, [&](const Row& row) {
          const SegmentSum sum = scan.total(row, [&](int64_t begin, int64_t end) {
            const auto reward = [&](int64_t t) { return r[t]; };
            return SegmentSum{sum_true(begin, end, reward, marks, inside),
                              static_cast<int32_t>(count_true(begin, end, marks, inside))};
          });
          scores[row.index] = sum.score(mean);
          counts[row.index] = sum.count;
        });
      },
      rewards);
}

void segment_scores_bwd(const float* dscores, const int32_t* counts, const bool* ends,
                        const bool* mask, Rows rows, bool mean, float* drewards, Place place) {
  scatter_rows([&](int64_t row) { return dscores[row]; }, counts, ends, mask, rows, mean, drewards,
               place);
}

void segment_bradley_terry_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                               const float* margin, BradleyTerryOptions options, float* loss,
                               float* scores, float* accuracy, int32_t* counts, float* slopes,
                               void*, Place place) {
  segment_scores_fwd(rewards, ends, mask, rows, options.mean, scores, counts, place);
  const int64_t pairs = rows.count / 2;
  double total = 0;
  int64_t right = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const float chosen = scores[i];
    const float rejected = scores[i + pairs];
    const PairLoss pair = bradley_terry(chosen, rejected, margin ? margin[i] : 0.0f,
                                        options.smoothing, options.center_coef);
    total += pair.loss;
    right += chosen > rejected;
    slopes[i] = static_cast<float>(pair.dchosen / pairs);
    slopes[i + pairs] = static_cast<float>(pair.drejected / pairs);
  }
  *loss = static_cast<float>(total / pairs);
  *accuracy = static_cast<float>(static_cast<double>(right) / pairs);
}

void segment_bradley_terry_bwd(const float* dloss, const float* dscores, const float* slopes,
                               const int32_t* counts, const bool* ends, const bool* mask, Rows rows,
                               bool mean, float* drewards, Place place) {
  scatter_rows([&](int64_t row) { return score_gradient(dloss, dscores, slopes, row); }, counts,
               ends, mask, rows, mean, drewards, place);
}

}  // namespace segk
