// What a sequence op runs on. Each op is declared and bound to Python once, and implemented twice:
// the _native modules have it for CPUs, the _cuda module for NVIDIA GPUs.
#pragma once

#include <cstdint>

namespace segk {

// CPU: the number of threads that may be used. GPU: the cudaStream_t that the kernel is put on.
using Executor = int64_t;

// Ops that sum over all rows take `scratch`, through which the blocks of a GPU exchange their
// partial sums. SCRATCH_BYTES of a module says how many bytes that is; CPUs need none.

}  // namespace segk
