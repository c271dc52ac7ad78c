#include "segk/ppo_loss.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_ppo_loss(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "policy_loss_fwd",
      [](FloatsArg logprobs, FloatsArg old_logprobs, FloatsArg advantages, uintptr_t mask,
         RowsArg rows, float low, float high, int aggregation, uintptr_t loss,
         uintptr_t row_weights, uintptr_t scratch, ExecutorArg executor) {
        policy_loss_fwd(floats(logprobs), floats(old_logprobs), floats(advantages),
                        at<const bool>(mask), rows_of(rows), low, high,
                        static_cast<Aggregation>(aggregation), at<float>(loss),
                        at<double>(row_weights), at<void>(scratch), executor_of(executor));
      },
      no_gil, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "mask"_a, "rows"_a, "low"_a, "high"_a,
      "aggregation"_a, "loss"_a, "row_weights"_a, "scratch"_a, "executor"_a);

  m.def(
      "policy_loss_bwd",
      [](uintptr_t dloss, FloatsArg logprobs, FloatsArg old_logprobs, FloatsArg advantages,
         uintptr_t mask, RowsArg rows, float low, float high, uintptr_t row_weights,
         uintptr_t dlogprobs, ExecutorArg executor) {
        policy_loss_bwd(at<const float>(dloss), floats(logprobs), floats(old_logprobs),
                        floats(advantages), at<const bool>(mask), rows_of(rows), low, high,
                        at<const double>(row_weights), at<float>(dlogprobs), executor_of(executor));
      },
      no_gil, "dloss"_a, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "mask"_a, "rows"_a,
      "low"_a, "high"_a, "row_weights"_a, "dlogprobs"_a, "executor"_a);

  m.def(
      "value_loss_fwd",
      [](FloatsArg values, FloatsArg old_values, FloatsArg returns, uintptr_t mask, RowsArg rows,
         float clip, int aggregation, uintptr_t loss, uintptr_t row_weights, uintptr_t scratch,
         ExecutorArg executor) {
        value_loss_fwd(floats(values), floats(old_values), floats(returns), at<const bool>(mask),
                       rows_of(rows), clip, static_cast<Aggregation>(aggregation), at<float>(loss),
                       at<double>(row_weights), at<void>(scratch), executor_of(executor));
      },
      no_gil, "values"_a, "old_values"_a, "returns"_a, "mask"_a, "rows"_a, "clip"_a,
      "aggregation"_a, "loss"_a, "row_weights"_a, "scratch"_a, "executor"_a);

  m.def(
      "value_loss_bwd",
      [](uintptr_t dloss, FloatsArg values, FloatsArg old_values, FloatsArg returns, uintptr_t mask,
         RowsArg rows, float clip, uintptr_t row_weights, uintptr_t dvalues, ExecutorArg executor) {
        value_loss_bwd(at<const float>(dloss), floats(values), floats(old_values), floats(returns),
                       at<const bool>(mask), rows_of(rows), clip, at<const double>(row_weights),
                       at<float>(dvalues), executor_of(executor));
      },
      no_gil, "dloss"_a, "values"_a, "old_values"_a, "returns"_a, "mask"_a, "rows"_a, "clip"_a,
      "row_weights"_a, "dvalues"_a, "executor"_a);
}
