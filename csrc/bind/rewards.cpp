#include "segk/rewards.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_rewards(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "scatter_segment_rewards_fwd",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, CurveArg curve,
         int spread, bool mean, float clip, uintptr_t out, ExecutorArg executor) {
        scatter_segment_rewards_fwd(floats(rewards), at<const bool>(ends), at<const bool>(mask),
                                    rows_of(rows), credit_of(curve, spread, mean, clip),
                                    at<float>(out), executor_of(executor));
      },
      no_gil, "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "curve"_a, "spread"_a, "mean"_a, "clip"_a,
      "out"_a, "executor"_a);
}
