// From segment rewards and log-probabilities to advantages, in one pass over the tokens.
#pragma once

#include "segk/executor.h"
#include "segk/gae.h"
#include "segk/rewards.h"
#include "segk/rows.h"

namespace segk {

// Writes every token: 0 where mask is false, and there it reads nothing.
void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, Gae gae, float* advantages, float* returns,
                            float* token_rewards, float* kl, Executor executor);

}  // namespace segk
