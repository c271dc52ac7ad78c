#include "segk/gae.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_gae(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "gae_fwd",
      [](FloatsArg rewards, FloatsArg values, uintptr_t mask, RowsArg rows, double gamma,
         double lam, uintptr_t advantages, uintptr_t returns, ExecutorArg executor) {
        gae_fwd(floats(rewards), floats(values), at<const bool>(mask), rows_of(rows),
                {gamma, gamma * lam}, at<float>(advantages), at<float>(returns),
                executor_of(executor));
      },
      no_gil, "rewards"_a, "values"_a, "mask"_a, "rows"_a, "gamma"_a, "lam"_a, "advantages"_a,
      "returns"_a, "executor"_a);
}
