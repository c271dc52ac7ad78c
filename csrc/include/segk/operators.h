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

// Rewards at the ends of a row. Double: a row may hold a hundred thousand segments.
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

}  // namespace segk
