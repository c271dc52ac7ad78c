// From segment rewards to token rewards, advantages and PPO losses.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "segk/dtype.h"
#include "segk/place.h"
#include "segk/rows.h"

namespace segk {

// A normaliser of rewards over the relative position p of their segment:
//   mean(p) = mean_slope ln p + table_mean(p),  std(p) = max(std_slope ln p + table_std(p),
//   min_std)
// with tables that are linear between knots and constant beyond the ends. A log line has one knot,
// a table has no slope, a scalar has neither.
struct Curve {
  float mean_slope;
  float std_slope;
  float min_std;
  int32_t n_knots;     // 0: leave the reward as it is
  const float* knots;  // [3, n_knots]: positions, means, stds

  SEGK_HD float operator()(float reward, float p) const {
    return n_knots == 0 ? reward : (*this)(reward, p, logf(p));
  }
  // With log p and at least one knot.
  SEGK_HD float operator()(float reward, float p, float log_p) const {
    const float* means = knots + n_knots;
    const float* stds = means + n_knots;
    int32_t right = 0;
    while (right < n_knots && knots[right] < p) ++right;
    const int32_t left = right > 0 ? right - 1 : 0;
    if (right == n_knots) right = left;
    float mean = means[left];
    float std = stds[left];
    if (left != right) {
      const float weight = (p - knots[left]) / (knots[right] - knots[left]);
      mean += weight * (means[right] - mean);
      std += weight * (stds[right] - std);
    }
    return line(reward, log_p, mean, std);
  }
  SEGK_HD float line(float reward, float log_p, float mean, float std) const {
    mean += mean_slope * log_p;
    std += std_slope * log_p;
    return (reward - mean) / (std < min_std ? min_std : std);
  }
};

enum class Spread : int32_t { even = 0, repeat = 1, last = 2 };

// How the reward of a segment is paid to its tokens.
struct Credit {
  Curve curve;
  Spread spread;
  bool mean;
  float clip;

  // What each paid token of segment k of `segments` gets; `length` tokens long.
  SEGK_HD float operator()(float reward, int64_t k, int64_t segments, int64_t length) const {
    const float total = static_cast<float>(segments);
    const float position = static_cast<float>(k + 1) / total;
    return paid(reward, curve(reward, position), total, static_cast<float>(length));
  }
  // The same of a reward that is normalised to `share`.
  SEGK_HD float paid(float reward, float share, float total, float length) const {
    if (!(fabsf(reward) <= FLT_MAX)) return NAN;  // clipping would make infinity plausible
    if (spread == Spread::even) share /= length;
    if (mean) share /= total;
    // Comparisons, not fmin and fmax: NaN stays NaN.
    if (share < -clip) return -clip;
    return share > clip ? clip : share;
  }
};

enum class Aggregation : int32_t {
  token_mean = 0,
  seq_mean_token_mean = 1,
  seq_mean_token_sum = 2
};

// What a token weighs that is one of `count` action tokens of its row, when there are `tokens` in
// `seqs` rows that have any.
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

// Every op writes all tokens of its outputs: 0 where mask is false, and there it reads nothing.

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Place place);

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, double gamma, double lam,
             float* advantages, float* returns, Place place);

void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, double gamma, double lam, float* advantages,
                            float* returns, float* token_rewards, float* kl, Place place);

// moments: count, mean and summed squared deviation over x[mask].
void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void* scratch,
                 Place place);

void whiten_fwd(Floats x, const bool* mask, int64_t n, const double* moments, bool center,
                float* out, Place place);

// Losses: `loss` is one float; `row_weights` [N] is what a token of each row weighs in it, which
// the backward pass takes back.
void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void* scratch, Place place);
void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Place place);
void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    void* scratch, Place place);
void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Place place);

}  // namespace segk
