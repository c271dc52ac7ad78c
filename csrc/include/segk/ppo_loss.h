// PPO's policy and value losses.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

enum class Aggregation : int32_t {
  token_mean = 0,
  seq_mean_token_mean = 1,
  seq_mean_token_sum = 2
};

// The weight of a token that is one of `count` action tokens of its row, when there are `tokens` in
// all and `seqs` rows have any.
SEGK_HD inline double token_weight(Aggregation aggregation, double count, double tokens,
                                   double seqs) {
  if (count == 0) return 0;
  switch (aggregation) {
    case Aggregation::seq_mean_token_mean:
      return 1 / (seqs * count);
    case Aggregation::seq_mean_token_sum:
      return 1 / seqs;
    default:
      return 1 / tokens;
  }
}

// What a loss sums over some rows: weighted terms, action tokens, rows that have any.
struct LossSums {
  double terms;
  double tokens;
  double seqs;
};

SEGK_HD inline LossSums combine(LossSums left, LossSums right) {
  return {left.terms + right.terms, left.tokens + right.tokens, left.seqs + right.seqs};
}

// The policy loss of one token. Low and high bound the log of the ratio, held where clipping lets
// the loss grow no further: then exp cannot overflow for a token whose term is bounded. NaN stays
// NaN.
struct PolicyTerm {
  float low;
  float high;

  template <class T>
  SEGK_HD T clipped(T log_ratio, T advantage) const {
    if (advantage >= 0) return log_ratio > high ? high : log_ratio;
    return log_ratio < low ? low : log_ratio;
  }
  // The log of the ratio in the loss. In double: terms cancel in the sum, and the errors of a
  // float's exp would remain.
  SEGK_HD double log_ratio(float logprob, float old_logprob, float advantage) const {
    return clipped<double>(static_cast<double>(logprob) - old_logprob, advantage);
  }
  SEGK_HD double loss(float logprob, float old_logprob, float advantage) const {
    return loss(exp(log_ratio(logprob, old_logprob, advantage)), advantage);
  }
  SEGK_HD static double loss(double ratio, float advantage) {
    return -static_cast<double>(advantage) * ratio;
  }
  // d loss / d logprob.
  SEGK_HD float grad(float logprob, float old_logprob, float advantage) const {
    return grad(logprob, old_logprob, advantage, expf(logprob - old_logprob));
  }
  SEGK_HD float grad(float logprob, float old_logprob, float advantage, float ratio) const {
    const float q = logprob - old_logprob;
    const bool is_clipped = (clipped(q, advantage) != q) & (q == q);
    return is_clipped ? 0.0f : -advantage * ratio;
  }
};

// The value loss of one token.
struct ValueTerm {
  float clip;

  SEGK_HD float loss(float value, float old_value, float ret) const {
    const Errors error(value, old_value, ret, clip);
    const float larger = error.plain_is_larger() ? error.plain : error.clipped;
    return 0.5f * larger * larger;
  }
  // d loss / d value.
  SEGK_HD float grad(float value, float old_value, float ret) const {
    const Errors error(value, old_value, ret, clip);
    return error.plain_is_larger() || error.inside ? error.plain : 0.0f;
  }

 private:
  struct Errors {
    float plain;
    float clipped;
    bool inside;  // clipping does not change the value

    SEGK_HD Errors(float value, float old_value, float ret, float clip) {
      const float low = old_value - clip;
      const float high = old_value + clip;
      inside = value >= low && value <= high;
      float limited = NAN;  // stays where an input is NaN
      if (inside) limited = value;
      if (value < low) limited = low;
      if (value > high) limited = high;
      plain = value - ret;
      clipped = limited - ret;
    }
    SEGK_HD bool plain_is_larger() const { return plain * plain >= clipped * clipped; }
  };
};

// loss is one float. row_weights [N], the weight of a token of each row, go to the backward pass,
// which writes every token: 0 where mask is false, and there it reads nothing.
void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void* scratch, Executor executor);
void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Executor executor);
void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    void* scratch, Executor executor);
void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Executor executor);

}  // namespace segk
