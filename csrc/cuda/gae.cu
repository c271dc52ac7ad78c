#include "cuda/gae.cuh"
#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/gae.h"

namespace segk {
namespace {

struct GaeArgs {
  Floats rewards;
  Floats values;
  const bool* mask;
  Rows rows;
  Gae gae;
  float* advantages;
  float* returns;
  int rows_per_block;
};

__global__ void __launch_bounds__(kMaxThreads, 2) gae_kernel(const GaeArgs a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t, const Tiles& tiles) {
                 double carried = 0;
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Items items = tiles.items(tile);
                   const uint32_t action = load_flags(a.mask, items);
                   float rewards[kItems], values[kItems], advantages[kItems], returns[kItems];
                   load(a.rewards, items, action, rewards);
                   load(a.values, items, action, values);
                   const auto value = [&](int i) { return values[i]; };
                   const auto surplus = [&](int i) { return double{rewards[i]} - values[i]; };
                   estimate_tile(group, a.gae, action, surplus, value, carried, advantages,
                                 returns);
                   store(advantages, a.advantages, items);
                   store(returns, a.returns, items);
                 }
               });
}

}  // namespace

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, Gae gae, float* advantages,
             float* returns, Executor executor) {
  const RowGrid grid(rows);
  const GaeArgs args{rewards, values, mask, rows, gae, advantages, returns, grid.rows_per_block};
  launch("gae", gae_kernel, args, grid, advantages, executor);
}

}  // namespace segk
