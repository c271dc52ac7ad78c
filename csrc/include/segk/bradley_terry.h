// Segment scores and the Bradley-Terry loss over them.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

// The score of a row from the sum of its segment rewards.
SEGK_HD inline float row_score(RowSum rewards, bool mean) {
  return static_cast<float>(mean && rewards.count > 1 ? rewards.sum / rewards.count : rewards.sum);
}

// d loss / d reward at each end of a row with `count` segments, given d loss / d score.
SEGK_HD inline float reward_grad(float dscore, int32_t count, bool mean) {
  return mean && count > 1 ? dscore / static_cast<float>(count) : dscore;
}

// d loss / d score of a row, where `score_grads` are those of the Bradley-Terry loss for dloss = 1
// and dscores come from other uses of the scores. dloss and dscores may be null for zero.
SEGK_HD inline float score_grad(const float* dloss, const float* dscores, const float* score_grads,
                                int64_t row) {
  const float of_loss = dloss ? *dloss * score_grads[row] : 0.0f;
  return dscores ? of_loss + dscores[row] : of_loss;
}

// log(1 + exp(x)), finite for every finite x.
SEGK_HD inline double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(-fabs(x))); }

SEGK_HD inline double sigmoid(double x) {
  const double small = exp(-fabs(x));  // never overflows
  return (x >= 0 ? 1.0 : small) / (1.0 + small);
}

struct BradleyTerryOptions {
  bool mean;
  double smoothing;
  double center_coef;
};

// The loss of one pair and its gradient in both scores.
struct PairLoss {
  double loss;
  double dchosen;
  double drejected;
};

SEGK_HD inline PairLoss pair_loss(double chosen, double rejected, double margin,
                                  const BradleyTerryOptions& options) {
  const double d = chosen - rejected - margin;
  PairLoss pair;
  pair.loss = (1 - options.smoothing) * softplus(-d);
  double dd = -(1 - options.smoothing) * sigmoid(-d);
  if (options.smoothing > 0) {  // 0 * inf would be NaN
    pair.loss += options.smoothing * softplus(d);
    dd += options.smoothing * sigmoid(d);
  }
  double dsum = 0;
  if (options.center_coef > 0) {
    const double sum = chosen + rejected;
    pair.loss += options.center_coef * sum * sum;
    dsum = 2 * options.center_coef * sum;
  }
  pair.dchosen = dd + dsum;
  pair.drejected = -dd + dsum;
  return pair;
}

// The losses of some pairs, and how many of the pairs are in the right order.
struct PairSums {
  double loss;
  int32_t correct;
};

SEGK_HD inline PairSums combine(PairSums left, PairSums right) {
  return {left.loss + right.loss, left.correct + right.correct};
}

// scores [N], counts [N] (segments per row); mask may be null.
void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Executor executor);

// drewards [T] from dscores [N]: zero wherever no reward was read.
void segment_scores_bwd(const float* dscores, const int32_t* counts, const bool* ends,
                        const bool* mask, Rows rows, bool mean, float* drewards, Executor executor);

// Row i is chosen over row i + N/2; margin [N/2] may be null. Fills loss [1], scores [N],
// accuracy [1], counts [N] and score_grads [N] = d loss / d scores.
void segment_bradley_terry_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                               const float* margin, BradleyTerryOptions options, float* loss,
                               float* scores, float* accuracy, int32_t* counts, float* score_grads,
                               void* scratch, Executor executor);

// drewards [T] from dloss [1] and dscores [N]; either may be null for zeros.
void segment_bradley_terry_bwd(const float* dloss, const float* dscores, const float* score_grads,
                               const int32_t* counts, const bool* ends, const bool* mask, Rows rows,
                               bool mean, float* drewards, Executor executor);

}  // namespace segk
