// A line and a table fitted to binned moments on the GPU, as fit_moments in normalizer_fit.py does
// on the host.
#pragma once

#include <cstdint>

#include "segk/executor.h"
#include "segk/normalizer.h"

namespace segk {

enum class FitOutcome : int32_t { fitted = 0, no_segments = 1, not_usable = 2 };

// What a fit has found: both forms, of which the better one makes the curve.
struct FittedForms {
  double outcome;  // FitOutcome
  double mean_slope;
  double mean_intercept;
  double std_slope;
  double std_intercept;
  double r2_mean;
  double r2_std;
  double n_knots;
  double knots[3][kMaxKnots];  // positions, means, stds
};

// moments [3, bins] as location_moments gives them; min_std NaN for the forms' own. Writes `forms`,
// and the better one to `curve` [kCurveNumbers], where the numbers of an outcome other than
// `fitted` mean nothing. scratch [3, bins]. GPUs only.
void fit_location(const double* moments, int64_t bins, double epsilon, double min_std,
                  FittedForms* forms, double* curve, double* scratch, Executor executor);

}  // namespace segk
