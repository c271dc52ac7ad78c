#include "segk/gae.h"

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/gae.h"
#include "segk/storage.h"

namespace segk {

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, Gae gae, float* advantages,
             float* returns, Executor executor) {
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto r, auto v) {
        const GaeEstimator estimate(gae, r, v, actions, advantages, returns);
        Scan<Affine<double>> steps(kNoSteps);
        for_each_row(
            rows, actions, kQuickTokensPerTask, executor,
            [&](const Row& row) { estimate(row, steps); }, advantages, returns);
      },
      rewards, values);
}

}  // namespace segk
