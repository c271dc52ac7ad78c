// The CPU modules, one for each instruction set.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "bind/ops.h"
#include "segk/gae.h"
#include "segk/isa.h"
#include "segk/moments.h"

namespace py = pybind11;

PYBIND11_MODULE(SEGK_MODULE, m) {
  m.doc() = "Compiled kernels of segkernels: addresses, sizes and dtype codes in, memory filled.";
  m.def("build_info", [] { return std::string("isa ") + segk::isa_name(); });
  m.def("chosen_isa", segk::chosen_isa);
  m.attr("SCRATCH_BYTES") = 0;
  bind_sequence_ops(m);
  bind_vocab(m);

  // The scans' operators, so that tests can combine in any order.
  m.def("combine_affine", [](std::tuple<float, float> outer, std::tuple<float, float> inner) {
    const auto [scale, shift] =
        combine(segk::Affine<float>{std::get<0>(outer), std::get<1>(outer)},
                segk::Affine<float>{std::get<0>(inner), std::get<1>(inner)});
    return std::make_tuple(scale, shift);
  });
  m.def("combine_moments",
        [](std::tuple<double, double, double> left, std::tuple<double, double, double> right) {
          const auto [count, mean, m2] =
              combine(segk::Moments{std::get<0>(left), std::get<1>(left), std::get<2>(left)},
                      segk::Moments{std::get<0>(right), std::get<1>(right), std::get<2>(right)});
          return std::make_tuple(count, mean, m2);
        });
}
