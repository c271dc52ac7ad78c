#include "segk/rewards.h"

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/rewards.h"
#include "segk/storage.h"

namespace segk {

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Executor executor) {
  with_storage(
      [&](auto r) {
        const RewardScatter<decltype(r)> scatter{r, flags_of(ends), flags_of(mask), credit, out};
        Scan<SegmentRun> runs(kNoSegments);
        for_each_row(
            rows, scatter.mask, kQuickTokensPerTask, executor,
            [&](const Row& row) { scatter(row, runs); }, out);
      },
      rewards);
}

}  // namespace segk
