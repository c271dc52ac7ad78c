// The extension module of NVIDIA GPUs: the sequence ops under the same names as on CPUs.
#include <pybind11/pybind11.h>

#include "cuda/scratch.h"

namespace py = pybind11;

void bind_segments(py::module_& m);
void bind_advantages(py::module_& m);

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of segkernels: addresses, sizes and a stream in, memory filled.";
  m.def("build_info", [] { return "built for" SEGK_CUDA_TARGETS; });
  m.attr("SCRATCH_BYTES") = segk::kScratchBytes;
  bind_segments(m);
  bind_advantages(m);
}
