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

class GaeScan {
 public:
  GaeScan(double gamma, double lam) : gae_{gamma, gamma * lam} {}

  void step(double reward, double value, float* advantage, float* ret) {
    const double exact = Gae::advantage(reward, value, ahead_);
    ahead_ = gae_.leaves(reward, value)(ahead_);
    *advantage = static_cast<float>(exact);
    *ret = static_cast<float>(exact + value);
  }

 private:
  Gae gae_;
  double ahead_ = 0;
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
    row_weights[row] = token_weight(aggregation, row_weights[row], tokens, seqs);
    if (row_weights[row] > 0) total += row_weights[row] * sums[row];
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

void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void*, Place place) {
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
  const Whitening whitened({moments[0], moments[1], moments[2]}, center);
  parallel_for(n, kTokensPerTask, place, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) out[t] = mask[t] ? whitened(x[t]) : 0.0f;
  });
}

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void*, Place place) {
  const PolicyTerm term{low, high};
  aggregate(mask, rows, aggregation, loss, row_weights, place,
            [&](int64_t t) { return term.loss(logprobs[t], old_logprobs[t], advantages[t]); });
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Place place) {
  const PolicyTerm term{low, high};
  weigh_slopes(dloss, mask, rows, row_weights, dlogprobs, place,
               [&](int64_t t) { return term.slope(logprobs[t], old_logprobs[t], advantages[t]); });
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights, void*,
                    Place place) {
  const ValueTerm term{clip};
  aggregate(mask, rows, aggregation, loss, row_weights, place,
            [&](int64_t t) { return term.loss(values[t], old_values[t], returns[t]); });
}

void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Place place) {
  const ValueTerm term{clip};
  weigh_slopes(dloss, mask, rows, row_weights, dvalues, place,
               [&](int64_t t) { return term.slope(values[t], old_values[t], returns[t]); });
}

}  // namespace segk
