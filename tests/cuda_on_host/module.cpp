// The CUDA module as csrc/bind/cuda_module.cpp makes it, over kernels that run on the host.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/ops.h"
#include "cuda/scratch.h"

namespace {

// What the stand-in has to find: a barrier that one thread leaves out, and a result that depends on
// whose turn comes first.
struct Fault {
  bool skips_barrier;
  int* last;
};

void faulty_kernel(Fault fault) {
  if (!(fault.skips_barrier && threadIdx.x == 5)) __syncthreads();
  *fault.last = static_cast<int>(threadIdx.x);
}

int run_faulty(bool skips_barrier) {
  int last = -1;
  cudaLaunchConfig_t config;
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, faulty_kernel, Fault{skips_barrier, &last});
  return last;
}

}  // namespace

PYBIND11_MODULE(cuda_on_host, m) {
  m.attr("SCRATCH_BYTES") = segk::kScratchBytes;
  m.def("order", &cuda_on_host::order);
  m.def("launches", [] { return cuda_on_host::launched.exchange(0); });
  m.def("run_faulty", &run_faulty);
  // Devices with a context, before and after.
  m.def("forget_contexts", [] {
    for (auto& context : cuda_on_host::contexts) context = false;
    cuda_on_host::current_device = 0;
  });
  m.def("set_device", [](int device) { cudaSetDevice(device); });
  m.def("devices", [] {
    std::vector<int> with_context;
    for (int i = 0; i < cuda_on_host::kDevices; ++i) {
      if (cuda_on_host::contexts[i]) with_context.push_back(i);
    }
    return std::make_tuple(cuda_on_host::launched_on.load(), cuda_on_host::current_device,
                           with_context);
  });
  bind_sequence_ops(m);
  bind_normalizer_fit(m);
}
