#include "segk/ppo_loss.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_ppo_loss(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  // ref_logprobs and entropy have address 0 for a loss without that term, dentropy where it is not
  // wanted.
  m.def(
      "policy_loss_fwd",
      [](FloatsArg logprobs, FloatsArg old_logprobs, FloatsArg advantages, FloatsArg ref_logprobs,
         FloatsArg entropy, uintptr_t mask, RowsArg rows, float low, float high, double kl_coef,
         double entropy_coef, int aggregation, uintptr_t loss, uintptr_t clip_fraction,
         uintptr_t approx_kl, uintptr_t row_weights, uintptr_t scratch, ExecutorArg executor) {
        policy_loss_fwd(floats(logprobs), floats(old_logprobs), floats(advantages),
                        floats(ref_logprobs), floats(entropy), at<const bool>(mask), rows_of(rows),
                        {low, high, kl_coef, entropy_coef}, static_cast<Aggregation>(aggregation),
                        {at<float>(loss), at<float>(clip_fraction), at<float>(approx_kl)},
                        at<double>(row_weights), at<void>(scratch), executor_of(executor));
      },
      no_gil, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "ref_logprobs"_a, "entropy"_a,
      "mask"_a, "rows"_a, "low"_a, "high"_a, "kl_coef"_a, "entropy_coef"_a, "aggregation"_a,
      "loss"_a, "clip_fraction"_a, "approx_kl"_a, "row_weights"_a, "scratch"_a, "executor"_a);

  m.def(
      "policy_loss_bwd",
      [](uintptr_t dloss, FloatsArg logprobs, FloatsArg old_logprobs, FloatsArg advantages,
         FloatsArg ref_logprobs, uintptr_t mask, RowsArg rows, float low, float high,
         double kl_coef, double entropy_coef, uintptr_t row_weights, uintptr_t dlogprobs,
         uintptr_t dentropy, ExecutorArg executor) {
        policy_loss_bwd(at<const float>(dloss), floats(logprobs), floats(old_logprobs),
                        floats(advantages), floats(ref_logprobs), at<const bool>(mask),
                        rows_of(rows), {low, high, kl_coef, entropy_coef},
                        at<const double>(row_weights), at<float>(dlogprobs), at<float>(dentropy),
                        executor_of(executor));
      },
      no_gil, "dloss"_a, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "ref_logprobs"_a, "mask"_a,
      "rows"_a, "low"_a, "high"_a, "kl_coef"_a, "entropy_coef"_a, "row_weights"_a, "dlogprobs"_a,
      "dentropy"_a, "executor"_a);

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
