// Adjacent columns of one row of logits.
#pragma once

#include "segk/vocab.h"

namespace segk {

// What the columns of one row share in the backward pass.
struct RowGradient {
  RowStats stats;
  double temperature;
  float dlogprob;
  float dentropy;
  int64_t target;  // the column that is the target, or -1
};

// The state of a row of these n columns, but for the target.
RowState columns_forward(DType dtype, const void* logits, int64_t n, double temperature);

// `streaming`: dlogits are written past the caches.
void columns_backward(DType dtype, const void* logits, void* dlogits, int64_t n,
                      const RowGradient& row, bool streaming);

}  // namespace segk
