// A row belongs to one thread and is read in order, so results do not depend on their number.
#include "segk/segments.h"

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"
#include "segk/operators.h"

namespace segk {
namespace {

constexpr int64_t kTokensPerTask = 16384;

int64_t rows_per_task(Rows rows) {
  return std::max<int64_t>(kTokensPerTask * rows.count / std::max<int64_t>(rows.tokens(), 1), 1);
}

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

int64_t ends_of_row(Floats entropy, const bool* mask, int64_t begin, int64_t end, float threshold,
                    bool current, bool exclude_last, bool* ends) {
  const int64_t total = std::count(mask + begin, mask + end, true);
  int64_t nan = -1;
  Following after{0, false};
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!mask[t]) {
      ends[t] = false;
      continue;
    }
    const bool decides = !(current && after.count == total - 1);
    const float h = decides ? entropy[t] : threshold;
    if (h != h) nan = t;
    const Following here{1, h > threshold};
    ends[t] = ends_segment(after.count, total, current ? after.over : here.over, exclude_last);
    after = combine(here, after);
  }
  return nan;
}

SegmentSum sum_of_row(Floats rewards, const bool* ends, const bool* mask, int64_t begin,
                      int64_t end) {
  SegmentSum sum{0, 0};
  for (int64_t t = begin; t < end; ++t) {
    if (ends[t] && (!mask || mask[t])) sum = combine(sum, SegmentSum{rewards[t], 1});
  }
  return sum;
}

template <class RowGradient>
void scatter_rows(RowGradient dscore, const int32_t* counts, const bool* ends, const bool* mask,
                  Rows rows, bool mean, float* drewards, Place place) {
  parallel_for(rows.count, rows_per_task(rows), place, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float gradient = segment_gradient(dscore(row), counts[row], mean);
      const int64_t end = rows.end(row);
      for (int64_t t = rows.begin(row); t < end; ++t) {
        drewards[t] = ends[t] && (!mask || mask[t]) ? gradient : 0.0f;
      }
    }
  });
}

}  // namespace

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Place place) {
  FirstToken nan;
  parallel_for(rows.count, rows_per_task(rows), place, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t met =
          ends_of_row(entropy, mask, rows.begin(row), rows.end(row), threshold, current,
                      exclude_last ? exclude_last[row] : exclude_all, ends);
      if (met >= 0) nan.meet(met);
    }
  });
  return nan.get();
}

void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Place place) {
  parallel_for(rows.count, rows_per_task(rows), place, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const SegmentSum sum = sum_of_row(rewards, ends, mask, rows.begin(row), rows.end(row));
      scores[row] = sum.score(mean);
      counts[row] = sum.count;
    }
  });
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
