#include "segk/whiten.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_whiten(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "moments_fwd",
      [](FloatsArg x, uintptr_t mask, int64_t n, uintptr_t moments, uintptr_t scratch,
         ExecutorArg executor) {
        moments_fwd(floats(x), at<const bool>(mask), n, at<double>(moments), at<void>(scratch),
                    executor_of(executor));
      },
      no_gil, "x"_a, "mask"_a, "n"_a, "moments"_a, "scratch"_a, "executor"_a);

  m.def(
      "whiten_fwd",
      [](FloatsArg x, uintptr_t mask, int64_t n, uintptr_t moments, bool center, uintptr_t out,
         ExecutorArg executor) {
        whiten_fwd(floats(x), at<const bool>(mask), n, at<const double>(moments), center,
                   at<float>(out), executor_of(executor));
      },
      no_gil, "x"_a, "mask"_a, "n"_a, "moments"_a, "center"_a, "out"_a, "executor"_a);
}
