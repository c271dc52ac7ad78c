#include "cuda/gae.cuh"
#include "cuda/launch.cuh"
#include "cuda/rewards.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/advantages.h"

namespace segk {
namespace {

struct AdvantagesArgs {
  ScatterArgs scatter;
  Floats logprobs;
  Floats ref_logprobs;
  Floats values;
  double kl_coef;
  Gae gae;
  float* advantages;
  float* returns;
  float* kl;
};

__global__ void __launch_bounds__(kMaxThreads, 2)
    segment_advantages_kernel(const __grid_constant__ AdvantagesArgs a) {
  // What a thread keeps for itself while rewards are scattered; registers would be spilled.
  __shared__ float values[kItems][kMaxThreads];
  __shared__ float kl[kItems][kMaxThreads];
  __shared__ double carried[kMaxThreads];
  const unsigned mine = threadIdx.x;
  const SharedCurve curve = shared_curve(a.scatter.credit);
  for_each_row(a.scatter.rows, int64_t{blockIdx.x} * a.scatter.rows_per_block,
               a.scatter.rows_per_block, [&](Group group, int64_t, int64_t begin, int64_t end) {
                 const Tiles tiles(group, begin, end);
                 RewardScatter scatter(group, a.scatter, curve, tiles);
                 carried[mine] = 0;
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Items items = tiles.items(tile);
                   const uint32_t action = load_flags(a.scatter.mask, items);
                   const uint32_t ends = load_flags(a.scatter.ends, items) & action;
                   float rewards[kItems], x[kItems], of_ref[kItems], v[kItems];
                   load(a.values, items, action, v);
                   load(a.logprobs, items, action, x);
                   load(a.ref_logprobs, items, action, of_ref);
#pragma unroll
                   for (int i = 0; i < kItems; ++i) {
                     x[i] = has(action, i) ? x[i] - of_ref[i] : 0.0f;
                     kl[i][mine] = x[i];
                     values[i][mine] = v[i];
                   }
                   load(a.scatter.rewards, items, ends, rewards);
                   store(x, a.kl, items);
                   scatter(tile, action, ends, rewards);
                   store(rewards, a.scatter.token_rewards, items);

                   float advantages[kItems], returns[kItems];
                   const auto reward = [&](int i) { return rewards[i] - a.kl_coef * kl[i][mine]; };
                   const auto value = [&](int i) { return values[i][mine]; };
                   estimate_tile(group, a.gae, action, reward, value, carried[mine], advantages,
                                 returns);
                   store(advantages, a.advantages, items);
                   store(returns, a.returns, items);
                 }
               });
}

}  // namespace

void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, Gae gae, float* advantages, float* returns,
                            float* token_rewards, float* kl, Executor executor) {
  constexpr char op[] = "segment_advantages";
  const RowGrid grid(rows);
  const AdvantagesArgs args{
      {rewards, ends, mask, rows, CreditArg(op, credit), token_rewards, grid.rows_per_block},
      logprobs,
      ref_logprobs,
      values,
      kl_coef,
      gae,
      advantages,
      returns,
      kl};
  launch(op, segment_advantages_kernel, args, grid, advantages, executor);
}

}  // namespace segk
