// Rows are divided into groups by their number alone, and the tables of the groups are merged in
// order, so results do not depend on the number of threads.
#include "segk/running_normalizer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/flags.h"
#include "cpu/parallel.h"
#include "segk/moments.h"
#include "segk/storage.h"

namespace segk {
namespace {

constexpr int64_t kRowsPerGroup = 64;  // fewer would not pay for a table
constexpr int64_t kMostGroups = 16;

}  // namespace

int64_t location_moments_scratch(Rows, int64_t) { return 0; }

void location_moments(Floats rewards, const bool* ends, const bool* mask, Rows rows, int64_t bins,
                      double* moments, int64_t* not_finite, void*, Executor executor) {
  const Flags marks = flags_of(ends);
  const Flags actions = flags_of(mask);
  const int64_t groups =
      std::clamp<int64_t>((rows.count + kRowsPerGroup - 1) / kRowsPerGroup, 1, kMostGroups);
  const int64_t size = (rows.count + groups - 1) / groups;
  std::vector<Moments> tables(static_cast<size_t>(groups * bins), Moments{0, 0, 0});
  std::atomic<int64_t> found{0};

  with_storage(
      [&](auto r) {
        const auto range = [&](int64_t first, int64_t last) {
          for (int64_t row = first * size; row < std::min(last * size, rows.count); ++row) {
            Moments* table = &tables[(row / size) * bins];
            const int64_t begin = rows.begin(row);
            const int64_t end = rows.end(row);
            const int64_t segments = count_true(begin, end, marks, actions);
            int64_t k = segments;
            visit_true_backward(
                begin, end,
                [&](int64_t t) {
                  const double reward = r[t];
                  if (!std::isfinite(reward)) ++found;
                  Moments& bin = table[bin_of(--k, segments, bins)];
                  bin = combine(bin, Moments{1, reward, 0});
                },
                marks, actions);
          }
        };
        parallel_for(groups, 1, executor.threads_or_stream, std::cref(range));
      },
      rewards);

  double all_segments = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    Moments all = tables[bin];
    for (int64_t group = 1; group < groups; ++group) {
      all = combine(all, tables[group * bins + bin]);
    }
    all_segments += all.count;
    if (found) all = {0, 0, 0};
    moments[bin] = all.count;
    moments[bins + bin] = all.mean;
    moments[2 * bins + bin] = all.m2;
  }
  not_finite[0] = found;
  not_finite[1] = found ? static_cast<int64_t>(all_segments) : 0;
}

}  // namespace segk
