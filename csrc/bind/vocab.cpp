#include "segk/vocab.h"

#include "bind/bind.h"

namespace py = pybind11;
using namespace py::literals;
using namespace segk;

void bind_vocab(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  // Local: two of the modules may be loaded at once.
  py::class_<VocabRows>(m, "VocabRows", py::module_local())
      .def(py::init([](FloatsArg logits, int64_t count, int64_t vocab, int64_t inner,
                       int64_t outer_stride, int64_t inner_stride, int64_t first, uintptr_t targets,
                       uintptr_t temperatures, double temperature) {
             return VocabRows{floats(logits).data,
                              floats(logits).dtype,
                              count,
                              vocab,
                              inner,
                              outer_stride,
                              inner_stride,
                              first,
                              at<const int64_t>(targets),
                              at<const float>(temperatures),
                              temperature};
           }),
           "logits"_a, "count"_a, "vocab"_a, "inner"_a, "outer_stride"_a, "inner_stride"_a,
           "first"_a, "targets"_a, "temperatures"_a, "temperature"_a);

  m.def(
      "vocab_accumulate",
      [](const VocabRows& rows, uintptr_t mask, uintptr_t states, int threads) {
        vocab_accumulate(rows, at<const bool>(mask), at<RowState>(states), threads);
      },
      no_gil, "rows"_a, "mask"_a, "states"_a, "threads"_a);

  m.def(
      "vocab_finish",
      [](const VocabRows& rows, uintptr_t mask, uintptr_t states, uintptr_t logprobs,
         uintptr_t entropy, uintptr_t stats, int threads) {
        vocab_finish(rows, at<const bool>(mask), at<const RowState>(states), at<float>(logprobs),
                     at<float>(entropy), at<RowStats>(stats), threads);
      },
      no_gil, "rows"_a, "mask"_a, "states"_a, "logprobs"_a, "entropy"_a, "stats"_a, "threads"_a);

  m.def(
      "vocab_forward",
      [](const VocabRows& rows, uintptr_t mask, uintptr_t logprobs, uintptr_t entropy,
         uintptr_t stats, int threads) {
        vocab_forward(rows, at<const bool>(mask), at<float>(logprobs), at<float>(entropy),
                      at<RowStats>(stats), threads);
      },
      no_gil, "rows"_a, "mask"_a, "logprobs"_a, "entropy"_a, "stats"_a, "threads"_a);

  m.def(
      "vocab_backward",
      [](const VocabRows& rows, uintptr_t stats, uintptr_t dlogprobs, uintptr_t dentropy,
         uintptr_t dlogits, int64_t stride, int threads) {
        vocab_backward(rows, at<const RowStats>(stats), at<const float>(dlogprobs),
                       at<const float>(dentropy), at<void>(dlogits), stride, threads);
      },
      no_gil, "rows"_a, "stats"_a, "dlogprobs"_a, "dentropy"_a, "dlogits"_a, "stride"_a,
      "threads"_a);

  m.def(
      "vocab_exp",
      [](uintptr_t x, uintptr_t out, int64_t count) {
        vocab_exp(at<const float>(x), at<float>(out), count);
      },
      no_gil, "x"_a, "out"_a, "count"_a);
}
