#include "segk/advantages.h"

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/gae.h"
#include "cpu/rewards.h"
#include "cpu/storage.h"

namespace segk {
namespace {

// Token rewards minus the KL penalty. Reading that of a token writes its KL estimate.
template <class Logprobs>
struct PenalizedRewards {
  const float* token_rewards;
  Logprobs logprobs;
  Logprobs ref_logprobs;
  double kl_coef;
  float* kl;

  double operator[](int64_t t) const {
    const double estimate = static_cast<double>(logprobs[t]) - ref_logprobs[t];
    kl[t] = static_cast<float>(estimate);
    return token_rewards[t] - kl_coef * estimate;
  }
};

template <class Logprobs>
Vec4d load_vec4d(const PenalizedRewards<Logprobs>& rewards, int64_t t) {
  const Vec4d estimate =
      segk::load_vec4d(rewards.logprobs, t) - segk::load_vec4d(rewards.ref_logprobs, t);
  store_floats(rewards.kl + t, estimate);
  return segk::load_vec4d(rewards.token_rewards, t) - broadcast(rewards.kl_coef) * estimate;
}

template <class Logprobs>
void clear(const PenalizedRewards<Logprobs>& rewards, int64_t begin, int64_t end) {
  std::fill(rewards.kl + begin, rewards.kl + end, 0.0f);
}

}  // namespace

void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, Gae gae, float* advantages, float* returns,
                            float* token_rewards, float* kl, Executor executor) {
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto r, auto logp, auto ref, auto v) {
        const RewardScatter<decltype(r)> scatter{r, flags_of(ends), actions, credit, token_rewards};
        const PenalizedRewards<decltype(logp)> penalized{token_rewards, logp, ref, kl_coef, kl};
        const GaeEstimator estimate(gae, penalized, v, actions, advantages, returns);
        Scan<SegmentRun> runs(kNoSegments);
        Scan<Affine<double>> steps(kNoSteps);
        const auto both = [&](const Row& row) {
          scatter(row, runs);
          estimate(row, steps);
        };
        for_each_row(rows, actions, kQuickTokensPerTask, executor, both, advantages, returns,
                     token_rewards, kl);
      },
      rewards, logprobs, ref_logprobs, values);
}

}  // namespace segk
