#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/ppo_loss.h"

namespace segk {
namespace {

struct PolicyInputs {
  PolicyTerm term;
  Floats logprobs;
  Floats old_logprobs;
  Floats advantages;
  Floats ref_logprobs;  // null data: no KL term
  Floats entropy;       // null data: no entropy term
  float* dlogprobs;     // of the backward pass, as dentropy, which may be null
  float* dentropy;

  __device__ void add(Items items, uint32_t action, TokenSums& sums) const {
    float logprob[kItems], x[kItems], advantage[kItems];
    load(logprobs, items, action, logprob);
    load(old_logprobs, items, action, x);
    load(advantages, items, action, advantage);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has(action, i)) continue;
      const double log_ratio = static_cast<double>(logprob[i]) - x[i];
      const double held = term.log_ratio(logprob[i], x[i], advantage[i]);
      sums.terms += PolicyTerm::surrogate(exp(held), advantage[i]);
      sums.squares += log_ratio * log_ratio;
      sums.clipped += term.clipped(logprob[i], x[i], advantage[i]);
    }
    if (ref_logprobs.data) {
      load(ref_logprobs, items, action, x);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!has(action, i)) continue;
        const double q = static_cast<double>(logprob[i]) - x[i];
        sums.terms += term.kl_coef * (expm1(-q) + q);
      }
    }
    if (entropy.data) {
      load(entropy, items, action, x);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (has(action, i)) sums.terms -= term.entropy_coef * x[i];
      }
    }
  }

  __device__ void write_grads(Items items, uint32_t action, double weight) const {
    const auto scale = static_cast<float>(weight);
    float logprob[kItems], x[kItems], grad[kItems];
    load(logprobs, items, action, logprob);
    load(old_logprobs, items, action, x);
    load(advantages, items, action, grad);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float ratio = expf(logprob[i] - x[i]);
      grad[i] = term.surrogate_grad(logprob[i], x[i], grad[i], ratio);
    }
    if (ref_logprobs.data) {
      const auto kl_coef = static_cast<float>(term.kl_coef);
      load(ref_logprobs, items, action, x);
#pragma unroll
      for (int i = 0; i < kItems; ++i) grad[i] -= kl_coef * expm1f(x[i] - logprob[i]);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) grad[i] = has(action, i) ? scale * grad[i] : 0.0f;
    store(grad, dlogprobs, items);
    if (!dentropy) return;
    const auto of_entropy = static_cast<float>(-term.entropy_coef * weight);
#pragma unroll
    for (int i = 0; i < kItems; ++i) grad[i] = has(action, i) ? of_entropy : 0.0f;
    store(grad, dentropy, items);
  }
};

struct ValueInputs {
  ValueTerm term;
  Floats values;
  Floats old_values;
  Floats returns;
  float* dvalues;  // of the backward pass

  __device__ void add(Items items, uint32_t action, TokenSums& sums) const {
    float value[kItems], old[kItems], ret[kItems];
    load(items, action, value, old, ret);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (has(action, i)) sums.terms += term.loss(value[i], old[i], ret[i]);
    }
  }

  __device__ void write_grads(Items items, uint32_t action, double weight) const {
    const auto scale = static_cast<float>(weight);
    float value[kItems], old[kItems], ret[kItems];
    load(items, action, value, old, ret);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      value[i] = has(action, i) ? scale * term.grad(value[i], old[i], ret[i]) : 0.0f;
    }
    store(value, dvalues, items);
  }

 private:
  __device__ void load(Items items, uint32_t action, float (&value)[kItems], float (&old)[kItems],
                       float (&ret)[kItems]) const {
    segk::load(values, items, action, value);
    segk::load(old_values, items, action, old);
    segk::load(returns, items, action, ret);
  }
};

template <class Inputs>
struct LossArgs {
  Inputs inputs;
  const bool* mask;
  Rows rows;
  Aggregation aggregation;
  LossOutputs out;
  double* row_weights;
  LossSums* parts;
  int64_t n_parts;
  int64_t blocks;  // as many as the rows need, some of which one block of the grid may do
  int rows_per_block;
};

template <class Inputs>
__global__ void __launch_bounds__(kMaxThreads, 2) loss_kernel(const LossArgs<Inputs> a) {
  static_assert(sizeof(LossSums) <= kBytesPerPart, "fits the scratch memory");
  const auto all_blocks = cooperative_groups::this_grid();
  const Group block(true);
  const LossSums identity{0, 0, 0, 0, 0};
  // Of the rows whose first thread is the first one of the warp; in registers it would be spilled.
  constexpr int kMaxWarps = kMaxThreads / kWarp;
  __shared__ LossSums of_warps[kMaxWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    if (block.rank() % kWarp == 0) of_warps[warp] = identity;
    for (int64_t b = part; b < a.blocks; b += a.n_parts) {
      for_each_row(a.rows, b * a.rows_per_block, a.rows_per_block,
                   [&](Group group, int64_t row, const Tiles& tiles) {
                     TokenSums mine{0, 0, 0, 0};
                     for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                       const Items items = tiles.items(tile);
                       const uint32_t action = load_flags(a.mask, items);
                       a.inputs.add(items, action, mine);
                       mine.count += __popc(action);
                     }
                     const TokenSums none{0, 0, 0, 0};
                     const TokenSums sums = group.scan<From::left>(mine, none, none).total;
                     if (group.rank() != 0) return;
                     a.row_weights[row] = sums.count;
                     const double weight = token_weight(a.aggregation, sums.count, 1, 1);
                     of_warps[warp] = combine(of_warps[warp], weighted(sums, weight));
                   });
    }
    __syncthreads();
    const int warps = block.size() / kWarp;
    const LossSums mine = block.rank() < warps ? of_warps[block.rank()] : identity;
    const LossSums sum = block.scan<From::left>(mine, identity, identity).total;
    if (block.rank() == 0) a.parts[part] = sum;
  }
  all_blocks.sync();

  const LossSums all = sum_of_parts(a.parts, a.n_parts, identity);
  for (int64_t row = int64_t{blockIdx.x} * block.size() + block.rank(); row < a.rows.count;
       row += int64_t{gridDim.x} * block.size()) {
    a.row_weights[row] = token_weight(a.aggregation, a.row_weights[row], all.tokens, all.seqs);
  }
  if (blockIdx.x == 0 && block.rank() == 0) {
    const double none_or_one = all.seqs > 0 ? 1 : 0;
    a.out.write(all, token_weight(a.aggregation, none_or_one, all.tokens, all.seqs));
  }
}

template <class Inputs>
struct LossGradArgs {
  Inputs inputs;
  const float* dloss;
  const bool* mask;
  Rows rows;
  const double* row_weights;
  int rows_per_block;
};

template <class Inputs>
__global__ void __launch_bounds__(kMaxThreads, 2) loss_grad_kernel(const LossGradArgs<Inputs> a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group, int64_t row, const Tiles& tiles) {
                 const double weight = *a.dloss * a.row_weights[row];
                 for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                   const Items items = tiles.items(tile);
                   a.inputs.write_grads(items, load_flags(a.mask, items), weight);
                 }
               });
}

template <class Inputs>
void loss_fwd(const char* op, const Inputs& inputs, const bool* mask, Rows rows,
              Aggregation aggregation, LossOutputs out, double* row_weights, void* scratch,
              Executor executor) {
  const RowGrid grid(rows);
  const int64_t parts = std::min(grid.blocks, kParts);
  const LossArgs<Inputs> args{inputs,
                              mask,
                              rows,
                              aggregation,
                              out,
                              row_weights,
                              static_cast<LossSums*>(scratch),
                              parts,
                              grid.blocks,
                              grid.rows_per_block};
  launch_cooperative(op, loss_kernel<Inputs>, args, parts, grid.threads, executor);
}

template <class Inputs>
void loss_bwd(const char* op, const Inputs& inputs, const float* dloss, const bool* mask, Rows rows,
              const double* row_weights, const float* out, Executor executor) {
  const RowGrid grid(rows);
  const LossGradArgs<Inputs> args{inputs, dloss, mask, rows, row_weights, grid.rows_per_block};
  launch(op, loss_grad_kernel<Inputs>, args, grid, out, executor);
}

}  // namespace

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, Floats ref_logprobs,
                     Floats entropy, const bool* mask, Rows rows, PolicyTerm term,
                     Aggregation aggregation, LossOutputs out, double* row_weights, void* scratch,
                     Executor executor) {
  const PolicyInputs inputs{term,         logprobs, old_logprobs, advantages,
                            ref_logprobs, entropy,  nullptr,      nullptr};
  loss_fwd("policy_loss", inputs, mask, rows, aggregation, out, row_weights, scratch, executor);
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     Floats ref_logprobs, const bool* mask, Rows rows, PolicyTerm term,
                     const double* row_weights, float* dlogprobs, float* dentropy,
                     Executor executor) {
  const Floats no_entropy{nullptr, logprobs.dtype};
  const PolicyInputs inputs{term,         logprobs,   old_logprobs, advantages,
                            ref_logprobs, no_entropy, dlogprobs,    dentropy};
  loss_bwd("policy_loss, backward", inputs, dloss, mask, rows, row_weights, dlogprobs, executor);
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    void* scratch, Executor executor) {
  const ValueInputs inputs{{clip}, values, old_values, returns, nullptr};
  loss_fwd("value_loss", inputs, mask, rows, aggregation, {loss, nullptr, nullptr}, row_weights,
           scratch, executor);
}

void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Executor executor) {
  const ValueInputs inputs{{clip}, values, old_values, returns, dvalues};
  loss_bwd("value_loss, backward", inputs, dloss, mask, rows, row_weights, dvalues, executor);
}

}  // namespace segk
