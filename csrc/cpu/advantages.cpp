// Moments are taken over blocks of a fixed size, and rows are summed and scanned as in blocks.h, so
// results do not depend on the number of threads.
#include "segk/advantages.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/storage.h"
#include "segk/operators.h"
#include "segk/vocab.h"

namespace segk {
namespace {

constexpr int64_t kMomentsBlock = 4096;

// Pays the rewards of segments to their tokens.
template <class Rewards>
struct Payment {
  Rewards rewards;
  Flags ends;
  Flags mask;
  const Credit& credit;
  float* out;

  void operator()(const Row& row, Scan<Pieces>& scan) const {
    scan.walk(
        row, [&](int64_t begin, int64_t end) { return summarize(begin, end); },
        [&](int64_t begin, int64_t end, Pieces before, Pieces after) {
          walk(begin, end, before, after);
        });
  }

 private:
  Pieces summarize(int64_t begin, int64_t end) const {
    const int64_t segments = count_true(begin, end, ends, mask);
    const int64_t first = first_true(begin, end, ends, mask);
    return {segments, segments ? first : -1, count_true(begin, std::min(first + 1, end), mask),
            tail(begin, end, 0)};
  }

  // Action tokens of [begin, end) behind the last end; without one, all of them and `earlier`.
  int64_t tail(int64_t begin, int64_t end, int64_t earlier) const {
    const int64_t last = last_true(begin, end, ends, mask);
    return count_true(last + 1, end, mask) + (last < begin ? earlier : 0);
  }

  static constexpr int32_t kChunk = 256;

  // shares [found] of segments k, k + 1 ... of a row's `total` that end at tokens start + at, where
  // the row has had `upto` action tokens, `earlier` of them before these segments. Step by step, so
  // that each is a loop that compilers vectorise.
  void pay(int64_t start, int32_t found, const int32_t* at, const int32_t* upto, int64_t earlier,
           int64_t k, int64_t total, float* shares) const {
    float reward[kChunk];
    float position[kChunk];
    float length[kChunk];
    double log_position[kChunk];
    const auto all = static_cast<float>(total);
    for (int32_t i = 0; i < found; ++i) reward[i] = rewards[start + at[i]];
    for (int32_t i = 0; i < found; ++i) {
      position[i] = static_cast<float>(static_cast<int32_t>(k) + i + 1) / all;
      log_position[i] = position[i];
    }
    length[0] = static_cast<float>(upto[0] - earlier);
    for (int32_t i = 1; i < found; ++i) length[i] = static_cast<float>(upto[i] - upto[i - 1]);
    const Curve& curve = credit.curve;
    if (curve.n_knots > 0) log_double(log_position, log_position, found);
    if (curve.n_knots == 0) {
      std::copy(reward, reward + found, shares);
    } else if (curve.n_knots == 1) {
      const float mean = curve.knots[1];
      const float std = curve.knots[2];
      for (int32_t i = 0; i < found; ++i) {
        shares[i] = curve.line(reward[i], static_cast<float>(log_position[i]), mean, std);
      }
    } else {
      for (int32_t i = 0; i < found; ++i) {
        shares[i] = curve(reward[i], position[i], static_cast<float>(log_position[i]));
      }
    }
    for (int32_t i = 0; i < found; ++i) {
      shares[i] = credit.paid(reward[i], shares[i], all, length[i]);
    }
  }

  // From the last token to the first, some at a time: first all shares, then who gets which.
  void walk(int64_t begin, int64_t end, Pieces before, Pieces after) const {
    uint8_t action[kChunk];
    uint8_t closes[kChunk];  // whether a segment ends there
    int32_t at[kChunk];      // where they end, from the chunk's start on
    int32_t upto[kChunk];    // action tokens up to there
    float shares[kChunk + 1];
    int64_t k = before.segments + count_true(begin, end, ends, mask);
    const int64_t total = k + after.segments;
    float open = 0;  // the share of tokens whose end comes later
    if (after.segments) {
      open = credit(rewards[after.first_end], k, total, tail(begin, end, before.tail) + after.head);
    }
    for (int64_t stop = end; stop > begin;) {
      const int64_t start = std::max<int64_t>(stop - kChunk, begin);
      if (first_true(start, stop, mask) == stop) {  // padding
        std::fill(out + start, out + stop, 0.0f);
        stop = start;
        continue;
      }
      const auto size = static_cast<int32_t>(stop - start);
      for (int32_t i = 0; i < size; ++i) {
        action[i] = mask[start + i];
        closes[i] = ends[start + i] & mask[start + i];
      }
      int32_t tokens = 0;
      int32_t found = 0;
      for (int32_t i = 0; i < size; ++i) {
        tokens += action[i];
        at[found] = i;
        upto[found] = tokens;
        found += closes[i];
      }
      k -= found;
      if (found) pay(start, found, at, upto, -tail(begin, start, before.tail), k, total, shares);
      shares[found] = open;
      if (credit.spread == Spread::last) {
        std::fill(out + start, out + stop, 0.0f);
        for (int32_t i = 0; i < found; ++i) out[start + at[i]] = shares[i];
      } else {
        const float* share = shares;
        for (int32_t i = 0; i < size; ++i) {
          out[start + i] = keep(action[i], *share);
          share += closes[i];
        }
      }
      open = shares[0];
      stop = start;
    }
  }
};

const Pieces kNoPieces{0, -1, 0, 0};

template <class Reward, class Values>
void estimate(const Row& row, Scan<Affine<double>>& scan, Gae gae, Reward reward, Values values,
              Flags mask, float* advantages, float* returns) {
  scan.walk(
      row,
      [&](int64_t begin, int64_t end) {
        double ahead = 0;
        for (int64_t t = end - 1; t >= begin; --t) {
          if (mask[t]) ahead = gae.leaves(reward(t), values[t])(ahead);
        }
        // Not the product of all scales: it would be subnormal for most of the way, and slow.
        const auto count = static_cast<double>(count_true(begin, end, mask));
        return Affine<double>{std::pow(gae.decay, count), ahead};
      },
      [&](int64_t begin, int64_t end, Affine<double>, Affine<double> after) {
        const int64_t last = last_true(begin, end, mask);
        for (float* out : {advantages, returns}) std::fill(out + last + 1, out + end, 0.0f);
        double ahead = after(0);
        for (int64_t t = last; t >= begin; --t) {
          if (!mask[t]) {
            advantages[t] = returns[t] = 0;
            continue;
          }
          const double r = reward(t);
          const double value = values[t];
          const double advantage = Gae::advantage(r, value, ahead);
          advantages[t] = static_cast<float>(advantage);
          returns[t] = static_cast<float>(advantage + value);
          ahead = gae.leaves(r, value)(ahead);
        }
      });
}

const Affine<double> kNoStep{1, 0};

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
    out[i] = term.log_ratio(logprobs[t], old_logprobs[t], advantages[t]);
  }
  exp_double(out, out, size);
}

}  // namespace

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Place place) {
  with_storage(
      [&](auto r) {
        const Payment<decltype(r)> pay{r, flags_of(ends), flags_of(mask), credit, out};
        Scan<Pieces> pieces(kNoPieces);
        for_each_row(rows, pay.mask, kTokensPerTask, place,
                     [&](const Row& row) { pay(row, pieces); });
      },
      rewards);
}

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, double gamma, double lam,
             float* advantages, float* returns, Place place) {
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto r, auto v) {
        Scan<Affine<double>> steps(kNoStep);
        for_each_row(rows, actions, kTokensPerTask, place, [&](const Row& row) {
          const auto reward = [&](int64_t t) -> double { return r[t]; };
          estimate(row, steps, {gamma, gamma * lam}, reward, v, actions, advantages, returns);
        });
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
        Scan<Pieces> pieces(kNoPieces);
        Scan<Affine<double>> steps(kNoStep);
        for_each_row(rows, actions, kTokensPerTask, place, [&](const Row& row) {
          pay(row, pieces);
          row.blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
              kl[t] = keep(actions[t], logp[t] - ref[t]);
            }
          });
          const auto reward = [&](int64_t t) { return token_rewards[t] - kl_coef * kl[t]; };
          estimate(row, steps, {gamma, gamma * lam}, reward, v, actions, advantages, returns);
        });
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
