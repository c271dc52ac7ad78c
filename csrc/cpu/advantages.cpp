// Moments are taken over blocks of a fixed size, and rows are summed and scanned as in blocks.h, so
// results do not depend on the number of threads.
#include "segk/advantages.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/elementary.h"
#include "cpu/flags.h"
#include "cpu/gae.h"
#include "cpu/payment.h"
#include "cpu/storage.h"
#include "segk/operators.h"

namespace segk {
namespace {

constexpr int64_t kMomentsBlock = 4096;

const Pieces kNoPieces{0, -1, 0, 0};

const Affine<double> kNoStep{1, 0};

// Token rewards less the KL penalty, whose estimate of a token is written when its reward is read.
template <class Logprobs>
struct Penalized {
  const float* rewards;
  Logprobs logprobs;
  Logprobs ref_logprobs;
  double kl_coef;
  float* kl;

  double operator[](int64_t t) const {
    const double estimate = static_cast<double>(logprobs[t]) - ref_logprobs[t];
    kl[t] = static_cast<float>(estimate);
    return rewards[t] - kl_coef * estimate;
  }
};

template <class Logprobs>
Quad four(const Penalized<Logprobs>& net, int64_t t) {
  const Quad estimate = segk::four(net.logprobs, t) - segk::four(net.ref_logprobs, t);
  store_floats(net.kl + t, estimate);
  return segk::four(net.rewards, t) - all_of(net.kl_coef) * estimate;
}

template <class Logprobs>
void clear(const Penalized<Logprobs>& net, int64_t begin, int64_t end) {
  std::fill(net.kl + begin, net.kl + end, 0.0f);
}

template <class X>
Moments moments_of_block(X x, Flags mask, int64_t begin, int64_t end) {
  const auto count = static_cast<double>(count_true(begin, end, mask));
  if (count == 0) return {0, 0, 0};
  const double mean = sum_true(begin, end, [&](int64_t t) { return x[t]; }, mask) / count;
  const auto square = [&](int64_t t) { return (x[t] - mean) * (x[t] - mean); };
  return {count, mean, sum_true(begin, end, square, mask)};
}

// Tokens whose terms of a loss are found together, step by step, so that each step is a loop that
// compilers vectorise.
constexpr int64_t kTerms = 256;

// Calls body(start, size) for [begin, end) in pieces, or skipped(start, size) for a piece without
// action tokens.
template <class Body, class Skipped>
void for_each_piece(int64_t begin, int64_t end, Flags mask, const Body& body,
                    const Skipped& skipped) {
  for (int64_t start = begin; start < end; start += kTerms) {
    const int64_t stop = std::min(start + kTerms, end);
    if (first_true(start, stop, mask) < stop) {
      body(start, stop - start);
    } else {
      skipped(start, stop - start);
    }
  }
}

// Sums what terms(start, size, out) fills over the action tokens of each row and weighs the rows.
template <class Terms>
void aggregate(Flags mask, Rows rows, Aggregation aggregation, float* loss, double* row_weights,
               Place place, const Terms& terms) {
  std::vector<double> sums(static_cast<size_t>(rows.count));
  Scan<SegmentSum> scan({0, 0});
  for_each_row(rows, mask, kTokensPerTask, place, [&](const Row& row) {
    const SegmentSum sum = scan.total(row, [&](int64_t begin, int64_t end) {
      double sum = 0;
      const auto add = [&](int64_t start, int64_t size) {
        double out[kTerms] = {};
        terms(start, size, out);
        const Flags actions{mask.data + start};
        sum += sum_true(0, size, [&](int64_t i) { return out[i]; }, actions);
      };
      for_each_piece(begin, end, mask, add, [](int64_t, int64_t) {});
      return SegmentSum{sum, static_cast<int32_t>(count_true(begin, end, mask))};
    });
    sums[row.index] = sum.sum;
    row_weights[row.index] = sum.count;
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

// Weighs what slopes(start, size, out) fills.
template <class Slopes>
void weigh_slopes(const float* dloss, Flags mask, Rows rows, const double* row_weights, float* out,
                  Place place, const Slopes& slopes) {
  for_each_row(rows, mask, kTokensPerTask, place, [&](const Row& row) {
    const float weight = static_cast<float>(*dloss * row_weights[row.index]);
    const auto weigh = [&](int64_t start, int64_t size) {
      float of_piece[kTerms];
      slopes(start, size, of_piece);
      for (int64_t i = 0; i < size; ++i) {
        out[start + i] = keep(mask[start + i], weight * of_piece[i]);
      }
    };
    const auto clear = [&](int64_t start, int64_t size) { std::fill_n(out + start, size, 0.0f); };
    row.blocks([&](int64_t, int64_t begin, int64_t end) {
      for_each_piece(begin, end, mask, weigh, clear);
    });
  });
}

// Ratios of the policies, held where the loss is clipped.
template <class X>
void ratios(PolicyTerm term, X logprobs, X old_logprobs, X advantages, int64_t start, int64_t size,
            double* out) {
  for (int64_t i = 0; i < size; ++i) {
    const int64_t t = start + i;
    out[i] = exp_double(term.log_ratio(logprobs[t], old_logprobs[t], advantages[t]));
  }
}

}  // namespace

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Place place) {
  with_storage(
      [&](auto r) {
        const Payment<decltype(r)> pay{r, flags_of(ends), flags_of(mask), credit, out};
        Scan<Pieces> pieces(kNoPieces);
        for_each_row(
            rows, pay.mask, kQuickTokensPerTask, place, [&](const Row& row) { pay(row, pieces); },
            out);
      },
      rewards);
}

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, double gamma, double lam,
             float* advantages, float* returns, Place place) {
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto r, auto v) {
        const Estimator estimate({gamma, gamma * lam}, r, v, actions, advantages, returns);
        Scan<Affine<double>> steps(kNoStep);
        for_each_row(
            rows, actions, kQuickTokensPerTask, place,
            [&](const Row& row) { estimate(row, steps); }, advantages, returns);
      },
      rewards, values);
}

void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, double gamma, double lam, float* advantages,
                            float* returns, float* token_rewards, float* kl, Place place) {
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto r, auto logp, auto ref, auto v) {
        const Payment<decltype(r)> pay{r, flags_of(ends), actions, credit, token_rewards};
        const Penalized<decltype(logp)> net{token_rewards, logp, ref, kl_coef, kl};
        const Estimator estimate({gamma, gamma * lam}, net, v, actions, advantages, returns);
        Scan<Pieces> pieces(kNoPieces);
        Scan<Affine<double>> steps(kNoStep);
        const auto both = [&](const Row& row) {
          pay(row, pieces);
          estimate(row, steps);
        };
        for_each_row(rows, actions, kQuickTokensPerTask, place, both, advantages, returns,
                     token_rewards, kl);
      },
      rewards, logprobs, ref_logprobs, values);
}

void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void*, Place place) {
  const int64_t blocks = (n + kMomentsBlock - 1) / kMomentsBlock;
  std::vector<Moments> parts(static_cast<size_t>(blocks));
  with_storage(
      [&](auto values) {
        const auto range = [&](int64_t first, int64_t last) {
          for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * kMomentsBlock;
            const int64_t end = std::min(begin + kMomentsBlock, n);
            parts[block] = moments_of_block(values, flags_of(mask), begin, end);
          }
        };
        parallel_for(blocks, kQuickTokensPerTask / kMomentsBlock, place, std::cref(range));
      },
      x);
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
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto values) {
        const auto range = [&](int64_t first, int64_t last) {
          for (int64_t t = first; t < last; ++t) out[t] = keep(actions[t], whitened(values[t]));
        };
        parallel_for(n, kQuickTokensPerTask, place, std::cref(range));
      },
      x);
}

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void*, Place place) {
  const PolicyTerm term{low, high};
  with_storage(
      [&](auto logp, auto old, auto advantage) {
        aggregate(flags_of(mask), rows, aggregation, loss, row_weights, place,
                  [&](int64_t start, int64_t size, double* out) {
                    ratios(term, logp, old, advantage, start, size, out);
                    for (int64_t i = 0; i < size; ++i) {
                      out[i] = term.loss(out[i], advantage[start + i]);
                    }
                  });
      },
      logprobs, old_logprobs, advantages);
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Place place) {
  const PolicyTerm term{low, high};
  with_storage(
      [&](auto logp, auto old, auto advantage) {
        weigh_slopes(dloss, flags_of(mask), rows, row_weights, dlogprobs, place,
                     [&](int64_t start, int64_t size, float* out) {
                       double ratio[kTerms] = {};
                       ratios(term, logp, old, advantage, start, size, ratio);
                       for (int64_t i = 0; i < size; ++i) {
                         const int64_t t = start + i;
                         const auto of_token = static_cast<float>(ratio[i]);
                         out[i] = term.slope(logp[t], old[t], advantage[t], of_token);
                       }
                     });
      },
      logprobs, old_logprobs, advantages);
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights, void*,
                    Place place) {
  const ValueTerm term{clip};
  with_storage(
      [&](auto value, auto old, auto ret) {
        aggregate(flags_of(mask), rows, aggregation, loss, row_weights, place,
                  [&](int64_t start, int64_t size, double* out) {
                    for (int64_t i = 0; i < size; ++i) {
                      const int64_t t = start + i;
                      out[i] = term.loss(value[t], old[t], ret[t]);
                    }
                  });
      },
      values, old_values, returns);
}

void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Place place) {
  const ValueTerm term{clip};
  with_storage(
      [&](auto value, auto old, auto ret) {
        weigh_slopes(dloss, flags_of(mask), rows, row_weights, dvalues, place,
                     [&](int64_t start, int64_t size, float* out) {
                       for (int64_t i = 0; i < size; ++i) {
                         const int64_t t = start + i;
                         out[i] = term.slope(value[t], old[t], ret[t]);
                       }
                     });
      },
      values, old_values, returns);
}

}  // namespace segk
