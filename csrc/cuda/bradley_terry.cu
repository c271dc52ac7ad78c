#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/bradley_terry.h"

namespace segk {
namespace {

struct Scores {
  Floats rewards;
  const bool* ends;
  const bool* mask;
  Rows rows;
  bool mean;
  float* scores;
  int32_t* counts;
  int rows_per_block;
};

__device__ void score_rows(const Scores& a, int64_t first) {
  for_each_row(a.rows, first, a.rows_per_block, [&](Group group, int64_t row, const Tiles& tiles) {
    RowSum mine{0, 0};
    for (int32_t tile = 0; tile < tiles.count(); ++tile) {
      const Items items = tiles.items(tile);
      const uint32_t ends = load_flags(a.ends, items) & load_flags(a.mask, items);
      float rewards[kItems];
      load(a.rewards, items, ends, rewards);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (has(ends, i)) mine = combine(mine, RowSum{rewards[i], 1});
      }
    }
    const RowSum identity{0, 0};
    const RowSum sum = group.scan<From::left>(mine, identity, identity).total;
    if (group.rank() == 0) {
      a.scores[row] = row_score(sum, a.mean);
      a.counts[row] = sum.count;
    }
  });
}

__global__ void __launch_bounds__(kMaxThreads, 2) segment_scores_kernel(const Scores a) {
  score_rows(a, int64_t{blockIdx.x} * a.rows_per_block);
}

struct BradleyTerry {
  Scores scores;
  int64_t blocks;  // as many as the rows need, some of which one block of the grid may do
  const float* margin;
  BradleyTerryOptions options;
  float* loss;
  float* accuracy;
  float* score_grads;
  PairSums* parts;
  int64_t n_parts;
};

__global__ void __launch_bounds__(kMaxThreads, 1) bradley_terry_kernel(const BradleyTerry a) {
  static_assert(sizeof(PairSums) <= kBytesPerPart, "fits the scratch memory");
  const auto all_blocks = cooperative_groups::this_grid();
  for (int64_t b = blockIdx.x; b < a.blocks; b += gridDim.x) {
    score_rows(a.scores, b * a.scores.rows_per_block);
  }
  all_blocks.sync();

  const Group block(true);
  const PairSums identity{0, 0};
  const float* scores = a.scores.scores;
  const int64_t pairs = a.scores.rows.count / 2;
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    PairSums mine = identity;
    for (int64_t i = part * block.size() + block.rank(); i < pairs; i += a.n_parts * block.size()) {
      const float chosen = scores[i];
      const float rejected = scores[i + pairs];
      const PairLoss pair = pair_loss(chosen, rejected, a.margin ? a.margin[i] : 0.0f, a.options);
      mine = combine(mine, PairSums{pair.loss, chosen > rejected});
      a.score_grads[i] = static_cast<float>(pair.dchosen / static_cast<double>(pairs));
      a.score_grads[i + pairs] = static_cast<float>(pair.drejected / static_cast<double>(pairs));
    }
    const PairSums sum = block.scan<From::left>(mine, identity, identity).total;
    if (block.rank() == 0) a.parts[part] = sum;
  }
  all_blocks.sync();

  if (blockIdx.x != 0) return;
  const PairSums all = sum_of_parts(a.parts, a.n_parts, identity);
  if (block.rank() == 0) {
    *a.loss = static_cast<float>(all.loss / static_cast<double>(pairs));
    *a.accuracy = static_cast<float>(all.correct / static_cast<double>(pairs));
  }
}

struct RewardGrads {
  const float* dloss;
  const float* dscores;
  const float* score_grads;  // null: there is no loss
  const int32_t* counts;
  const bool* ends;
  const bool* mask;
  Rows rows;
  bool mean;
  float* drewards;
  int rows_per_block;
};

__global__ void __launch_bounds__(kMaxThreads, 2) reward_grads_kernel(const RewardGrads a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group, int64_t row, const Tiles& tiles) {
                 const float dscore = score_grad(a.dloss, a.dscores, a.score_grads, row);
                 const float grad = reward_grad(dscore, a.counts[row], a.mean);
                 for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                   const Items items = tiles.items(tile);
                   const uint32_t ends = load_flags(a.ends, items) & load_flags(a.mask, items);
                   float out[kItems];
#pragma unroll
                   for (int i = 0; i < kItems; ++i) out[i] = has(ends, i) ? grad : 0.0f;
                   store(out, a.drewards, items);
                 }
               });
}

}  // namespace

void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Executor executor) {
  const RowGrid grid(rows);
  const Scores args{rewards, ends, mask, rows, mean, scores, counts, grid.rows_per_block};
  launch("segment_scores", segment_scores_kernel, args, grid, scores, executor);
}

void segment_scores_bwd(const float* dscores, const int32_t* counts, const bool* ends,
                        const bool* mask, Rows rows, bool mean, float* drewards,
                        Executor executor) {
  const RowGrid grid(rows);
  const RewardGrads args{nullptr, dscores, nullptr, counts,   ends,
                         mask,    rows,    mean,    drewards, grid.rows_per_block};
  launch("segment_scores, backward", reward_grads_kernel, args, grid, drewards, executor);
}

void segment_bradley_terry_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                               const float* margin, BradleyTerryOptions options, float* loss,
                               float* scores, float* accuracy, int32_t* counts, float* score_grads,
                               void* scratch, Executor executor) {
  const RowGrid grid(rows);
  const int64_t pairs = rows.count / 2;
  const BradleyTerry args{
      {rewards, ends, mask, rows, options.mean, scores, counts, grid.rows_per_block},
      grid.blocks,
      margin,
      options,
      loss,
      accuracy,
      score_grads,
      static_cast<PairSums*>(scratch),
      std::min(ceil_div(pairs, grid.threads), kParts)};
  launch_cooperative("segment_bradley_terry", bradley_terry_kernel, args, grid.blocks, grid.threads,
                     executor);
}

void segment_bradley_terry_bwd(const float* dloss, const float* dscores, const float* score_grads,
                               const int32_t* counts, const bool* ends, const bool* mask, Rows rows,
                               bool mean, float* drewards, Executor executor) {
  const RowGrid grid(rows);
  const RewardGrads args{dloss, dscores, score_grads, counts,   ends,
                         mask,  rows,    mean,        drewards, grid.rows_per_block};
  launch("segment_bradley_terry, backward", reward_grads_kernel, args, grid, drewards, executor);
}

}  // namespace segk
