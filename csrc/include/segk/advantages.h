// From segment rewards and log-probabilities to advantages, in one pass over the tokens.
#pragma once

#include "segk/executor.h"
#include "segk/gae.h"
#include "segk/rewards.h"
#include "segk/rows.h"
#include "segk/segments.h"

namespace segk {

// What advantages are made of, beside where segments end.
struct AdvantageInputs {
  Floats rewards;
  Floats logprobs;
  Floats ref_logprobs;
  Floats values;
  const bool* mask;
  Rows rows;
  Credit credit;
  double kl_coef;
  Gae gae;
};

struct AdvantageOutputs {
  float* advantages;
  float* returns;
  float* token_rewards;
  float* kl;
};

// Both write every token: 0 where mask is false, and what stands there changes nothing.
void segment_advantages_fwd(const AdvantageInputs& in, const bool* ends,
                            const AdvantageOutputs& out, Executor executor);

// segment_ends and segment_advantages_fwd together: the same numbers. Returns as segment_ends.
int64_t segment_ends_and_advantages_fwd(Floats entropy, Boundaries boundaries,
                                        const AdvantageInputs& in, bool* ends,
                                        const AdvantageOutputs& out, Executor executor);

}  // namespace segk
