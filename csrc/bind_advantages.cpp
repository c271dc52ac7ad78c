#include "bind.h"
#include "segk/advantages.h"
#include "segk/operators.h"

namespace py = pybind11;
using namespace py::literals;
using segk::at;
using segk::floats;
using segk::FloatsArg;
using segk::rows_of;
using segk::RowsArg;

namespace {

// segkernels.rewards.native_curve: (address of what Curve.packed in normalizer.py holds, knots).
using CurveArg = std::tuple<uintptr_t, int>;

segk::Credit credit_of(CurveArg arg, int spread, bool mean, float clip) {
  const auto* packed = at<const float>(std::get<0>(arg));
  segk::Curve curve{0, 0, 0, std::get<1>(arg), nullptr};
  if (packed) curve = {packed[0], packed[1], packed[2], std::get<1>(arg), packed + 3};
  return {curve, static_cast<segk::Spread>(spread), mean, clip};
}

}  // namespace

void bind_advantages(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def(
      "scatter_segment_rewards_fwd",
      [](FloatsArg rewards, uintptr_t ends, uintptr_t mask, RowsArg rows, CurveArg curve,
         int spread, bool mean, float clip, uintptr_t out, segk::Place place) {
        segk::scatter_segment_rewards_fwd(
            floats(rewards), at<const bool>(ends), at<const bool>(mask), rows_of(rows),
            credit_of(curve, spread, mean, clip), at<float>(out), place);
      },
      no_gil, "rewards"_a, "ends"_a, "mask"_a, "rows"_a, "curve"_a, "spread"_a, "mean"_a, "clip"_a,
      "out"_a, "place"_a);

  m.def(
      "gae_fwd",
      [](FloatsArg rewards, FloatsArg values, uintptr_t mask, RowsArg rows, double gamma,
         double lam, uintptr_t advantages, uintptr_t returns, segk::Place place) {
        segk::gae_fwd(floats(rewards), floats(values), at<const bool>(mask), rows_of(rows), gamma,
                      lam, at<float>(advantages), at<float>(returns), place);
      },
      no_gil, "rewards"_a, "values"_a, "mask"_a, "rows"_a, "gamma"_a, "lam"_a, "advantages"_a,
      "returns"_a, "place"_a);

  m.def(
      "segment_advantages_fwd",
      [](FloatsArg rewards, uintptr_t ends, FloatsArg logprobs, FloatsArg ref_logprobs,
         FloatsArg values, uintptr_t mask, RowsArg rows, CurveArg curve, int spread, bool mean,
         float clip, double kl_coef, double gamma, double lam, uintptr_t advantages,
         uintptr_t returns, uintptr_t token_rewards, uintptr_t kl, segk::Place place) {
        segk::segment_advantages_fwd(floats(rewards), at<const bool>(ends), floats(logprobs),
                                     floats(ref_logprobs), floats(values), at<const bool>(mask),
                                     rows_of(rows), credit_of(curve, spread, mean, clip), kl_coef,
                                     gamma, lam, at<float>(advantages), at<float>(returns),
                                     at<float>(token_rewards), at<float>(kl), place);
      },
      no_gil, "rewards"_a, "ends"_a, "logprobs"_a, "ref_logprobs"_a, "values"_a, "mask"_a, "rows"_a,
      "curve"_a, "spread"_a, "mean"_a, "clip"_a, "kl_coef"_a, "gamma"_a, "lam"_a, "advantages"_a,
      "returns"_a, "token_rewards"_a, "kl"_a, "place"_a);

  m.def(
      "moments_fwd",
      [](FloatsArg x, uintptr_t mask, int64_t n, uintptr_t moments, uintptr_t scratch,
         segk::Place place) {
        segk::moments_fwd(floats(x), at<const bool>(mask), n, at<double>(moments),
                          at<void>(scratch), place);
      },
      no_gil, "x"_a, "mask"_a, "n"_a, "moments"_a, "scratch"_a, "place"_a);

  m.def(
      "whiten_fwd",
      [](FloatsArg x, uintptr_t mask, int64_t n, uintptr_t moments, bool center, uintptr_t out,
         segk::Place place) {
        segk::whiten_fwd(floats(x), at<const bool>(mask), n, at<const double>(moments), center,
                         at<float>(out), place);
      },
      no_gil, "x"_a, "mask"_a, "n"_a, "moments"_a, "center"_a, "out"_a, "place"_a);

  m.def(
      "policy_loss_fwd",
      [](FloatsArg logprobs, FloatsArg old_logprobs, FloatsArg advantages, uintptr_t mask,
         RowsArg rows, float low, float high, int aggregation, uintptr_t loss,
         uintptr_t row_weights, uintptr_t scratch, segk::Place place) {
        segk::policy_loss_fwd(floats(logprobs), floats(old_logprobs), floats(advantages),
                              at<const bool>(mask), rows_of(rows), low, high,
                              static_cast<segk::Aggregation>(aggregation), at<float>(loss),
                              at<double>(row_weights), at<void>(scratch), place);
      },
      no_gil, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "mask"_a, "rows"_a, "low"_a, "high"_a,
      "aggregation"_a, "loss"_a, "row_weights"_a, "scratch"_a, "place"_a);

  m.def(
      "policy_loss_bwd",
      [](uintptr_t dloss, FloatsArg logprobs, FloatsArg old_logprobs, FloatsArg advantages,
         uintptr_t mask, RowsArg rows, float low, float high, uintptr_t row_weights,
         uintptr_t dlogprobs, segk::Place place) {
        segk::policy_loss_bwd(at<const float>(dloss), floats(logprobs), floats(old_logprobs),
                              floats(advantages), at<const bool>(mask), rows_of(rows), low, high,
                              at<const double>(row_weights), at<float>(dlogprobs), place);
      },
      no_gil, "dloss"_a, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "mask"_a, "rows"_a,
      "low"_a, "high"_a, "row_weights"_a, "dlogprobs"_a, "place"_a);

  m.def(
      "value_loss_fwd",
      [](FloatsArg values, FloatsArg old_values, FloatsArg returns, uintptr_t mask, RowsArg rows,
         float clip, int aggregation, uintptr_t loss, uintptr_t row_weights, uintptr_t scratch,
         segk::Place place) {
        segk::value_loss_fwd(floats(values), floats(old_values), floats(returns),
                             at<const bool>(mask), rows_of(rows), clip,
                             static_cast<segk::Aggregation>(aggregation), at<float>(loss),
                             at<double>(row_weights), at<void>(scratch), place);
      },
      no_gil, "values"_a, "old_values"_a, "returns"_a, "mask"_a, "rows"_a, "clip"_a,
      "aggregation"_a, "loss"_a, "row_weights"_a, "scratch"_a, "place"_a);

  m.def(
      "value_loss_bwd",
      [](uintptr_t dloss, FloatsArg values, FloatsArg old_values, FloatsArg returns, uintptr_t mask,
         RowsArg rows, float clip, uintptr_t row_weights, uintptr_t dvalues, segk::Place place) {
        segk::value_loss_bwd(at<const float>(dloss), floats(values), floats(old_values),
                             floats(returns), at<const bool>(mask), rows_of(rows), clip,
                             at<const double>(row_weights), at<float>(dvalues), place);
      },
      no_gil, "dloss"_a, "values"_a, "old_values"_a, "returns"_a, "mask"_a, "rows"_a, "clip"_a,
      "row_weights"_a, "dvalues"_a, "place"_a);
}
