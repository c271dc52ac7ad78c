// Where a sequence op runs. The ops are declared and bound once, and each module of the package
// implements them: those of _native on CPUs, _cuda on NVIDIA GPUs.
#pragma once

#include <cstdint>

namespace segk {

// CPU: how many threads may work on it. GPU: the cudaStream_t that it is put on.
using Place = int64_t;

// Ops that sum over all rows take `scratch`, where the blocks of a GPU leave their sums for each
// other. Each module says how many bytes it needs; CPUs need none.

}  // namespace segk
