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

// What a loss needs of some tokens, of action tokens and others alike.
struct Piece {
  double terms[kTerms];
  double squares[kTerms];
  uint8_t clipped[kTerms];

  // Over the action tokens among the first `size`.
  TokenSums sums(int64_t size, Flags mask, bool diagnostics) const {
    const auto count = static_cast<int32_t>(count_true(0, size, mask));
    const double sum = sum_true(0, size, [&](int64_t i) { return terms[i]; }, mask);
    if (!diagnostics) return {sum, 0, 0, count};
    return {sum,
            sum_true(
                0, size, [&](int64_t i) { return squares[i]; }, mask),
            static_cast<int32_t>(count_true(0, size, Flags{clipped}, mask)), count};
  }
};

// The loss from the pieces that terms(start, size, piece) fills, and the weight of each row's
// tokens.
template <class Terms>
void aggregate(Flags mask, Rows rows, Aggregation aggregation, LossOutputs out, double* row_weights,
               Executor executor, const Terms& terms) {
  const TokenSums none{0, 0, 0, 0};
  std::vector<TokenSums> sums(static_cast<size_t>(rows.count), none);
  Scan<TokenSums> scan(none);
  for_each_row(rows, mask, kTokensPerTask, executor, [&](const Row& row) {
    sums[row.index] = scan.total(row, [&](int64_t begin, int64_t end) {
      TokenSums sum = none;
      const auto add = [&](int64_t start, int64_t size) {
        Piece piece;
        terms(start, size, piece);
        sum = combine(sum, piece.sums(size, {mask.data + start}, out.clip_fraction != nullptr));
      };
      for_each_piece(begin, end, mask, add, [](int64_t, int64_t) {});
      return sum;
    });
  });
  double tokens = 0;
  double seqs = 0;
  for (const TokenSums& row : sums) {
    tokens += row.count;
    seqs += row.count > 0;
  }
  LossSums all{0, 0, 0, 0, 0};
  for (int64_t row = 0; row < rows.count; ++row) {
    row_weights[row] = token_weight(aggregation, sums[row].count, tokens, seqs);
    all = combine(all, weighted(sums[row], row_weights[row]));
  }
  out.write(all, 1);
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

// Ratios of the policies, held as in the loss.
template <class X>
void ratios(PolicyTerm term, X logprobs, X old_logprobs, X advantages, int64_t start, int64_t size,
            double* out) {
  for (int64_t i = 0; i < size; ++i) {
    const int64_t t = start + i;
    out[i] = exp_double(term.log_ratio(logprobs[t], old_logprobs[t], advantages[t]));
  }
}

// A function of values, none of which a store of bytes can change.
template <class X>
void diagnose(PolicyTerm term, X logprobs, X old_logprobs, X advantages, int64_t start,
              int64_t size, Piece& piece) {
  for (int64_t i = 0; i < size; ++i) {
    const double log_ratio = static_cast<double>(logprobs[start + i]) - old_logprobs[start + i];
    piece.squares[i] = log_ratio * log_ratio;
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t t = start + i;
    piece.clipped[i] = term.clipped(logprobs[t], old_logprobs[t], advantages[t]);
  }
}

}  // namespace

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, Floats ref_logprobs,
                     Floats entropy, const bool* mask, Rows rows, PolicyTerm term,
                     Aggregation aggregation, LossOutputs out, double* row_weights, void*,
                     Executor executor) {
  with_storage(
      [&](auto logp, auto old, auto advantage, auto ref, auto h) {
        const auto terms = [&](int64_t start, int64_t size, Piece& piece) {
          double* sums = piece.terms;
          ratios(term, logp, old, advantage, start, size, sums);
          for (int64_t i = 0; i < size; ++i) {
            sums[i] = term.surrogate(sums[i], advantage[start + i]);
          }
          diagnose(term, logp, old, advantage, start, size, piece);
          if (ref.data) {
            for (int64_t i = 0; i < size; ++i) {
              const double q = static_cast<double>(logp[start + i]) - ref[start + i];
              sums[i] += term.kl_coef * (expm1_double(-q) + q);
            }
          }
          if (h.data) {
            for (int64_t i = 0; i < size; ++i) sums[i] -= term.entropy_coef * h[start + i];
          }
        };
        aggregate(flags_of(mask), rows, aggregation, out, row_weights, executor, terms);
      },
      logprobs, old_logprobs, advantages, ref_logprobs, entropy);
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     Floats ref_logprobs, const bool* mask, Rows rows, PolicyTerm term,
                     const double* row_weights, float* dlogprobs, float* dentropy,
                     Executor executor) {
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto logp, auto old, auto advantage, auto ref) {
        const auto grads = [&](int64_t start, int64_t size, float* out) {
          double ratio[kTerms] = {};
          ratios(term, logp, old, advantage, start, size, ratio);
          for (int64_t i = 0; i < size; ++i) {
            const int64_t t = start + i;
            out[i] =
                term.surrogate_grad(logp[t], old[t], advantage[t], static_cast<float>(ratio[i]));
          }
          if (!ref.data) return;
          for (int64_t i = 0; i < size; ++i) {
            const double q = static_cast<double>(logp[start + i]) - ref[start + i];
            out[i] -= static_cast<float>(term.kl_coef * expm1_double(-q));
          }
        };
        weigh_grads(dloss, actions, rows, row_weights, dlogprobs, executor, grads);
      },
      logprobs, old_logprobs, advantages, ref_logprobs);
  if (!dentropy) return;
  for_each_row(rows, actions, kQuickTokensPerTask, executor, [&](const Row& row) {
    const auto grad = static_cast<float>(-term.entropy_coef * *dloss * row_weights[row.index]);
    row.blocks([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) dentropy[t] = keep(actions[t], grad);
    });
  });
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights, void*,
                    Executor executor) {
  const ValueTerm term{clip};
  with_storage(
      [&](auto value, auto old, auto ret) {
        aggregate(flags_of(mask), rows, aggregation, {loss, nullptr, nullptr}, row_weights,
                  executor, [&](int64_t start, int64_t size, Piece& piece) {
                    for (int64_t i = 0; i < size; ++i) {
                      const int64_t t = start + i;
                      piece.terms[i] = term.loss(value[t], old[t], ret[t]);
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
