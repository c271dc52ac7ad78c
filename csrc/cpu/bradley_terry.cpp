#include "segk/bradley_terry.h"

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "segk/storage.h"

namespace segk {
namespace {

template <class ScoreGrad>
void scatter_score_grads(ScoreGrad dscore, const int32_t* counts, const bool* ends,
                         const bool* mask, Rows rows, bool mean, float* drewards,
                         Executor executor) {
  const Flags marks = flags_of(ends);
  const Flags inside = mask ? flags_of(mask) : marks;
  for_each_row(rows, marks, kQuickTokensPerTask, executor, [&](const Row& row) {
    const float grad = reward_grad(dscore(row.index), counts[row.index], mean);
    row.blocks([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        drewards[t] = keep(marks[t] & inside[t], grad);
      }
    });
  });
}

}  // namespace

void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Executor executor) {
  const Flags marks = flags_of(ends);
  const Flags inside = mask ? flags_of(mask) : marks;
  with_storage(
      [&](auto r) {
        Scan<RowSum> scan({0, 0});
        for_each_row(rows, marks, kQuickTokensPerTask, executor, [&](const Row& row) {
          const RowSum sum = scan.total(row, [&](int64_t begin, int64_t end) {
            const auto reward = [&](int64_t t) { return r[t]; };
            return RowSum{sum_true(begin, end, reward, marks, inside),
                          static_cast<int32_t>(count_true(begin, end, marks, inside))};
          });
          scores[row.index] = row_score(sum, mean);
          counts[row.index] = sum.count;
        });
      },
      rewards);
}

void segment_scores_bwd(const float* dscores, const int32_t* counts, const bool* ends,
                        const bool* mask, Rows rows, bool mean, float* drewards,
                        Executor executor) {
  scatter_score_grads([&](int64_t row) { return dscores[row]; }, counts, ends, mask, rows, mean,
                      drewards, executor);
}

void segment_bradley_terry_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                               const float* margin, BradleyTerryOptions options, float* loss,
                               float* scores, float* accuracy, int32_t* counts, float* score_grads,
                               void*, Executor executor) {
  segment_scores_fwd(rewards, ends, mask, rows, options.mean, scores, counts, executor);
  const int64_t pairs = rows.count / 2;
  double total = 0;
  int64_t correct = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const float chosen = scores[i];
    const float rejected = scores[i + pairs];
    const PairLoss pair = pair_loss(chosen, rejected, margin ? margin[i] : 0.0f, options);
    total += pair.loss;
    correct += chosen > rejected;
    score_grads[i] = static_cast<float>(pair.dchosen / pairs);
    score_grads[i + pairs] = static_cast<float>(pair.drejected / pairs);
  }
  *loss = static_cast<float>(total / pairs);
  *accuracy = static_cast<float>(static_cast<double>(correct) / pairs);
}

void segment_bradley_terry_bwd(const float* dloss, const float* dscores, const float* score_grads,
                               const int32_t* counts, const bool* ends, const bool* mask, Rows rows,
                               bool mean, float* drewards, Executor executor) {
  scatter_score_grads([&](int64_t row) { return score_grad(dloss, dscores, score_grads, row); },
                      counts, ends, mask, rows, mean, drewards, executor);
}

}  // namespace segk
