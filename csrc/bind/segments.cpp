#include "segk/segments.h"

#include "bind/bind.h"

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
         uintptr_t exclude_last, bool exclude_all, uintptr_t ends, segk::Executor executor) {
        return segk::segment_ends(floats(entropy), at<const bool>(mask), rows_of(rows), threshold,
                                  current, at<const bool>(exclude_last), exclude_all,
                                  at<bool>(ends), executor);
      },
      no_gil, "entropy"_a, "mask"_a, "rows"_a, "threshold"_a, "current"_a, "exclude_last"_a,
      "exclude_all"_a, "ends"_a, "executor"_a);
}
