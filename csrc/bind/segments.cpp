#include "segk/segments.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using segk::at;
using segk::boundaries_of;
using segk::BoundariesArg;
using segk::floats;
using segk::FloatsArg;
using segk::rows_of;
using segk::RowsArg;

void bind_segments(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_ends",
      [](FloatsArg entropy, uintptr_t mask, RowsArg rows, BoundariesArg boundaries, uintptr_t ends,
         segk::Executor executor) {
        return segk::segment_ends(floats(entropy), at<const bool>(mask), rows_of(rows),
                                  boundaries_of(boundaries), at<bool>(ends), executor);
      },
      no_gil, "entropy"_a, "mask"_a, "rows"_a, "boundaries"_a, "ends"_a, "executor"_a);
}
