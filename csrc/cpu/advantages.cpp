// A row belongs to one thread and is read in order, and moments are taken over blocks of a fixed
// size, so results do not depend on the number of threads.
#include "segk/advantages.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "segk/operators.h"

namespace segk {
namespace {

constexpr int64_t kTokensPerTask = 16384;
constexpr int64_t kBlock = 4096;

template <class Body>
void for_each_row(Rows rows, Place place, Body body) {
  const int64_t grain = kTokensPerTask * rows.count / std::max<int64_t>(rows.tokens(), 1);
  parallel_for(rows.count, grain, place, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row, rows.begin(row), rows.end(row));
  });
}

// Pays the rewards of a row's segments to its tokens, from the last token to the first, and calls
// paid(t) after each action token. `out` holds the lengths of segments between the two walks.
template <class Paid>
void pay_row(Floats rewards, const bool* ends, const bool* mask, int64_t begin, int64_t end,
             const Credit& credit, float* out, Paid paid) {
  int64_t segments = 0;
  int64_t length = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!mask[t]) continue;
    ++length;
    if (!ends[t]) continue;
    out[t] = static_cast<float>(length);
    length = 0;
    ++segments;
  }
  int64_t k = segments;
  float share = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!mask[t]) {
      out[t] = 0;
      continue;
    }
    if (ends[t]) {
      --k;
      share = credit(rewards[t], k, segments, static_cast<int64_t>(out[t]));
    }
    out[t] = share;
    if (credit.spread == Spread::last) share = 0;
    paid(t);
  }
}

// The backward scan of generalised advantage estimation, one action token at a time. Double: a sum
// over a long row keeps the precision of its terms.
class GaeScan {
 public:
  GaeScan(double gamma, double lam) : gamma_(gamma), decay_(gamma * lam) {}

  void step(double reward, double value, float* advantage, float* ret) {
    const double delta = reward + gamma_ * next_value_ - value;
    advantage_ = Affine<double>{decay_, delta}(advantage_);
    next_value_ = value;
    *advantage = static_cast<float>(advantage_);
    *ret = static_cast<float>(advantage_ + value);
  }

 private:
  double gamma_;
  double decay_;
  double advantage_ = 0;
  double next_value_ = 0;
};

Moments moments_of_block(Floats x, const bool* mask, int64_t begin, int64_t end) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!mask[t]) continue;
    sum += x[t];
    ++count;
  }
  if (count == 0) return {0, 0, 0};
  const double mean = sum / static_cast<double>(count);
  double m2 = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (mask[t]) m2 += (x[t] - mean) * (x[t] - mean);
  }
  return {static_cast<double>(count), mean, m2};
}

// Sums term(t) over the action tokens of each row and weighs the rows.
template <class Term>
void aggregate(const bool* mask, Rows rows, Aggregation aggregation, float* loss,
               double* row_weights, Place place, Term term) {
  std::vector<double> sums(static_cast<size_t>(rows.count));
  for_each_row(rows, place, [&](int64_t row, int64_t begin, int64_t end) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (!mask[t]) continue;
      sum += term(t);
      ++count;
    }
    sums[row] = sum;
    row_weights[row] = static_cast<double>(count);
  });
  double tokens = 0;
  double seqs = 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    tokens += row_weights[row];
    seqs += row_weights[row] > 0;
  }
  double total = 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    const double count = row_weights[row];
    if (count == 0) continue;
    double& weight = row_weights[row];
    switch (aggregation) {
      case Aggregation::token_mean:
        weight = 1 / tokens;
        break;
      case Aggregation::seq_mean_token_mean:
        weight = 1 / (seqs * count);
        break;
      case Aggregation::seq_mean_token_sum:
        weight = 1 / seqs;
        break;
    }
    total += weight * sums[row];
  }
  *loss = static_cast<float>(total);
}

template <class Slope>
void weigh_slopes(const float* dloss, const bool* mask, Rows rows, const double* row_weights,
                  float* out, Place place, Slope slope) {
  for_each_row(rows, place, [&](int64_t row, int64_t begin, int64_t end) {
    const float weight = static_cast<float>(*dloss * row_weights[row]);
    for (int64_t t = begin; t < end; ++t) out[t] = mask[t] ? weight * slope(t) : 0.0f;
  });
}

// log of the ratio, held where clipping lets the loss grow no further: then exp cannot overflow
// for a token whose term is bounded. NaN stays NaN.
template <class T>
T limited_log_ratio(T log_ratio, T advantage, T low, T high) {
  if (advantage >= 0) return log_ratio > high ? high : log_ratio;
  return log_ratio < low ? low : log_ratio;
}

struct ValueError {
  float plain;
  float clipped;
  bool inside;  // the clipped prediction is the prediction

  ValueError(float value, float old_value, float ret, float clip) {
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
  bool plain_counts() const { return plain * plain >= clipped * clipped; }
};

}  // namespace

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Place place) {
  for_each_row(rows, place, [&](int64_t, int64_t begin, int64_t end) {
    pay_row(rewards, ends, mask, begin, end, credit, out, [](int64_t) {});
  });
}

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, double gamma, double lam,
             float* advantages, float* returns, Place place) {
  for_each_row(rows, place, [&](int64_t, int64_t begin, int64_t end) {
    GaeScan scan(gamma, lam);
    for (int64_t t = end - 1; t >= begin; --t) {
      if (mask[t]) {
        scan.step(rewards[t], values[t], advantages + t, returns + t);
      } else {
        advantages[t] = returns[t] = 0;
      }
    }
  });
}

void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, double gamma, double lam, float* advantages,
                            float* returns, float* token_rewards, float* kl, Place place) {
  for_each_row(rows, place, [&](int64_t, int64_t begin, int64_t end) {
    GaeScan scan(gamma, lam);
    for (float* out : {advantages, returns, kl}) std::fill(out + begin, out + end, 0.0f);
    pay_row(rewards, ends, mask, begin, end, credit, token_rewards, [&](int64_t t) {
      kl[t] = logprobs[t] - ref_logprobs[t];
      scan.step(token_rewards[t] - kl_coef * kl[t], values[t], advantages + t, returns + t);
    });
  });
}

void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, Place place) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<Moments> parts(static_cast<size_t>(blocks));
  parallel_for(blocks, kTokensPerTask / kBlock, place, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock;
      parts[block] = moments_of_block(x, mask, begin, std::min(begin + kBlock, n));
    }
  });
  for (int64_t step = 1; step < blocks; step *= 2) {
    for (int64_t i = 0; i + step < blocks; i += 2 * step) {
      parts[i] = combine(parts[i], parts[i + step]);
    }
  }
  const Moments all = blocks ? parts[0] : Moments{0, 0, 0};
  moments[0] = all.count;
  moments[1] = all.mean;
  moments[2] = all.m2;
}

void whiten_fwd(Floats x, const bool* mask, int64_t n, const double* moments, bool center,
                float* out, Place place) {
  const double count = moments[0];
  const double mean = moments[1];
  double variance = count > 0 ? moments[2] / count : 0;
  if (variance < kVarianceFloor) variance = kVarianceFloor;
  const double scale = 1 / std::sqrt(variance);
  const double shift = center ? 0 : mean;
  parallel_for(n, kTokensPerTask, place, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      out[t] = mask[t] ? static_cast<float>((x[t] - mean) * scale + shift) : 0.0f;
    }
  });
}

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, Place place) {
  aggregate(mask, rows, aggregation, loss, row_weights, place, [&](int64_t t) {
    // Double: the terms cancel, and the errors of a float's exp would remain.
    const double advantage = advantages[t];
    const double q = static_cast<double>(logprobs[t]) - old_logprobs[t];
    return -advantage * std::exp(limited_log_ratio<double>(q, advantage, low, high));
  });
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Place place) {
  weigh_slopes(dloss, mask, rows, row_weights, dlogprobs, place, [&](int64_t t) {
    const float advantage = advantages[t];
    const float q = logprobs[t] - old_logprobs[t];
    const bool clipped = limited_log_ratio<float>(q, advantage, low, high) != q && q == q;
    return clipped ? 0.0f : -advantage * std::exp(q);
  });
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    Place place) {
  aggregate(mask, rows, aggregation, loss, row_weights, place, [&](int64_t t) {
    const ValueError error(values[t], old_values[t], returns[t], clip);
    const float counted = error.plain_counts() ? error.plain : error.clipped;
    return 0.5f * counted * counted;
  });
}

void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Place place) {
  weigh_slopes(dloss, mask, rows, row_weights, dvalues, place, [&](int64_t t) {
    const ValueError error(values[t], old_values[t], returns[t], clip);
    return error.plain_counts() || error.inside ? error.plain : 0.0f;
  });
}

}  // namespace segk
