// Generalised advantage estimation, tile by tile.
#pragma once

#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/gae.h"

namespace segk {

// One tile of the backward scan. reward(i) and value(i) are those of the action tokens; `carried`
// is x (see Gae) of the action token behind the tile, and becomes that of its first one.
template <class Reward, class Value>
__device__ void estimate_tile(Group group, const Gae& gae, uint32_t action, Reward reward,
                              Value value, double& carried, float (&advantages)[kItems],
                              float (&returns)[kItems]) {
  const Affine<double> identity{1, 0};
  Affine<double> mine = identity;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if (has(action, i)) mine = combine(gae.step(reward(i), value(i)), mine);
  }
  // The initial map is constant, and so is every composition that ends with it: its shift is x.
  const auto scanned = group.scan<From::right>(mine, Affine<double>{0, carried}, identity);
  double x = scanned.before.shift;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    advantages[i] = returns[i] = 0;
    if (!has(action, i)) continue;
    const double r = reward(i);
    const double v = value(i);
    const double advantage = Gae::advantage(r, v, x);
    advantages[i] = static_cast<float>(advantage);
    returns[i] = static_cast<float>(advantage + v);
    x = gae.step(r, v)(x);
  }
  carried = scanned.total.shift;
}

}  // namespace segk
