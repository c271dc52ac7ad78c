#include "segk/advantages.h"

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/gae.h"
#include "cpu/rewards.h"
#include "cpu/segments.h"
#include "segk/storage.h"

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

// find_ends(row) is called before the ends of a row are read.
template <class Array, class FindEnds>
void estimate_rows(const AdvantageInputs& in, Array rewards, Array logprobs, Array ref_logprobs,
                   Array values, const bool* ends, const AdvantageOutputs& out, Executor executor,
                   const FindEnds& find_ends) {
  const Flags actions = flags_of(in.mask);
  const RewardScatter<Array> scatter{rewards, flags_of(ends), actions, in.credit,
                                     out.token_rewards};
  const PenalizedRewards<Array> penalized{out.token_rewards, logprobs, ref_logprobs, in.kl_coef,
                                          out.kl};
  const GaeEstimator estimate(in.gae, penalized, values, actions, out.advantages, out.returns);
  Scan<SegmentRun> runs(kNoSegments);
  Scan<Affine<double>> steps(kNoSteps);
  const auto all = [&](const Row& row) {
    find_ends(row);
    scatter(row, runs);
    estimate(row, steps);
  };
  for_each_row(in.rows, actions, kQuickTokensPerTask, executor, all, out.advantages, out.returns,
               out.token_rewards, out.kl);
}

}  // namespace

void segment_advantages_fwd(const AdvantageInputs& in, const bool* ends,
                            const AdvantageOutputs& out, Executor executor) {
  with_storage(
      [&](auto... arrays) { estimate_rows(in, arrays..., ends, out, executor, [](const Row&) {}); },
      in.rewards, in.logprobs, in.ref_logprobs, in.values);
}

int64_t segment_ends_and_advantages_fwd(Floats entropy, Boundaries boundaries,
                                        const AdvantageInputs& in, bool* ends,
                                        const AdvantageOutputs& out, Executor executor) {
  FirstToken nan;
  with_storage(
      [&](auto h, auto... arrays) {
        const EndFinder<decltype(h)> find{h, flags_of(in.mask), boundaries,
                                          reinterpret_cast<uint8_t*>(ends), &nan};
        Scan<TokensAhead> tokens(kNoTokens);
        estimate_rows(in, arrays..., ends, out, executor,
                      [&](const Row& row) { find(row, tokens); });
      },
      entropy, in.rewards, in.logprobs, in.ref_logprobs, in.values);
  return nan.get();
}

}  // namespace segk
