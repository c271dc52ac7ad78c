#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/operators.h"
#include "segk/segments.h"

namespace segk {
namespace {

struct Ends {
  Floats entropy;
  const bool* mask;
  Rows rows;
  float threshold;
  bool current;
  const bool* exclude_last;
  bool exclude_all;
  bool* ends;
  int rows_per_block;
};

__device__ void ends_of_row(Group group, const Ends& a, int64_t row, int64_t begin, int64_t end) {
  const bool exclude_last = a.exclude_last ? a.exclude_last[row] : a.exclude_all;
  const Tiles tiles(group, begin, end);
  Following behind{0, false};
  int64_t last = -1;  // the row's last action token, where this thread has it
  for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
    const Octet octet = tiles.octet(tile);
    const uint32_t action = load_flags(a.mask, octet);
    float entropy[kItems];
    load(a.entropy, octet, action, entropy);
    uint32_t over = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) over |= entropy[i] > a.threshold ? 1u << i : 0;

    // The same as combining its action tokens one by one.
    const Following mine{__popc(action), (over & action & (0u - action)) != 0};
    const auto [before, total] = group.scan<From::right>(mine, behind, Following{0, false});
    // Only the last two need to know how many follow them.
    int32_t left = before.count < 2 ? static_cast<int32_t>(before.count) : 2;
    bool over_next = before.over;
    uint32_t ends = 0;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (!has(action, i)) continue;
      if (left == 0) last = octet.first + i;
      // Of the row's total it only matters whether there is another token before the last one,
      // and where there is none is seen at the row's start.
      const bool over_behind = a.current ? over_next : has(over, i);
      if (ends_segment(left, left + 2, over_behind, exclude_last)) ends |= 1u << i;
      over_next = has(over, i);
      left = left < 2 ? left + 1 : 2;
    }
    store_flags(ends, a.ends, octet);
    behind = total;
  }
  if (behind.count == 1 && last >= 0) a.ends[last] = ends_segment(0, 1, false, exclude_last);
}

__global__ void __launch_bounds__(kMaxThreads, 2) segment_ends_kernel(const Ends a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t row, int64_t begin, int64_t end) {
                 ends_of_row(group, a, row, begin, end);
               });
}

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
  for_each_row(a.rows, first, a.rows_per_block,
               [&](Group group, int64_t row, int64_t begin, int64_t end) {
                 const Tiles tiles(group, begin, end);
                 SegmentSum mine{0, 0};
                 for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                   const Octet octet = tiles.octet(tile);
                   const uint32_t ends = load_flags(a.ends, octet) & load_flags(a.mask, octet);
                   float rewards[kItems];
                   load(a.rewards, octet, ends, rewards);
#pragma unroll
                   for (int i = 0; i < kItems; ++i) {
                     if (has(ends, i)) mine = combine(mine, SegmentSum{rewards[i], 1});
                   }
                 }
                 const SegmentSum nothing{0, 0};
                 const SegmentSum sum = group.scan<From::left>(mine, nothing, nothing).total;
                 if (group.rank() == 0) {
                   a.scores[row] = sum.score(a.mean);
                   a.counts[row] = sum.count;
                 }
               });
}

__global__ void __launch_bounds__(kMaxThreads, 2) segment_scores_kernel(const Scores a) {
  score_rows(a, int64_t{blockIdx.x} * a.rows_per_block);
}

struct BradleyTerry {
  Scores scores;
  int64_t groups;
  const float* margin;
  BradleyTerryOptions options;
  float* loss;
  float* accuracy;
  float* slopes;
  PairSums* parts;
  int64_t n_parts;
};

__global__ void __launch_bounds__(kMaxThreads, 1) bradley_terry_kernel(const BradleyTerry a) {
  static_assert(sizeof(PairSums) <= kBytesPerPart, "fits the scratch memory");
  const auto grid = cooperative_groups::this_grid();
  for (int64_t group = blockIdx.x; group < a.groups; group += gridDim.x) {
    score_rows(a.scores, group * a.scores.rows_per_block);
  }
  grid.sync();

  const Group block(true);
  const PairSums nothing{0, 0};
  const float* scores = a.scores.scores;
  const int64_t pairs = a.scores.rows.count / 2;
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    PairSums mine = nothing;
    for (int64_t i = part * block.size() + block.rank(); i < pairs; i += a.n_parts * block.size()) {
      const float chosen = scores[i];
      const float rejected = scores[i + pairs];
      const PairLoss pair = bradley_terry(chosen, rejected, a.margin ? a.margin[i] : 0.0f,
                                          a.options.smoothing, a.options.center_coef);
      mine = combine(mine, PairSums{pair.loss, chosen > rejected});
      a.slopes[i] = static_cast<float>(pair.dchosen / static_cast<double>(pairs));
      a.slopes[i + pairs] = static_cast<float>(pair.drejected / static_cast<double>(pairs));
    }
    const PairSums sum = block.scan<From::left>(mine, nothing, nothing).total;
    if (block.rank() == 0) a.parts[part] = sum;
  }
  grid.sync();

  if (blockIdx.x != 0) return;
  const PairSums all = sum_of_parts(a.parts, a.n_parts, nothing);
  if (block.rank() == 0) {
    *a.loss = static_cast<float>(all.loss / static_cast<double>(pairs));
    *a.accuracy = static_cast<float>(all.right / static_cast<double>(pairs));
  }
}

struct ScoreGradients {
  const float* dloss;
  const float* dscores;
  const float* slopes;  // null: there is no loss
  const int32_t* counts;
  const bool* ends;
  const bool* mask;
  Rows rows;
  bool mean;
  float* drewards;
  int rows_per_block;
};

__global__ void __launch_bounds__(kMaxThreads, 2) score_gradients_kernel(const ScoreGradients a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t row, int64_t begin, int64_t end) {
                 const float dscore = score_gradient(a.dloss, a.dscores, a.slopes, row);
                 const float gradient = segment_gradient(dscore, a.counts[row], a.mean);
                 const Tiles tiles(group, begin, end);
                 for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                   const Octet octet = tiles.octet(tile);
                   const uint32_t ends = load_flags(a.ends, octet) & load_flags(a.mask, octet);
                   float out[kItems];
#pragma unroll
                   for (int i = 0; i < kItems; ++i) out[i] = has(ends, i) ? gradient : 0.0f;
                   store(out, a.drewards, octet);
                 }
               });
}

}  // namespace

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Place place) {
  const Division division(rows);
  const Ends args{entropy,      mask,        rows, threshold,    current,
                  exclude_last, exclude_all, ends, division.rows};
  launch("segment_ends", segment_ends_kernel, args, division.groups, division.threads, ends, place);
  return -1;
}

void segment_scores_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows, bool mean,
                        float* scores, int32_t* counts, Place place) {
  const Division division(rows);
  const Scores args{rewards, ends, mask, rows, mean, scores, counts, division.rows};
  launch("segment_scores", segment_scores_kernel, args, division.groups, division.threads, scores,
         place);
}

void segment_scores_bwd(const float* dscores, const int32_t* counts, const bool* ends,
                        const bool* mask, Rows rows, bool mean, float* drewards, Place place) {
  const Division division(rows);
  const ScoreGradients args{nullptr, dscores, nullptr, counts,   ends,
                            mask,    rows,    mean,    drewards, division.rows};
  launch("segment_scores, backward", score_gradients_kernel, args, division.groups,
         division.threads, drewards, place);
}

void segment_bradley_terry_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                               const float* margin, BradleyTerryOptions options, float* loss,
                               float* scores, float* accuracy, int32_t* counts, float* slopes,
                               void* scratch, Place place) {
  const Division division(rows);
  const int64_t pairs = rows.count / 2;
  const BradleyTerry args{{rewards, ends, mask, rows, options.mean, scores, counts, division.rows},
                          division.groups,
                          margin,
                          options,
                          loss,
                          accuracy,
                          slopes,
                          static_cast<PairSums*>(scratch),
                          std::min(ceil_div(pairs, division.threads), kParts)};
  launch_together("segment_bradley_terry", bradley_terry_kernel, args, division.groups,
                  division.threads, loss, place);
}

void segment_bradley_terry_bwd(const float* dloss, const float* dscores, const float* slopes,
                               const int32_t* counts, const bool* ends, const bool* mask, Rows rows,
                               bool mean, float* drewards, Place place) {
  const Division division(rows);
  const ScoreGradients args{dloss, dscores, slopes, counts,   ends,
                            mask,  rows,    mean,   drewards, division.rows};
  launch("segment_bradley_terry, backward", score_gradients_kernel, args, division.groups,
         division.threads, drewards, place);
}

}  // namespace segk
