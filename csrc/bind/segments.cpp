#include "segk/segments.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_segments(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_ends",
      [](FloatsArg entropy, uintptr_t mask, RowsArg rows, BoundariesArg boundaries, uintptr_t ends,
         ExecutorArg executor) {
        return segment_ends(floats(entropy), at<const bool>(mask), rows_of(rows),
                            boundaries_of(boundaries), at<bool>(ends), executor_of(executor));
      },
      no_gil, "entropy"_a, "mask"_a, "rows"_a, "boundaries"_a, "ends"_a, "executor"_a);
}
