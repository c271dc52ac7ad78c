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

// What is known of a row after some of its columns. With d = (logit - max) / temperature:
// sum of exp(d), sum of exp(d) d, and the target's logit.
struct RowState {
  double max;
  double sum;
  double weighted;
  double target;
};

// What the backward pass needs of a row. Not the logsumexp: max + log(sum) rounds away the digits
// of log(sum) where the logits are far from zero.
struct RowStats {
  float max;
  float inverse_sum;  // 0: the row was masked out; NaN: it has no distribution
  float mean_shift;   // sum of p d
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

// dlogits [R, V] of the logits' dtype from dlogprobs [R] and dentropy [R] (either may be null). May
// be the memory of contiguous logits. Rows without an upstream gradient are not read and get zeros.
void vocab_backward(const VocabRows& rows, const RowStats* stats, const float* dlogprobs,
                    const float* dentropy, void* dlogits, int threads);

// out[i] = exp(x[i]) for x <= 0 as the kernels above compute it: within 1.1 ulp (1.4 with the
// scalar ones) down to 2^-125.5, 0 below.
void vocab_exp(const float* x, float* out, int64_t count);

// out[i] = exp(x[i]), to 2e-11 of it; beyond what a float can hold the limits of a double's
// exponent stand for 0 and infinity. The same bits from every instruction set.
void exp_double(const double* x, double* out, int64_t count);

// out[i] = log(x[i]) of positive normal numbers, to 2e-12 of it. The same bits likewise.
void log_double(const double* x, double* out, int64_t count);

// Instruction set that the vocabulary kernels run with: "scalar", "avx2" or "avx512".
// Throws std::invalid_argument when SEGKERNELS_ISA asks for one that cannot run here.
const char* isa_name();

// What the columns of one row share in the backward pass.
struct RowGradient {
  RowStats stats;
  double temperature;
  float dlogprob;
  float dentropy;
  int64_t target;  // the column that is the target, or -1
};

// One table per instruction set, each compiled from vocab.cpp in a namespace of its own: kernels
// over n adjacent columns of one row.
struct VocabKernels {
  // Their state, but for the target.
  RowState (*forward)(DType dtype, const void* logits, int64_t n, double temperature);
  // `streaming`: dlogits are written past the caches.
  void (*backward)(DType dtype, const void* logits, void* dlogits, int64_t n,
                   const RowGradient& row, bool streaming);
  void (*exp)(const float* x, float* out, int64_t n);
  void (*exp_double)(const double* x, double* out, int64_t n);
  void (*log_double)(const double* x, double* out, int64_t n);
};

namespace scalar {
extern const VocabKernels kernels;
}
namespace avx2 {
extern const VocabKernels kernels;
}
namespace avx512 {
extern const VocabKernels kernels;
}

}  // namespace segk
