#include "segk/normalizer_fit.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_normalizer_fit(py::module_& m) {
  m.def(
      "fit_location",
      [](uintptr_t moments, int64_t bins, double epsilon, double min_std, uintptr_t forms,
         uintptr_t curve, uintptr_t scratch, ExecutorArg executor) {
        fit_location(at<const double>(moments), bins, epsilon, min_std, at<FittedForms>(forms),
                     at<double>(curve), at<double>(scratch), executor_of(executor));
      },
      py::call_guard<py::gil_scoped_release>(), "moments"_a, "bins"_a, "epsilon"_a, "min_std"_a,
      "forms"_a, "curve"_a, "scratch"_a, "executor"_a);
}
