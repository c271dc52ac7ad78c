#include "segk/ppo_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/elementary.h"
#include "cpu/flags.h"
#include "segk/storage.h"

namespace segk {
namespace {

// How many tokens are taken together, one step after the other, so that each step is a loop that
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

// The loss from the terms that terms(start, size, out) fills, and the weight of each row's tokens.
template <class Terms>
void aggregate(Flags mask, Rows rows, Aggregation aggregation, float* loss, double* row_weights,
               Executor executor, const Terms& terms) {
  std::vector<double> sums(static_cast<size_t>(rows.count));
  Scan<RowSum> scan({0, 0});
  for_each_row(rows, mask, kTokensPerTask, executor, [&](const Row& row) {
    const RowSum sum = scan.total(row, [&](int64_t begin, int64_t end) {
      double sum = 0;
      const auto add = [&](int64_t start, int64_t size) {
        double out[kTerms] = {};
        terms(start, size, out);
        const Flags actions{mask.data + start};
        sum += sum_true(0, size, [&](int64_t i) { return out[i]; }, actions);
      };
      for_each_piece(begin, end, mask, add, [](int64_t, int64_t) {});
      return RowSum{sum, static_cast<int32_t>(count_true(begin, end, mask))};
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

// The weighted gradients of the terms that term_grads(start, size, out) fills.
template <class TermGrads>
void weigh_grads(const float* dloss, Flags mask, Rows rows, const double* row_weights, float* out,
                 Executor executor, const TermGrads& term_grads) {
  for_each_row(rows, mask, kTokensPerTask, executor, [&](const Row& row) {
    const float weight = static_cast<float>(*dloss * row_weights[row.index]);
    const auto weigh = [&](int64_t start, int64_t size) {
      float grads[kTerms];
      term_grads(start, size, grads);
      for (int64_t i = 0; i < size; ++i) {
        out[start + i] = keep(mask[start + i], weight * grads[i]);
      }
    };
    const auto clear = [&](int64_t start, int64_t size) { std::fill_n(out + start, size, 0.0f); };
    row.blocks([&](int64_t, int64_t begin, int64_t end) {
      for_each_piece(begin, end, mask, weigh, clear);
    });
  });
}

// Ratios of the policies, clipped as in the loss.
template <class X>
void ratios(PolicyTerm term, X logprobs, X old_logprobs, X advantages, int64_t start, int64_t size,
            double* out) {
  for (int64_t i = 0; i < size; ++i) {
    const int64_t t = start + i;
    out[i] = exp_double(term.log_ratio(logprobs[t], old_logprobs[t], advantages[t]));
  }
}

}  // namespace

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void*, Executor executor) {
  const PolicyTerm term{low, high};
  with_storage(
      [&](auto logp, auto old, auto advantage) {
        aggregate(flags_of(mask), rows, aggregation, loss, row_weights, executor,
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
                     float* dlogprobs, Executor executor) {
  const PolicyTerm term{low, high};
  with_storage(
      [&](auto logp, auto old, auto advantage) {
        weigh_grads(dloss, flags_of(mask), rows, row_weights, dlogprobs, executor,
                    [&](int64_t start, int64_t size, float* out) {
                      double ratio[kTerms] = {};
                      ratios(term, logp, old, advantage, start, size, ratio);
                      for (int64_t i = 0; i < size; ++i) {
                        const int64_t t = start + i;
                        const auto of_token = static_cast<float>(ratio[i]);
                        out[i] = term.grad(logp[t], old[t], advantage[t], of_token);
                      }
                    });
      },
      logprobs, old_logprobs, advantages);
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights, void*,
                    Executor executor) {
  const ValueTerm term{clip};
  with_storage(
      [&](auto value, auto old, auto ret) {
        aggregate(flags_of(mask), rows, aggregation, loss, row_weights, executor,
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
                    float* dvalues, Executor executor) {
  const ValueTerm term{clip};
  with_storage(
      [&](auto value, auto old, auto ret) {
        weigh_grads(dloss, flags_of(mask), rows, row_weights, dvalues, executor,
                    [&](int64_t start, int64_t size, float* out) {
                      for (int64_t i = 0; i < size; ++i) {
                        const int64_t t = start + i;
                        out[i] = term.grad(value[t], old[t], ret[t]);
                      }
                    });
      },
      values, old_values, returns);
}

}  // namespace segk
