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

// What a loss sums over some action tokens of a row: its terms and, of the policy loss, what its
// diagnostics are made of.
struct TokenSums {
  double terms;
  double squares;   // of the log of the ratio
  int32_t clipped;  // tokens whose ratio is held by clipping
  int32_t count;    // tokens
};

SEGK_HD inline TokenSums combine(TokenSums left, TokenSums right) {
  return {left.terms + right.terms, left.squares + right.squares, left.clipped + right.clipped,
          left.count + right.count};
}

// The same over some rows, with terms weighted, and how many of the rows have action tokens.
struct LossSums {
  double terms;
  double squares;
  double clipped;
  double tokens;
  double seqs;
};

SEGK_HD inline LossSums combine(LossSums left, LossSums right) {
  return {left.terms + right.terms, left.squares + right.squares, left.clipped + right.clipped,
          left.tokens + right.tokens, left.seqs + right.seqs};
}

SEGK_HD inline LossSums weighted(const TokenSums& row, double weight) {
  if (row.count == 0) return {0, 0, 0, 0, 0};
  return {weight * row.terms, row.squares, static_cast<double>(row.clipped),
          static_cast<double>(row.count), 1};
}

// A loss and its diagnostics, one float each; the diagnostics may be null.
struct LossOutputs {
  float* loss;
  float* clip_fraction;  // mean over action tokens
  float* approx_kl;      // mean over action tokens of half the squared log of the ratio

  // From the sums over all rows, whose terms have yet to be multiplied by `weight`. Without action
  // tokens everything is 0.
  SEGK_HD void write(const LossSums& all, double weight) const {
    const double tokens = all.tokens > 0 ? all.tokens : 1;
    *loss = static_cast<float>(all.terms * weight);
    if (clip_fraction) *clip_fraction = static_cast<float>(all.clipped / tokens);
    if (approx_kl) *approx_kl = static_cast<float>(0.5 * all.squares / tokens);
  }
};

// The policy loss of one token,
//   -min(rho A, clip(rho) A) + kl_coef (exp(-q) - 1 + q) - entropy_coef H,
// rho = exp(logprob - old_logprob) and q = logprob - ref_logprob. `low` and `high` bound the log of
// the ratio, held where clipping lets the loss grow no further: then exp cannot overflow for a
// token whose term is bounded. NaN stays NaN.
struct PolicyTerm {
  float low;
  float high;
  double kl_coef;
  double entropy_coef;

  template <class T>
  SEGK_HD T held(T log_ratio, T advantage) const {
    if (advantage >= 0) return log_ratio > high ? high : log_ratio;
    return log_ratio < low ? low : log_ratio;
  }
  // The log of the ratio in the loss. In double: terms cancel in the sum, and the errors of a
  // float's exp would remain.
  SEGK_HD double log_ratio(float logprob, float old_logprob, float advantage) const {
    return held<double>(static_cast<double>(logprob) - old_logprob, advantage);
  }
  // Given the ratio.
  SEGK_HD static double surrogate(double ratio, float advantage) {
    return -static_cast<double>(advantage) * ratio;
  }
  SEGK_HD float surrogate_grad(float logprob, float old_logprob, float advantage,
                               float ratio) const {
    const float q = logprob - old_logprob;
    const bool is_held = (held(q, advantage) != q) & (q == q);
    return is_held ? 0.0f : -advantage * ratio;
  }
  // Whether the clipped surrogate is the smaller one.
  SEGK_HD bool clipped(float logprob, float old_logprob, float advantage) const {
    const float q = logprob - old_logprob;
    return ((advantage > 0) & (q > high)) | ((advantage < 0) & (q < low));
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

// row_weights [N], the weight of a token of each row, go to the backward pass, which writes every
// token: 0 where mask is false, and there it reads nothing. ref_logprobs and entropy may have null
// data, for a loss without that term; dentropy may be null.
void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, Floats ref_logprobs,
                     Floats entropy, const bool* mask, Rows rows, PolicyTerm term,
                     Aggregation aggregation, LossOutputs out, double* row_weights, void* scratch,
                     Executor executor);
void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     Floats ref_logprobs, const bool* mask, Rows rows, PolicyTerm term,
                     const double* row_weights, float* dlogprobs, float* dentropy,
                     Executor executor);
void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    void* scratch, Executor executor);
void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Executor executor);

}  // namespace segk
