#include "cuda/launch.cuh"
#include "cuda/rewards.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/rewards.h"

namespace segk {
namespace {

struct ScatterArgs {
  Floats rewards;
  const bool* ends;
  const bool* mask;
  Rows rows;
  CreditArg credit;
  float* token_rewards;
  int rows_per_block;
};

__global__ void __launch_bounds__(kMaxThreads, 2)
    scatter_segment_rewards_kernel(const __grid_constant__ ScatterArgs a) {
  const SharedCurve curve = shared_curve(a.credit);
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t, const Tiles& tiles) {
                 const auto ends_of = [&](Items items, uint32_t action) {
                   return load_flags(a.ends, items) & action;
                 };
                 RewardScatter::State state;
                 RewardScatter scatter(group, a.credit.credit, curve, tiles, a.mask,
                                       a.token_rewards, state, ends_of);
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Items items = tiles.items(tile);
                   const uint32_t action = load_flags(a.mask, items);
                   const uint32_t ends = ends_of(items, action);
                   float rewards[kItems];
                   load(a.rewards, items, ends, rewards);
                   scatter(tile, action, ends, rewards);
                   store(rewards, a.token_rewards, items);
                 }
               });
}

}  // namespace

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Executor executor) {
  constexpr char op[] = "scatter_segment_rewards";
  const RowGrid grid(rows);
  const ScatterArgs args{
      rewards, ends, mask, rows, CreditArg(op, credit), out, grid.rows_per_block};
  launch(op, scatter_segment_rewards_kernel, args, grid, out, executor);
}

}  // namespace segk
