// Count, mean and summed squared deviation of a set of values.
#pragma once

#include "segk/dtype.h"

namespace segk {

struct Moments {
  double count;
  double mean;
  double m2;
};

// Those of the union of two sets, by the formula of Chan, Golub and LeVeque.
SEGK_HD inline Moments combine(Moments left, Moments right) {
  const double count = left.count + right.count;
  if (count == 0) return {0, 0, 0};
  const double delta = right.mean - left.mean;
  const double share = right.count / count;
  return {count, left.mean + delta * share,
          left.m2 + right.m2 + delta * delta * left.count * share};
}

}  // namespace segk
