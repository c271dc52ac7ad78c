#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
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
  TokensAhead behind{0, false};
  int64_t last = -1;  // the row's last action token, where this thread has it
  for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
    const Items items = tiles.items(tile);
    const uint32_t action = load_flags(a.mask, items);
    float entropy[kItems];
    load(a.entropy, items, action, entropy);
    uint32_t over = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) over |= entropy[i] > a.threshold ? 1u << i : 0;

    // As if the thread's action tokens were combined one by one.
    const TokensAhead mine{__popc(action), (over & action & (0u - action)) != 0};
    const auto [before, total] = group.scan<From::right>(mine, behind, TokensAhead{0, false});
    // Counted up to 2 only: the rules look at the last two action tokens of a row.
    int32_t ahead = before.count < 2 ? static_cast<int32_t>(before.count) : 2;
    bool over_next = before.over;
    uint32_t ends = 0;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (!has(action, i)) continue;
      if (ahead == 0) last = items.first + i;
      // Of the row's total it matters only whether the row has a single action token. That is known
      // at the end of the walk and corrected below.
      const bool over_behind = a.current ? over_next : has(over, i);
      if (ends_segment(ahead, ahead + 2, over_behind, exclude_last)) ends |= 1u << i;
      over_next = has(over, i);
      ahead = ahead < 2 ? ahead + 1 : 2;
    }
    store_flags(ends, a.ends, items);
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

}  // namespace

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, float threshold, bool current,
                     const bool* exclude_last, bool exclude_all, bool* ends, Executor executor) {
  const RowGrid grid(rows);
  const Ends args{entropy,      mask,        rows, threshold,          current,
                  exclude_last, exclude_all, ends, grid.rows_per_block};
  launch("segment_ends", segment_ends_kernel, args, grid, ends, executor);
  return -1;
}

}  // namespace segk
