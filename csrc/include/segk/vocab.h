// Vocabulary-wide row statistics: softmax, entropy and log-probability of one row of logits.
#pragma once

#include <cstdint>

#include "segk/dtype.h"

namespace segk {

// Rows of logits [R, V], or the slice of V columns that starts at column `first` of wider rows.
// Row r starts (r / inner) * outer_stride + (r % inner) * inner_stride elements into `logits`;
// its columns are adjacent. z = logits / temperature.
struct VocabRows {
  const void* logits;
  DType dtype;
  int64_t count;
  int64_t vocab;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t first;
  const int64_t* targets;     // [R] columns of the wider rows, or null; outside them: no target
  const float* temperatures;  // [R], or null for `temperature`
  double temperature;
};

// Running statistics of a row over the columns seen so far, with the shift
// d = (logit - max) / temperature.
struct RowState {
  double max;            // largest logit
  double sum_exp;        // sum of exp(d)
  double sum_exp_shift;  // sum of exp(d) d
  double target_logit;
};

// What the backward pass needs of a row. Not the logsumexp: max + log(sum) rounds away the digits
// of log(sum) where the logits are far from zero.
struct RowStats {
  float max;
  float inverse_sum_exp;  // 1 / sum of exp(d); 0: masked out, NaN: the row is no distribution
  float mean_shift;       // sum of p d
};

// Takes the columns of `rows` into states [R]; the slice with first = 0 starts them. Rows with
// mask [R] (or null) False are not read.
void vocab_accumulate(const VocabRows& rows, const bool* mask, RowState* states, int threads);

// logprobs [R] (where rows.targets is given), entropy [R], stats [R] from finished states.
void vocab_finish(const VocabRows& rows, const bool* mask, const RowState* states, float* logprobs,
                  float* entropy, RowStats* stats, int threads);

// Both at once, for whole rows: one read of the logits.
void vocab_forward(const VocabRows& rows, const bool* mask, float* logprobs, float* entropy,
                   RowStats* stats, int threads);

// dlogits [R, V] of the logits' dtype from dlogprobs [R] and dentropy [R] (either may be null). Its
// rows start stride elements apart. May be the memory of the logits, if their rows are as far
// apart. Rows without an upstream gradient are not read and get zeros.
void vocab_backward(const VocabRows& rows, const RowStats* stats, const float* dlogprobs,
                    const float* dentropy, void* dlogits, int64_t stride, int threads);

// out[i] = exp(x[i]) for x <= 0 as the kernels above compute it: within 1.1 ulp (1.4 with the
// scalar ones) down to 2^-125.5, 0 below.
void vocab_exp(const float* x, float* out, int64_t count);

}  // namespace segk
