#include <cooperative_groups.h>

#include <cfloat>
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/moments.h"
#include "segk/rewards.h"
#include "segk/running_normalizer.h"

namespace segk {
namespace {

constexpr int kThreads = 256;  // at most: with more, the divisions of doubles would lack registers

struct Count {
  int64_t n;
};

__device__ inline Count combine(Count left, Count right) { return {left.n + right.n}; }

// How the rows are divided: into parts, whose number depends on nothing but the rows, with a table
// of moments for each row that a block works on at the same time.
struct Division {
  RowGrid grid;
  int64_t parts;
  int64_t tables;

  explicit Division(Rows rows)
      : grid(rows),
        parts(std::min(grid.blocks, kParts / grid.rows_per_block)),
        tables(parts * grid.rows_per_block) {
    grid.threads = std::min(grid.threads, kThreads);
  }
};

struct LocationArgs {
  Floats rewards;
  const bool* ends;
  const bool* mask;
  Rows rows;
  int64_t bins;
  int rows_per_block;
  int64_t n_parts;
  Moments* tables;       // [n_parts, rows_per_block, bins]
  Count* not_finite_of;  // [n_parts]
  double* moments;
  int64_t* not_finite;
};

// Adds the segments of a row to a table, tile by tile. Of the segments in a tile that belong to the
// same bin, the thread of the first one adds them all: no two threads write the same bin. Counts
// what this thread has seen.
__device__ void add_row(Group group, const LocationArgs& a, const Tiles& tiles, float* at_ends,
                        Moments* table, uint32_t& not_finite) {
  const EndsBefore none{0, 0};
  int32_t mine = 0;
  for (int32_t tile = 0; tile < tiles.count(); ++tile) {
    const Items items = tiles.items(tile);
    mine += __popc(load_flags(a.ends, items) & load_flags(a.mask, items));
  }
  const int32_t segments = group.scan<From::left>(EndsBefore{mine, 0}, none, none).total.ends;
  if (segments == 0) return;

  int32_t passed = 0;
  for (int32_t tile = 0; tile < tiles.count(); ++tile) {
    const Items items = tiles.items(tile);
    const uint32_t ends = load_flags(a.ends, items) & load_flags(a.mask, items);
    float rewards[kItems];
    load(a.rewards, items, ends, rewards);
    const auto scanned = group.scan<From::left>(EndsBefore{__popc(ends), 0}, none, none);
    int32_t slot = scanned.before.ends;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has(ends, i)) continue;
      not_finite += fabsf(rewards[i]) <= FLT_MAX ? 0u : 1u;
      at_ends[slot++] = rewards[i];
    }
    group.sync();
    const int32_t found = scanned.total.ends;
    const auto bin_at = [&](int32_t i) {
      return static_cast<int32_t>(bin_of(passed + i, segments, a.bins));
    };
    for (int32_t i = group.rank(); i < found; i += group.size()) {
      const int32_t bin = bin_at(i);
      if (i > 0 && bin_at(i - 1) == bin) continue;
      Moments sum = table[bin];
      int32_t next = i;
      do sum = combine(sum, Moments{1, at_ends[next++], 0});
      while (next < found && bin_at(next) == bin);
      table[bin] = sum;
    }
    passed += found;
    group.sync();
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    location_moments_kernel(const __grid_constant__ LocationArgs a) {
  __shared__ float at_ends[kItems * kThreads];
  const auto all_blocks = cooperative_groups::this_grid();
  const Group block(true);
  const Count none{0};
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    Moments* tables = a.tables + part * a.rows_per_block * a.bins;
    for (int64_t i = block.rank(); i < a.rows_per_block * a.bins; i += block.size()) {
      tables[i] = {0, 0, 0};
    }
    __syncthreads();
    uint32_t not_finite = 0;
    for (int64_t first = part * a.rows_per_block; first < a.rows.count;
         first += a.n_parts * a.rows_per_block) {
      for_each_row(a.rows, first, a.rows_per_block, [&](Group group, int64_t, const Tiles& tiles) {
        const int warp = static_cast<int>(threadIdx.x / kWarp);
        const int which = group.size() == block.size() ? 0 : warp;
        add_row(group, a, tiles, at_ends + which * kWarp * kItems, tables + which * a.bins,
                not_finite);
      });
    }
    const Count sum = block.scan<From::left>(Count{not_finite}, none, none).total;
    if (block.rank() == 0) a.not_finite_of[part] = sum;
  }
  all_blocks.sync();

  const int64_t not_finite = sum_of_parts(a.not_finite_of, a.n_parts, none).n;
  const int64_t n_tables = a.n_parts * a.rows_per_block;
  for (int64_t bin = int64_t{blockIdx.x} * block.size() + block.rank(); bin < a.bins;
       bin += int64_t{gridDim.x} * block.size()) {
    Moments sum{0, 0, 0};
    for (int64_t table = 0; table < n_tables && not_finite == 0; ++table) {
      const Moments next = a.tables[table * a.bins + bin];
      if (next.count > 0) sum = combine(sum, next);
    }
    a.moments[bin] = sum.count;
    a.moments[a.bins + bin] = sum.mean;
    a.moments[2 * a.bins + bin] = sum.m2;
  }
  if (blockIdx.x != 0) return;
  Count segments = none;
  for (int64_t i = block.rank(); i < n_tables * a.bins && not_finite > 0; i += block.size()) {
    segments.n += static_cast<int64_t>(a.tables[i].count);
  }
  segments = block.scan<From::left>(segments, none, none).total;
  if (block.rank() == 0) {
    a.not_finite[0] = not_finite;
    a.not_finite[1] = segments.n;
  }
}

}  // namespace

int64_t location_moments_scratch(Rows rows, int64_t bins) {
  const Division division(rows);
  return division.tables * bins * int64_t{sizeof(Moments)} +
         division.parts * int64_t{sizeof(Count)};
}

void location_moments(Floats rewards, const bool* ends, const bool* mask, Rows rows, int64_t bins,
                      double* moments, int64_t* not_finite, void* scratch, Executor executor) {
  const Division division(rows);
  auto* tables = static_cast<Moments*>(scratch);
  auto* not_finite_of = reinterpret_cast<Count*>(tables + division.tables * bins);
  const LocationArgs args{
      rewards,        ends,   mask,          rows,    bins,      division.grid.rows_per_block,
      division.parts, tables, not_finite_of, moments, not_finite};
  launch_cooperative("location_moments", location_moments_kernel, args, division.parts,
                     division.grid.threads, executor);
}

}  // namespace segk
