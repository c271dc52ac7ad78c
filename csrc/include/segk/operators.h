// The arithmetic of the sequence ops, token by token and pair by pair. Scans are written as
// associative `combine`s, so that a CPU walk and a GPU tree run the same functions.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/dtype.h"

namespace segk {

// What follows a token in its row: how many action tokens, and whether the entropy of the first of
// them is over the threshold.
struct Following {
  int64_t count;
  bool over;
};

SEGK_HD inline Following combine(Following left, Following right) {
  return {left.count + right.count, left.count ? left.over : right.over};
}

// Whether an action token ends its segment: `left` of its row's `total` follow it, and `over` says
// that the entropy at the boundary behind it is over the threshold.
SEGK_HD inline bool ends_segment(int64_t left, int64_t total, bool over, bool exclude_last) {
  const bool excluded = exclude_last && total > 1;
  if (left == 0) return !excluded;
  return over || (left == 1 && excluded);
}

// A run of tokens of one row, cut into segments by the ends in it.
struct Pieces {
  int64_t segments;   // ends
  int64_t first_end;  // token of the first one
  int64_t head;       // action tokens up to the first end; without one, all of them
  int64_t tail;       // action tokens behind the last end; without one, all of them
};

SEGK_HD inline Pieces combine(Pieces left, Pieces right) {
  return {left.segments + right.segments, left.segments ? left.first_end : right.first_end,
          left.segments ? left.head : left.head + right.head,
          right.segments ? right.tail : left.tail + right.tail};
}

// Ends passed so far in a row, and action tokens since the last of them: what the next end needs to
// know of the tokens before it.
struct Passed {
  int32_t ends;
  int32_t since;
};

SEGK_HD inline Passed combine(Passed left, Passed right) {
  return {left.ends + right.ends, right.ends ? right.since : left.since + right.since};
}

// What the first end of a run of tokens pays, 0 without one.
struct FirstEnd {
  float pays;
  bool found;
};

SEGK_HD inline FirstEnd combine(FirstEnd left, FirstEnd right) { return left.found ? left : right; }

// A sum over some tokens of a row, rewards at its ends or terms of a loss, and how many there are.
// Double: a row may hold a hundred thousand of them.
struct SegmentSum {
  double sum;
  int32_t count;

  SEGK_HD float score(bool mean) const {
    return static_cast<float>(mean && count > 1 ? sum / count : sum);
  }
};

SEGK_HD inline SegmentSum combine(SegmentSum left, SegmentSum right) {
  return {left.sum + right.sum, left.count + right.count};
}

// What a loss sums over some rows: terms, action tokens, rows that have any.
struct LossSums {
  double terms;
  double tokens;
  double seqs;
};

SEGK_HD inline LossSums combine(LossSums left, LossSums right) {
  return {left.terms + right.terms, left.tokens + right.tokens, left.seqs + right.seqs};
}

// Gradient of each end's reward, given that of the row's score.
SEGK_HD inline float segment_gradient(float dscore, int32_t count, bool mean) {
  return mean && count > 1 ? dscore / static_cast<float>(count) : dscore;
}

// log(1 + exp(x)), finite for every finite x.
SEGK_HD inline double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(-fabs(x))); }

SEGK_HD inline double sigmoid(double x) {
  const double small = exp(-fabs(x));  // never overflows
  return (x >= 0 ? 1.0 : small) / (1.0 + small);
}

// The loss of one pair and its gradient with respect to both scores.
struct PairLoss {
  double loss;
  double dchosen;
  double drejected;
};

SEGK_HD inline PairLoss bradley_terry(double chosen, double rejected, double margin,
                                      double smoothing, double center_coef) {
  const double d = chosen - rejected - margin;
  PairLoss pair;
  pair.loss = (1 - smoothing) * softplus(-d);
  double dd = -(1 - smoothing) * sigmoid(-d);
  if (smoothing > 0) {  // 0 * inf would be NaN
    pair.loss += smoothing * softplus(d);
    dd += smoothing * sigmoid(d);
  }
  double dsum = 0;
  if (center_coef > 0) {
    const double sum = chosen + rejected;
    pair.loss += center_coef * sum * sum;
    dsum = 2 * center_coef * sum;
  }
  pair.dchosen = dd + dsum;
  pair.drejected = -dd + dsum;
  return pair;
}

// Gradient of a row's score from those of the loss and of the scores, either null for zero.
SEGK_HD inline float score_gradient(const float* dloss, const float* dscores, const float* slopes,
                                    int64_t row) {
  const float of_loss = dloss ? *dloss * slopes[row] : 0.0f;
  return dscores ? of_loss + dscores[row] : of_loss;
}

// Losses of some pairs and how many of them are in the right order.
struct PairSums {
  double loss;
  int32_t right;
};

SEGK_HD inline PairSums combine(PairSums left, PairSums right) {
  return {left.loss + right.loss, left.right + right.right};
}

// The map x -> scale * x + shift: one step of a discounted backward sum, and any run of steps.
template <class T>
struct Affine {
  T scale;
  T shift;

  SEGK_HD T operator()(T x) const { return scale * x + shift; }
};

// `outer` after `inner`.
template <class T>
SEGK_HD inline Affine<T> combine(Affine<T> outer, Affine<T> inner) {
  return {outer.scale * inner.scale, outer(inner.shift)};
}

// Generalised advantage estimation, from the last action token of a row to the first. What a token
// leaves to the one before it, x_i = gamma V_i + gamma lam A_i, is an affine map of x_{i+1} that
// needs no other token: A_i = R_i - V_i + x_{i+1}. Double: a sum over a long row keeps the
// precision of its terms.
struct Gae {
  double gamma;
  double decay;  // gamma lam

  SEGK_HD Affine<double> leaves(double reward, double value) const {
    return {decay, decay * (reward - value) + gamma * value};
  }
  SEGK_HD static double advantage(double reward, double value, double ahead) {
    return reward - value + ahead;
  }
};

// Count, mean and summed squared deviation of a set of values, merged as by Chan, Golub and
// LeVeque.
struct Moments {
  double count;
  double mean;
  double m2;
};

SEGK_HD inline Moments combine(Moments left, Moments right) {
  const double count = left.count + right.count;
  if (count == 0) return {0, 0, 0};
  const double delta = right.mean - left.mean;
  const double share = right.count / count;
  return {count, left.mean + delta * share,
          left.m2 + right.m2 + delta * delta * left.count * share};
}

// Unit variance, floored; mean 0 where `center`, else the mean that was.
struct Whitening {
  double mean;
  double scale;
  double shift;

  SEGK_HD Whitening(Moments all, bool center) : mean(all.mean), shift(center ? 0 : all.mean) {
    const double floor = 1e-8;
    const double variance = all.count > 0 ? all.m2 / all.count : 0;
    scale = 1 / sqrt(variance < floor ? floor : variance);  // a comparison: NaN stays NaN
  }
  SEGK_HD float operator()(float x) const { return static_cast<float>((x - mean) * scale + shift); }
};

// PPO's policy loss of one token. Low and high bound the log of the ratio, held where clipping lets
// the loss grow no further: then exp cannot overflow for a token whose term is bounded. NaN stays
// NaN.
struct PolicyTerm {
  float low;
  float high;

  template <class T>
  SEGK_HD T limited(T log_ratio, T advantage) const {
    if (advantage >= 0) return log_ratio > high ? high : log_ratio;
    return log_ratio < low ? low : log_ratio;
  }
  // The log of the ratio that counts. Double: the terms cancel, and the errors of a float's exp
  // would remain.
  SEGK_HD double log_ratio(float logprob, float old_logprob, float advantage) const {
    return limited<double>(static_cast<double>(logprob) - old_logprob, advantage);
  }
  SEGK_HD double loss(float logprob, float old_logprob, float advantage) const {
    return loss(exp(log_ratio(logprob, old_logprob, advantage)), advantage);
  }
  SEGK_HD static double loss(double ratio, float advantage) {
    return -static_cast<double>(advantage) * ratio;
  }
  SEGK_HD float slope(float logprob, float old_logprob, float advantage) const {
    return slope(logprob, old_logprob, advantage, expf(logprob - old_logprob));
  }
  SEGK_HD float slope(float logprob, float old_logprob, float advantage, float ratio) const {
    const float q = logprob - old_logprob;
    const bool clipped = (limited(q, advantage) != q) & (q == q);
    return clipped ? 0.0f : -advantage * ratio;
  }
};

// PPO's value loss of one token.
struct ValueTerm {
  float clip;

  SEGK_HD float loss(float value, float old_value, float ret) const {
    const Errors error(value, old_value, ret, clip);
    const float counted = error.plain_counts() ? error.plain : error.clipped;
    return 0.5f * counted * counted;
  }
  SEGK_HD float slope(float value, float old_value, float ret) const {
    const Errors error(value, old_value, ret, clip);
    return error.plain_counts() || error.inside ? error.plain : 0.0f;
  }

 private:
  struct Errors {
    float plain;
    float clipped;
    bool inside;  // the clipped prediction is the prediction

    SEGK_HD Errors(float value, float old_value, float ret, float clip) {
      const float low = old_value - clip;
      const float high = old_value + clip;
      inside = value >= low && value <= high;
      float limited = NAN;  // what is neither inside, below nor above
      if (inside) limited = value;
      if (value < low) limited = low;
      if (value > high) limited = high;
      plain = value - ret;
      clipped = limited - ret;
    }
    SEGK_HD bool plain_counts() const { return plain * plain >= clipped * clipped; }
  };
};

}  // namespace segk
