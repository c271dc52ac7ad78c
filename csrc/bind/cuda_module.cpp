// The module of NVIDIA GPUs: the sequence ops under the same names as on CPUs.
#include <pybind11/pybind11.h>

#include "bind/bind.h"
#include "cuda/scratch.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of segkernels: addresses, sizes and a stream in, memory filled.";
  m.def("build_info", [] { return "built for" SEGK_CUDA_TARGETS; });
  m.attr("SCRATCH_BYTES") = segk::kScratchBytes;
  bind_sequence_ops(m);
  bind_normalizer_fit(m);
}
