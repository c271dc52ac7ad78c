#include "segk/segments.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_segments(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_ends",
      [](FloatsArg entropy, uintptr_t mask, RowsArg rows, float threshold, bool current,
         uintptr_t exclude_last, bool exclude_all, uintptr_t ends, ExecutorArg executor) {
        return segment_ends(floats(entropy), at<const bool>(mask), rows_of(rows), threshold,
                            current, at<const bool>(exclude_last), exclude_all, at<bool>(ends),
                            executor_of(executor));
      },
      no_gil, "entropy"_a, "mask"_a, "rows"_a, "threshold"_a, "current"_a, "exclude_last"_a,
      "exclude_all"_a, "ends"_a, "executor"_a);
}
