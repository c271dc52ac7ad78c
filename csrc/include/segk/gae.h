// Generalised advantage estimation.
#pragma once

#include <cstdint>

#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

// The map x -> scale * x + shift: one step of a discounted backward sum, and any run of steps.
template <class T>
struct Affine {
  T scale;
  T shift;

  SEGK_HD T operator()(T x) const { return scale * x + shift; }
};

// `outer` after `inner`.
template <class T>
SEGK_HD inline Affine<T> combine(Affine<T> outer, Affine<T> inner) {
  return {outer.scale * inner.scale, outer(inner.shift)};
}

// The scan runs from the last action token of a row to the first and carries
//   x_i = gamma V_i + gamma lam A_i,
// an affine map of x_{i+1} that needs no other token, with A_i = R_i - V_i + x_{i+1}. In double: a
// sum over a long row keeps the precision of its terms.
struct Gae {
  double gamma;
  double decay;  // gamma lam

  // Given V and `surplus`, R - V.
  SEGK_HD Affine<double> step(double surplus, double value) const {
    return {decay, decay * surplus + gamma * value};
  }
};

// Writes every token: 0 where mask is false, and there it reads nothing.
void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, Gae gae, float* advantages,
             float* returns, Executor executor);

}  // namespace segk
