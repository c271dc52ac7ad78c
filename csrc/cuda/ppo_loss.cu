#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/ppo_loss.h"

namespace segk {
namespace {

// Term says what a token adds to the loss, a function of three streams.
template <class Term>
struct LossArgs {
  Term term;
  Floats x;
  Floats old;
  Floats target;
  const bool* mask;
  Rows rows;
  Aggregation aggregation;
  float* loss;
  double* row_weights;
  LossSums* parts;
  int64_t n_parts;
  int64_t blocks;  // as many as the rows need, some of which one block of the grid may do
  int rows_per_block;
};

template <class Term>
__global__ void __launch_bounds__(kMaxThreads, 2) loss_kernel(const LossArgs<Term> a) {
  static_assert(sizeof(LossSums) <= kBytesPerPart, "fits the scratch memory");
  const auto all_blocks = cooperative_groups::this_grid();
  const Group block(true);
  const LossSums identity{0, 0, 0};
  // Of the rows in whose group a thread is the first; registers would be spilled.
  __shared__ LossSums of_thread[kMaxThreads];
  LossSums& of_part = of_thread[threadIdx.x];
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    of_part = identity;
    for (int64_t b = part; b < a.blocks; b += a.n_parts) {
      for_each_row(a.rows, b * a.rows_per_block, a.rows_per_block,
                   [&](Group group, int64_t row, const Tiles& tiles) {
                     RowSum mine{0, 0};
                     for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                       const Items items = tiles.items(tile);
                       const uint32_t action = load_flags(a.mask, items);
                       float x[kItems], old[kItems], target[kItems];
                       load(a.x, items, action, x);
                       load(a.old, items, action, old);
                       load(a.target, items, action, target);
#pragma unroll
                       for (int i = 0; i < kItems; ++i) {
                         if (has(action, i)) mine.sum += a.term.loss(x[i], old[i], target[i]);
                       }
                       mine.count += __popc(action);
                     }
                     const RowSum no_token{0, 0};
                     const RowSum sum = group.scan<From::left>(mine, no_token, no_token).total;
                     if (group.rank() != 0) return;
                     a.row_weights[row] = sum.count;
                     if (sum.count == 0) return;
                     const double weight = token_weight(a.aggregation, sum.count, 1, 1);
                     const double tokens = sum.count;
                     of_part = combine(of_part, LossSums{weight * sum.sum, tokens, 1});
                   });
    }
    const LossSums sum = block.scan<From::left>(of_part, identity, identity).total;
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
    *a.loss = static_cast<float>(all.terms *
                                 token_weight(a.aggregation, none_or_one, all.tokens, all.seqs));
  }
}

template <class Term>
struct LossGradArgs {
  Term term;
  const float* dloss;
  Floats x;
  Floats old;
  Floats target;
  const bool* mask;
  Rows rows;
  const double* row_weights;
  float* out;
  int rows_per_block;
};

template <class Term>
__global__ void __launch_bounds__(kMaxThreads, 2) loss_grad_kernel(const LossGradArgs<Term> a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group, int64_t row, const Tiles& tiles) {
                 const float weight = static_cast<float>(*a.dloss * a.row_weights[row]);
                 for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                   const Items items = tiles.items(tile);
                   const uint32_t action = load_flags(a.mask, items);
                   float x[kItems], old[kItems], target[kItems];
                   load(a.x, items, action, x);
                   load(a.old, items, action, old);
                   load(a.target, items, action, target);
#pragma unroll
                   for (int i = 0; i < kItems; ++i) {
                     x[i] = has(action, i) ? weight * a.term.grad(x[i], old[i], target[i]) : 0.0f;
                   }
                   store(x, a.out, items);
                 }
               });
}

template <class Term>
void loss_fwd(const char* op, Term term, Floats x, Floats old, Floats target, const bool* mask,
              Rows rows, Aggregation aggregation, float* loss, double* row_weights, void* scratch,
              Executor executor) {
  const RowGrid grid(rows);
  const int64_t parts = std::min(grid.blocks, kParts);
  const LossArgs<Term> args{term,
                            x,
                            old,
                            target,
                            mask,
                            rows,
                            aggregation,
                            loss,
                            row_weights,
                            static_cast<LossSums*>(scratch),
                            parts,
                            grid.blocks,
                            grid.rows_per_block};
  launch_cooperative(op, loss_kernel<Term>, args, parts, grid.threads, loss, executor);
}

template <class Term>
void loss_bwd(const char* op, Term term, const float* dloss, Floats x, Floats old, Floats target,
              const bool* mask, Rows rows, const double* row_weights, float* out,
              Executor executor) {
  const RowGrid grid(rows);
  const LossGradArgs<Term> args{term, dloss, x,           old, target,
                                mask, rows,  row_weights, out, grid.rows_per_block};
  launch(op, loss_grad_kernel<Term>, args, grid, out, executor);
}

}  // namespace

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void* scratch, Executor executor) {
  loss_fwd("policy_loss", PolicyTerm{low, high}, logprobs, old_logprobs, advantages, mask, rows,
           aggregation, loss, row_weights, scratch, executor);
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Executor executor) {
  loss_bwd("policy_loss, backward", PolicyTerm{low, high}, dloss, logprobs, old_logprobs,
           advantages, mask, rows, row_weights, dlogprobs, executor);
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    void* scratch, Executor executor) {
  loss_fwd("value_loss", ValueTerm{clip}, values, old_values, returns, mask, rows, aggregation,
           loss, row_weights, scratch, executor);
}

void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Executor executor) {
  loss_bwd("value_loss, backward", ValueTerm{clip}, dloss, values, old_values, returns, mask, rows,
           row_weights, dvalues, executor);
}

}  // namespace segk
