#include "segk/bradley_terry.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_bradley_terry(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_scores_fwd",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, bool mean,
         uintptr_t scores, uintptr_t counts, ExecutorArg executor) {
        return segment_scores_fwd(floats(rewards), at<const bool>(ends), at<const bool>(mask),
                                  rows_of(rows), mean, at<float>(scores), at<int32_t>(counts),
                                  executor_of(executor));
      },
      no_gil, "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "mean"_a, "scores"_a, "counts"_a,
      "executor"_a);

  m.def(
      "segment_scores_bwd",
      [](uintptr_t dscores, uintptr_t counts, uintptr_t ends, uintptr_t mask, RowsArg rows,
         bool mean, uintptr_t drewards, ExecutorArg executor) {
        segment_scores_bwd(at<const float>(dscores), at<const int32_t>(counts),
                           at<const bool>(ends), at<const bool>(mask), rows_of(rows), mean,
                           at<float>(drewards), executor_of(executor));
      },
      no_gil, "dscores"_a, "counts"_a, "ends"_a, "mask"_a, "rows"_a, "mean"_a, "drewards"_a,
      "executor"_a);

  m.def(
      "segment_bradley_terry_fwd",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, uintptr_t margin,
         bool mean, double smoothing, double center_coef, uintptr_t loss, uintptr_t scores,
         uintptr_t accuracy, uintptr_t counts, uintptr_t score_grads, uintptr_t scratch,
         ExecutorArg executor) {
        return segment_bradley_terry_fwd(
            floats(rewards), at<const bool>(ends), at<const bool>(mask), rows_of(rows),
            at<const float>(margin), {mean, smoothing, center_coef}, at<float>(loss),
            at<float>(scores), at<float>(accuracy), at<int32_t>(counts), at<float>(score_grads),
            at<void>(scratch), executor_of(executor));
      },
      no_gil, "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "margin"_a, "mean"_a, "smoothing"_a,
      "center_coef"_a, "loss"_a, "scores"_a, "accuracy"_a, "counts"_a, "score_grads"_a, "scratch"_a,
      "executor"_a);

  m.def(
      "segment_bradley_terry_bwd",
      [](uintptr_t dloss, uintptr_t dscores, uintptr_t score_grads, uintptr_t counts,
         uintptr_t ends, uintptr_t mask, RowsArg rows, bool mean, uintptr_t drewards,
         ExecutorArg executor) {
        segment_bradley_terry_bwd(at<const float>(dloss), at<const float>(dscores),
                                  at<const float>(score_grads), at<const int32_t>(counts),
                                  at<const bool>(ends), at<const bool>(mask), rows_of(rows), mean,
                                  at<float>(drewards), executor_of(executor));
      },
      no_gil, "dloss"_a, "dscores"_a, "score_grads"_a, "counts"_a, "ends"_a, "mask"_a, "rows"_a,
      "mean"_a, "drewards"_a, "executor"_a);
}
