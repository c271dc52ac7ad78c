#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/segments.cuh"
#include "cuda/tokens.cuh"
#include "segk/segments.h"

namespace segk {
namespace {

struct EndsArgs {
  Floats entropy;
  const bool* mask;
  Rows rows;
  Boundaries boundaries;
  bool* ends;
  int rows_per_block;
};

__global__ void __launch_bounds__(kMaxThreads, 2) segment_ends_kernel(const EndsArgs a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t row, const Tiles& tiles) {
                 EndFinder find(group, a.boundaries, a.boundaries.excludes_last(row));
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Items items = tiles.items(tile);
                   const uint32_t action = load_flags(a.mask, items);
                   Fetched<Floats> entropy(a.entropy);
                   fetch(items, action, entropy);
                   store_flags(find(items, action, find.over(entropy)), a.ends, items);
                 }
                 find.finish(a.ends);
               });
}

}  // namespace

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, Boundaries boundaries, bool* ends,
                     Executor executor) {
  const RowGrid grid(rows);
  const EndsArgs args{entropy, mask, rows, boundaries, ends, grid.rows_per_block};
  launch("segment_ends", segment_ends_kernel, args, grid, ends, executor);
  return -1;
}

}  // namespace segk
