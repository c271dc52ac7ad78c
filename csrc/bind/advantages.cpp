#include "segk/advantages.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_advantages(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_advantages_fwd",
      [](FloatsArg rewards, uintptr_t ends, FloatsArg logprobs, FloatsArg ref_logprobs,
         FloatsArg values, uintptr_t mask, RowsArg rows, CurveArg curve, int spread, bool mean,
         float clip, double kl_coef, double gamma, double lam, uintptr_t advantages,
         uintptr_t returns, uintptr_t token_rewards, uintptr_t kl, ExecutorArg executor) {
        segment_advantages_fwd(floats(rewards), at<const bool>(ends), floats(logprobs),
                               floats(ref_logprobs), floats(values), at<const bool>(mask),
                               rows_of(rows), credit_of(curve, spread, mean, clip), kl_coef,
                               {gamma, gamma * lam}, at<float>(advantages), at<float>(returns),
                               at<float>(token_rewards), at<float>(kl), executor_of(executor));
      },
      no_gil, "rewards"_a, "ends"_a, "logprobs"_a, "ref_logprobs"_a, "values"_a, "mask"_a, "rows"_a,
      "curve"_a, "spread"_a, "mean"_a, "clip"_a, "kl_coef"_a, "gamma"_a, "lam"_a, "advantages"_a,
      "returns"_a, "token_rewards"_a, "kl"_a, "executor"_a);
}
