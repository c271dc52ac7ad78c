#include "segk/running_normalizer.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_running_normalizer(py::module_& m) {
  m.def(
      "location_moments",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, int64_t bins,
         uintptr_t moments, uintptr_t not_finite, uintptr_t scratch, ExecutorArg executor) {
        location_moments(floats(rewards), at<const bool>(ends), at<const bool>(mask), rows_of(rows),
                         bins, at<double>(moments), at<int64_t>(not_finite), at<void>(scratch),
                         executor_of(executor));
      },
      py::call_guard<py::gil_scoped_release>(), "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "bins"_a,
      "moments"_a, "not_finite"_a, "scratch"_a, "executor"_a);

  m.def(
      "location_moments_scratch",
      [](RowsArg rows, int64_t bins) { return location_moments_scratch(rows_of(rows), bins); },
      "rows"_a, "bins"_a);
}
