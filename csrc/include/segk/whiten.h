// Unit variance over all action tokens.
#pragma once

#include <cmath>
#include <cstdint>

#include "segk/executor.h"
#include "segk/moments.h"
#include "segk/rows.h"

namespace segk {

// The variance is floored; the mean becomes 0 where `center`, else it stays.
struct Whitening {
  double mean;
  double scale;
  double shift;

  SEGK_HD Whitening(Moments all, bool center) : mean(all.mean), shift(center ? 0 : all.mean) {
    const double floor = 1e-8;
    const double variance = all.count > 0 ? all.m2 / all.count : 0;
    scale = 1 / sqrt(variance < floor ? floor : variance);  // a comparison: NaN stays NaN
  }
  SEGK_HD float operator()(float x) const { return static_cast<float>((x - mean) * scale + shift); }
};

// moments [3]: count, mean and summed squared deviation over x[mask].
void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void* scratch,
                 Executor executor);

// Writes every token: 0 where mask is false, and there it reads nothing.
void whiten_fwd(Floats x, const bool* mask, int64_t n, const double* moments, bool center,
                float* out, Executor executor);

}  // namespace segk
