#include <cfloat>
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "segk/normalizer_fit.h"

namespace segk {
namespace {

constexpr int kFitThreads = 512;
constexpr int kMostIterations = 2000;
constexpr double kSegmentsPerKnot = 32;
constexpr double kTolerance = 1e-12;

struct FitArgs {
  const double* moments;
  int64_t bins;
  double epsilon;
  double min_std;
  FittedForms* forms;
  double* curve;
  double* log_p;  // [bins], as the next two
  double* std;
  double* weight;

  // Half an observation: a bin that decay has emptied.
  __device__ bool seen(int64_t bin) const { return moments[bin] >= 0.5; }
  __device__ double position(int64_t bin) const {
    return static_cast<double>(bin + 1) / static_cast<double>(bins);
  }
  __device__ const double* mean() const { return moments + bins; }

  // Each thread visits its own bins, so what it has left in scratch memory it reads again.
  template <class Visit>
  __device__ void for_each_seen(Visit visit) const {
    for (int64_t bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      if (seen(bin)) visit(bin);
    }
  }
};

struct Sums {
  double a;
  double b;
  double c;
};

__device__ inline Sums combine(Sums left, Sums right) {
  return {left.a + right.a, left.b + right.b, left.c + right.c};
}

struct Largest {
  double value;
};

__device__ inline Largest combine(Largest left, Largest right) {
  return left.value < right.value ? right : left;
}

// Over the bins that were seen, by the whole block.
template <class T, class Term>
__device__ T over_bins(const FitArgs& a, Term term) {
  T mine{};
  a.for_each_seen([&](int64_t bin) { mine = combine(mine, term(bin)); });
  return Group(true).scan<From::left>(mine, T{}, T{}).total;
}

struct Line {
  double slope;
  double intercept;

  __device__ double residual(double x, double y) const { return fabs(y - slope * x - intercept); }
};

// The scale s at which sum_i min((r_i / s)^2, epsilon^2) equals the number of residuals, by
// Newton's method for 1 / s^2. The sum is a concave function of that, so the steps rise from the
// scale at which all residuals are inliers, each with fewer of them, and end at the solution.
__device__ double huber_scale(const FitArgs& a, const double* y, Line line, double n) {
  const double squared = a.epsilon * a.epsilon;
  double inliers = n;
  double limit = INFINITY;  // of the square of an inlier's residual
  for (;;) {
    const Sums sums = over_bins<Sums>(a, [&](int64_t bin) {
      const double r = line.residual(a.log_p[bin], y[bin]);
      return r * r <= limit ? Sums{r * r, 1, 0} : Sums{0, 0, 0};
    });
    const double scale = sums.a > 0 ? sums.a / (n - (n - sums.b) * squared) : 0;
    if (!(sums.b < inliers) && limit < INFINITY) return sqrt(scale);
    if (scale == 0) return 0;
    inliers = sums.b;
    limit = squared * scale;
  }
}

// huber_line of normalizer_fit.py: the same iteration with the same end.
__device__ Line huber_line(const FitArgs& a, const double* y, double n) {
  const double largest =
      over_bins<Largest>(a, [&](int64_t bin) { return Largest{fabs(y[bin])}; }).value;
  const double size = largest > 0 ? largest : 1;
  a.for_each_seen([&](int64_t bin) { a.weight[bin] = 1; });
  Line line{0, 0};
  for (int i = 0; i < kMostIterations; ++i) {
    const Sums sums = over_bins<Sums>(a, [&](int64_t bin) {
      const double w = a.weight[bin];
      return Sums{w, w * a.log_p[bin], w * y[bin]};
    });
    const double x_mean = sums.b / sums.a;
    const double y_mean = sums.c / sums.a;
    const Sums products = over_bins<Sums>(a, [&](int64_t bin) {
      const double w = a.weight[bin];
      const double x = a.log_p[bin] - x_mean;
      return Sums{w * (x * x), w * x * (y[bin] - y_mean), 0};
    });
    const Line old = line;
    line.slope = products.a > 0 ? products.b / products.a : 0;
    line.intercept = y_mean - line.slope * x_mean;
    const double scale = fmax(huber_scale(a, y, line, n), kTolerance * size);
    a.for_each_seen([&](int64_t bin) {
      const double r = line.residual(a.log_p[bin], y[bin]);
      a.weight[bin] = fmin(a.epsilon * scale / fmax(r, 1e-300), 1.0);
    });
    const double moved = fmax(fabs(line.slope - old.slope), fabs(line.intercept - old.intercept));
    if (moved <= kTolerance * size) break;
  }
  return line;
}

// The share of the variation of y that the line explains.
__device__ double r2(const FitArgs& a, const double* y, Line line, double n) {
  const double mean = over_bins<Sums>(a, [&](int64_t bin) { return Sums{y[bin], 0, 0}; }).a / n;
  const Sums sums = over_bins<Sums>(a, [&](int64_t bin) {
    const double deviation = y[bin] - mean;
    const double r = line.residual(a.log_p[bin], y[bin]);
    return Sums{deviation * deviation, y[bin] * y[bin], r * r};
  });
  return sums.a <= 1e-20 * sums.b ? 1 : 1 - sums.c / sums.a;
}

// Where the knots of the table begin: at bin first[i], and the last one ends at `bins`. One thread
// goes from bin to bin as the host does, because a sum in another order could move a boundary.
__device__ int divide_into_knots(const FitArgs& a, double n, int32_t (&first)[kMaxKnots + 1]) {
  double total = 0;
  for (int64_t bin = 0; bin < a.bins; ++bin) total += a.seen(bin) ? a.moments[bin] : 0;
  const int most = static_cast<int>(
      fmin(fmin(static_cast<double>(kMaxKnots), n), fmax(1.0, trunc(total / kSegmentsPerKnot))));
  const double knots_per_segment = most / total;
  __shared__ double sizes[kMaxKnots];
  double largest = 0;
  double upto = 0;
  int knots = 0;
  int last = -1;  // a position with many segments skips knots
  for (int64_t bin = 0; bin < a.bins; ++bin) {
    if (!a.seen(bin)) continue;
    const double count = a.moments[bin];
    upto += count;
    int knot = static_cast<int>((upto - count / 2) * knots_per_segment);
    if (knot >= most) knot = most - 1;
    if (knot != last) {
      first[knots] = static_cast<int32_t>(bin);
      sizes[knots++] = 0;
      last = knot;
    }
    sizes[knots - 1] += count;
    largest = fmax(largest, sizes[knots - 1]);
  }
  // A rare position between two frequent ones joins the next knot: its own std may be zero.
  const double full = fmin(largest, kSegmentsPerKnot);
  int merged = 0;
  bool begins = true;
  for (int knot = 0; knot < knots; ++knot) {
    if (begins) first[merged++] = first[knot];
    begins = sizes[knot] >= full;
  }
  // Behind the last full one there is none to join.
  if (!begins && merged > 1) --merged;
  first[merged] = static_cast<int32_t>(a.bins);
  return merged;
}

__device__ void fit_knot(const FitArgs& a, int knot, int32_t begin, int32_t end) {
  double size = 0, at = 0, mean = 0;
  for (int64_t bin = begin; bin < end; ++bin) {
    if (!a.seen(bin)) continue;
    const double count = a.moments[bin];
    size += count;
    at += count * a.position(bin);
    mean += count * a.mean()[bin];
  }
  mean /= size;
  double m2 = 0;
  for (int64_t bin = begin; bin < end; ++bin) {
    if (!a.seen(bin)) continue;
    const double deviation = a.mean()[bin] - mean;
    m2 += a.moments[2 * a.bins + bin] + a.moments[bin] * (deviation * deviation);
  }
  a.forms->knots[0][knot] = fmin(at / size, 1.0);
  a.forms->knots[1][knot] = mean;
  a.forms->knots[2][knot] = sqrt(m2 / size);
}

__device__ inline bool is_finite(double x) { return fabs(x) <= DBL_MAX; }

__global__ void __launch_bounds__(kFitThreads, 1) fit_location_kernel(const FitArgs a) {
  __shared__ int32_t first[kMaxKnots + 1];
  __shared__ int knots;
  FittedForms& forms = *a.forms;
  const int rank = static_cast<int>(threadIdx.x);
  const int size = static_cast<int>(blockDim.x);
  const bool leads = rank == 0;
  for (int i = rank; i < kCurveNumbers; i += size) a.curve[i] = 0;
  for (int i = rank; i < 3 * kMaxKnots; i += size) forms.knots[i / kMaxKnots][i % kMaxKnots] = 0;
  const double n = over_bins<Sums>(a, [](int64_t) { return Sums{1, 0, 0}; }).a;
  if (n == 0) {
    if (leads) {
      forms.outcome = static_cast<double>(FitOutcome::no_segments);
      forms.mean_slope = forms.mean_intercept = forms.std_slope = forms.std_intercept = 0;
      forms.r2_mean = forms.r2_std = forms.n_knots = 0;
    }
    return;
  }
  a.for_each_seen([&](int64_t bin) {
    a.log_p[bin] = log(a.position(bin));
    a.std[bin] = sqrt(a.moments[2 * a.bins + bin] / a.moments[bin]);
  });
  const Line mean = huber_line(a, a.mean(), n);
  const Line std = huber_line(a, a.std, n);
  const double r2_mean = r2(a, a.mean(), mean, n);
  const double r2_std = r2(a, a.std, std, n);
  if (leads) knots = divide_into_knots(a, n, first);
  __syncthreads();
  for (int knot = rank; knot < knots; knot += size) {
    fit_knot(a, knot, first[knot], first[knot + 1]);
  }
  __syncthreads();
  const bool own_floor = a.min_std != a.min_std;
  const double line_floor = own_floor ? std.intercept / 10 : a.min_std;
  const double table_floor = own_floor ? forms.knots[2][knots - 1] / 10 : a.min_std;
  const bool line = !(r2_mean < 0.5);

  // The curve, as PackedCurve has it.
  const int count = line ? 1 : knots;
  for (int i = rank; i < 3 * count; i += size) {
    const double of_line = i == 0 ? 1 : i == 1 ? mean.intercept : std.intercept;
    a.curve[4 + i] = line ? of_line : forms.knots[i / knots][i % knots];
  }
  if (!leads) return;
  bool finite = true;
  for (int i = 0; i < 3 * knots; ++i) finite &= is_finite(forms.knots[i / knots][i % knots]);
  a.curve[0] = line ? mean.slope : 0;
  a.curve[1] = line ? std.slope : 0;
  a.curve[2] = line ? line_floor : table_floor;
  a.curve[3] = count;
  const bool usable = finite && is_finite(mean.slope) && is_finite(mean.intercept) &&
                      is_finite(std.slope) && is_finite(std.intercept) && line_floor > 0 &&
                      is_finite(line_floor) && table_floor > 0 && is_finite(table_floor);
  forms.outcome = static_cast<double>(usable ? FitOutcome::fitted : FitOutcome::not_usable);
  forms.mean_slope = mean.slope;
  forms.mean_intercept = mean.intercept;
  forms.std_slope = std.slope;
  forms.std_intercept = std.intercept;
  forms.r2_mean = r2_mean;
  forms.r2_std = r2_std;
  forms.n_knots = knots;
}

}  // namespace

void fit_location(const double* moments, int64_t bins, double epsilon, double min_std,
                  FittedForms* forms, double* curve, double* scratch, Executor executor) {
  const FitArgs args{moments, bins,    epsilon,        min_std,           forms,
                     curve,   scratch, scratch + bins, scratch + 2 * bins};
  launch("fit_location", fit_location_kernel, args, 1, kFitThreads, curve, executor);
}

}  // namespace segk
