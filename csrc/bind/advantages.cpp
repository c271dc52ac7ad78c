#include "segk/advantages.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

namespace {

// (curve, spread, whether to take the mean, clip).
using CreditArg = std::tuple<CurveArg, int, bool, float>;
// (gamma, lambda).
using GaeArg = std::tuple<double, double>;
// Addresses of advantages, returns, token rewards and KL estimates.
using OutputsArg = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

AdvantageInputs inputs_of(FloatsArg rewards, FloatsArg logprobs, FloatsArg ref_logprobs,
                          FloatsArg values, uintptr_t mask, RowsArg rows, CreditArg credit,
                          double kl_coef, GaeArg discounts) {
  const auto [curve, spread, mean, clip] = credit;
  const auto [gamma, lam] = discounts;
  return {floats(rewards),
          floats(logprobs),
          floats(ref_logprobs),
          floats(values),
          at<const bool>(mask),
          rows_of(rows),
          credit_of(curve, spread, mean, clip),
          kl_coef,
          {gamma, gamma * lam}};
}

AdvantageOutputs outputs_of(OutputsArg out) {
  const auto [advantages, returns, token_rewards, kl] = out;
  return {at<float>(advantages), at<float>(returns), at<float>(token_rewards), at<float>(kl)};
}

}  // namespace

void bind_advantages(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "segment_advantages_fwd",
      [](FloatsArg rewards, uintptr_t ends, FloatsArg logprobs, FloatsArg ref_logprobs,
         FloatsArg values, uintptr_t mask, RowsArg rows, CreditArg credit, double kl_coef,
         GaeArg discounts, OutputsArg out, ExecutorArg executor) {
        segment_advantages_fwd(inputs_of(rewards, logprobs, ref_logprobs, values, mask, rows,
                                         credit, kl_coef, discounts),
                               at<const bool>(ends), outputs_of(out), executor_of(executor));
      },
      no_gil, "rewards"_a, "ends"_a, "logprobs"_a, "ref_logprobs"_a, "values"_a, "mask"_a, "rows"_a,
      "credit"_a, "kl_coef"_a, "discounts"_a, "out"_a, "executor"_a);
  m.def(
      "segment_ends_and_advantages_fwd",
      [](FloatsArg entropy, BoundariesArg boundaries, FloatsArg rewards, FloatsArg logprobs,
         FloatsArg ref_logprobs, FloatsArg values, uintptr_t mask, RowsArg rows, CreditArg credit,
         double kl_coef, GaeArg discounts, uintptr_t ends, OutputsArg out, ExecutorArg executor) {
        return segment_ends_and_advantages_fwd(floats(entropy), boundaries_of(boundaries),
                                               inputs_of(rewards, logprobs, ref_logprobs, values,
                                                         mask, rows, credit, kl_coef, discounts),
                                               at<bool>(ends), outputs_of(out),
                                               executor_of(executor));
      },
      no_gil, "entropy"_a, "boundaries"_a, "rewards"_a, "logprobs"_a, "ref_logprobs"_a, "values"_a,
      "mask"_a, "rows"_a, "credit"_a, "kl_coef"_a, "discounts"_a, "ends"_a, "out"_a, "executor"_a);
}
