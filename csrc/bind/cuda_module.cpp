// The module of NVIDIA GPUs: the sequence ops under the same names as on CPUs.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <utility>

#include "bind/ops.h"
#include "cuda/scratch.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of segkernels: addresses, sizes and a stream in, memory filled.";
  m.def("build_info", [] { return "built for" SEGK_CUDA_TARGETS; });
  // (what the driver serves, what this was built with); creates no context.
  m.def("cuda_versions", [] {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return std::make_pair(driver, CUDART_VERSION);
  });
  m.attr("SCRATCH_BYTES") = segk::kScratchBytes;
  bind_sequence_ops(m);
  bind_normalizer_fit(m);
}
