// Generalised advantage estimation, tile by tile.
#pragma once

#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/gae.h"

namespace segk {

// One tile of the backward scan. value(i) and surplus(i), reward minus value, are those of the
// action tokens. `carried` is x (see Gae) of the action token behind the tile, and becomes that of
// its first one.
template <class Surplus, class Value>
__device__ void estimate_tile(Group group, const Gae& gae, uint32_t action, Surplus surplus,
                              Value value, double& carried, float (&advantages)[kItems],
                              float (&returns)[kItems]) {
  const Affine<double> identity{1, 0};
  Affine<double> mine = identity;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if (has(action, i)) mine = combine(gae.step(surplus(i), value(i)), mine);
  }
  // The initial map is constant, and so is every composition that ends with it: its shift is x.
  const auto scanned = group.scan<From::right>(mine, Affine<double>{0, carried}, identity);
  double x = scanned.before.shift;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    advantages[i] = returns[i] = 0;
    if (!has(action, i)) continue;
    const double v = value(i);
    const double s = surplus(i);
    advantages[i] = static_cast<float>(s + x);
    returns[i] = static_cast<float>(s + x + v);
    x = gae.step(s, v)(x);
  }
  carried = scanned.total.shift;
}

}  // namespace segk
