// The extension module. Only this file and the bind_*.cpp beside it know Python.
#include <pybind11/pybind11.h>

#include <string>

#include "segk/vocab.h"

namespace py = pybind11;

void bind_segments(py::module_& m);
void bind_advantages(py::module_& m);
void bind_normalizer(py::module_& m);
void bind_vocab(py::module_& m);

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of segkernels: addresses, sizes and dtype codes in, memory filled.";
  m.def("build_info",
        [] { return std::string("isa ") + segk::isa_name() + "; built without CUDA"; });
  bind_segments(m);
  bind_advantages(m);
  bind_normalizer(m);
  bind_vocab(m);
}
