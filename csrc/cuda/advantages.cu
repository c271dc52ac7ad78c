#include "cuda/gae.cuh"
#include "cuda/launch.cuh"
#include "cuda/rewards.cuh"
#include "cuda/scan.cuh"
#include "cuda/segments.cuh"
#include "cuda/tokens.cuh"
#include "segk/advantages.h"
#include "segk/storage.h"

namespace segk {
namespace {

template <class Array>
struct AdvantagesArgs {
  Array rewards;
  Array logprobs;
  Array ref_logprobs;
  Array values;
  const bool* mask;
  const bool* ends;
  Rows rows;
  CreditArg credit;
  double kl_coef;
  Gae gae;
  AdvantageOutputs out;
  int rows_per_block;
  // Where the kernel finds the ends: they are written to `found`, which is `ends`.
  Array entropy;
  Boundaries boundaries;
  bool* found;
};

// Eight floats of a thread in shared memory, at which no other thread looks.
class Column {
 public:
  __device__ explicit Column(uint4* of_block)
      : at_(reinterpret_cast<float4*>(of_block) + threadIdx.x) {}

  __device__ void put(const float (&x)[kItems]) const {
    at_[0] = {x[0], x[1], x[2], x[3]};
    at_[kMaxThreads] = {x[4], x[5], x[6], x[7]};
  }
  __device__ float operator[](int i) const {
    return reinterpret_cast<const float*>(at_ + (i < 4 ? 0 : kMaxThreads))[i % 4];
  }

 private:
  float4* at_;
};

// Two blocks of 512 threads on a multiprocessor, 64 registers a thread: one block's loads are on
// their way while the other computes.
template <class Array, bool kFindEnds>
__global__ void __launch_bounds__(kMaxThreads, 2)
    segment_advantages_kernel(const __grid_constant__ AdvantagesArgs<Array> a) {
  // What a thread keeps for itself; registers would be spilled.
  __shared__ uint4 kl_of_block[2 * kMaxThreads];  // at first entropies
  __shared__ uint4 values_of_block[2 * kMaxThreads];
  __shared__ double carried[kMaxThreads];
  __shared__ RewardScatter::State scattered[kMaxThreads];
  const Column kl(kl_of_block);
  const SharedCurve curve = shared_curve(a.credit);
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t row, const Tiles& tiles) {
                 const bool exclude_last = kFindEnds && a.boundaries.excludes_last(row);
                 const bool find_at_once = kFindEnds && tiles.count() == 1;
                 const Parked<Array> entropy(a.entropy, kl_of_block);
                 const Parked<Array> stored_values(a.values, values_of_block);
                 EndFinder find(group, a.boundaries, exclude_last);
                 const auto ends_of = [&](Items items, uint32_t action) {
                   if constexpr (!kFindEnds) return load_flags(a.ends, items) & action;
                   fetch(items, action, entropy);
                   const uint32_t ends = find(items, action, find.over(entropy));
                   store_flags(ends, a.found, items);
                   return ends;
                 };
                 RewardScatter scatter(group, a.credit.credit, curve, tiles, a.mask,
                                       a.out.token_rewards, scattered[threadIdx.x], ends_of);
                 if (kFindEnds && !find_at_once) find.finish(a.found);

                 carried[threadIdx.x] = 0;
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Items items = tiles.items(tile);
                   // Two waits for memory: for the flags, because what the mask excludes is not
                   // read, and for all numbers together. Rewards are read before it is known which
                   // tokens are ends.
                   const FetchedFlags mask(a.mask, items);
                   const FetchedFlags known_ends(a.ends, find_at_once ? Items{} : items);
                   const uint32_t action = mask.set() & items.valid;
                   uint32_t ends = known_ends.set() & action;
                   Fetched<Array> segment_rewards(a.rewards), logprobs(a.logprobs),
                       ref_logprobs(a.ref_logprobs);
                   if (find_at_once) fetch(items, action, entropy);
                   fetch(items, action, segment_rewards, logprobs, ref_logprobs, stored_values);

                   uint32_t over = 0;
                   if (find_at_once) over = find.over(entropy);
                   float x[kItems], of_ref[kItems], rewards[kItems];
                   logprobs.unpack(x);
                   ref_logprobs.unpack(of_ref);
#pragma unroll
                   for (int i = 0; i < kItems; ++i) x[i] = has(action, i) ? x[i] - of_ref[i] : 0.0f;
                   kl.put(x);
                   store(x, a.out.kl, items);

                   if (find_at_once) {
                     EndFinder find_now(group, a.boundaries, exclude_last);
                     ends = find_now(items, action, over);
                     if (find_now.one_token()) ends = action;
                     store_flags(ends, a.found, items);
                   }
                   segment_rewards.unpack(rewards);
                   scatter(tile, action, ends, rewards);
                   const Items again = tiles.items(tile);  // cheaper than the registers for it
                   store(rewards, a.out.token_rewards, again);

                   float values[kItems], advantages[kItems], returns[kItems];
                   stored_values.unpack(values);
                   const auto value = [&](int i) { return values[i]; };
                   const auto surplus = [&](int i) {
                     return rewards[i] - a.kl_coef * kl[i] - values[i];
                   };
                   estimate_tile(group, a.gae, action, surplus, value, carried[threadIdx.x],
                                 advantages, returns);
                   store(advantages, a.out.advantages, again);
                   store(returns, a.out.returns, again);
                 }
               });
}

template <bool kFindEnds>
void run(const char* op, Floats entropy, Boundaries boundaries, const AdvantageInputs& in,
         const bool* ends, bool* found, const AdvantageOutputs& out, Executor executor) {
  const RowGrid grid(in.rows);
  with_storage(
      [&](auto rewards, auto logprobs, auto ref_logprobs, auto values, auto nats) {
        const AdvantagesArgs<decltype(rewards)> args{
            rewards,    logprobs,   ref_logprobs, values,
            in.mask,    ends,       in.rows,      CreditArg(op, in.credit),
            in.kl_coef, in.gae,     out,          grid.rows_per_block,
            nats,       boundaries, found};
        launch(op, segment_advantages_kernel<decltype(rewards), kFindEnds>, args, grid,
               out.advantages, executor);
      },
      in.rewards, in.logprobs, in.ref_logprobs, in.values, entropy);
}

}  // namespace

void segment_advantages_fwd(const AdvantageInputs& in, const bool* ends,
                            const AdvantageOutputs& out, Executor executor) {
  const Floats no_entropy{nullptr, in.rewards.dtype};
  run<false>("segment_advantages", no_entropy, {}, in, ends, nullptr, out, executor);
}

int64_t segment_ends_and_advantages_fwd(Floats entropy, Boundaries boundaries,
                                        const AdvantageInputs& in, bool* ends,
                                        const AdvantageOutputs& out, Executor executor) {
  run<true>("segment_ends_and_advantages", entropy, boundaries, in, ends, ends, out, executor);
  return -1;
}

}  // namespace segk
