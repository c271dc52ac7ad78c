// What a sequence op runs on. Each op is declared and bound to Python once, and implemented twice:
// the _native modules have it for CPUs, the _cuda module for NVIDIA GPUs.
#pragma once

#include <cstdint>

namespace segk {

struct Executor {
  // CPU: the number of threads that may be used. GPU: the cudaStream_t that the kernel is put on.
  int64_t threads_or_stream;
  int device;  // index of the GPU: its default stream does not tell

  constexpr Executor(int64_t threads_or_stream_, int device_ = -1)
      : threads_or_stream(threads_or_stream_), device(device_) {}
};

// Ops that sum over all rows take `scratch`, through which the blocks of a GPU exchange their
// partial sums. SCRATCH_BYTES of a module says how many bytes that is; CPUs need none.

}  // namespace segk
