#include "bind.h"
#include "segk/segments.h"

namespace py = pybind11;
using namespace py::literals;
using segk::at;
using segk::floats;
using segk::FloatsArg;
using segk::rows_of;
using segk::RowsArg;

void bind_segments(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_ends",
      [](FloatsArg entropy, uintptr_t mask, RowsArg rows, float threshold, bool current,
         uintptr_t exclude_last, bool exclude_all, uintptr_t ends, segk::Place place) {
        return segk::segment_ends(floats(entropy), at<const bool>(mask), rows_of(rows), threshold,
                                  current, at<const bool>(exclude_last), exclude_all,
                                  at<bool>(ends), place);
      },
      no_gil, "entropy"_a, "mask"_a, "rows"_a, "threshold"_a, "current"_a, "exclude_last"_a,
      "exclude_all"_a, "ends"_a, "place"_a);

  m.def(
      "segment_scores_fwd",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, bool mean,
         uintptr_t scores, uintptr_t counts, segk::Place place) {
        return segk::segment_scores_fwd(floats(rewards), at<const bool>(ends), at<const bool>(mask),
                                        rows_of(rows), mean, at<float>(scores), at<int32_t>(counts),
                                        place);
      },
      no_gil, "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "mean"_a, "scores"_a, "counts"_a,
      "place"_a);

  m.def(
      "segment_scores_bwd",
      [](uintptr_t dscores, uintptr_t counts, uintptr_t ends, uintptr_t mask, RowsArg rows,
         bool mean, uintptr_t drewards, segk::Place place) {
        segk::segment_scores_bwd(at<const float>(dscores), at<const int32_t>(counts),
                                 at<const bool>(ends), at<const bool>(mask), rows_of(rows), mean,
                                 at<float>(drewards), place);
      },
      no_gil, "dscores"_a, "counts"_a, "ends"_a, "mask"_a, "rows"_a, "mean"_a, "drewards"_a,
      "place"_a);

  m.def(
      "segment_bradley_terry_fwd",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, uintptr_t margin,
         bool mean, double smoothing, double center_coef, uintptr_t loss, uintptr_t scores,
         uintptr_t accuracy, uintptr_t counts, uintptr_t slopes, uintptr_t scratch,
         segk::Place place) {
        return segk::segment_bradley_terry_fwd(
            floats(rewards), at<const bool>(ends), at<const bool>(mask), rows_of(rows),
            at<const float>(margin), {mean, smoothing, center_coef}, at<float>(loss),
            at<float>(scores), at<float>(accuracy), at<int32_t>(counts), at<float>(slopes),
            at<void>(scratch), place);
      },
      no_gil, "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "margin"_a, "mean"_a, "smoothing"_a,
      "center_coef"_a, "loss"_a, "scores"_a, "accuracy"_a, "counts"_a, "slopes"_a, "scratch"_a,
      "place"_a);

  m.def(
      "segment_bradley_terry_bwd",
      [](uintptr_t dloss, uintptr_t dscores, uintptr_t slopes, uintptr_t counts, uintptr_t ends,
         uintptr_t mask, RowsArg rows, bool mean, uintptr_t drewards, segk::Place place) {
        segk::segment_bradley_terry_bwd(at<const float>(dloss), at<const float>(dscores),
                                        at<const float>(slopes), at<const int32_t>(counts),
                                        at<const bool>(ends), at<const bool>(mask), rows_of(rows),
                                        mean, at<float>(drewards), place);
      },
      no_gil, "dloss"_a, "dscores"_a, "slopes"_a, "counts"_a, "ends"_a, "mask"_a, "rows"_a,
      "mean"_a, "drewards"_a, "place"_a);
}
