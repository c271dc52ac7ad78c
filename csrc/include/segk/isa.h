// The CPU kernels are compiled once per instruction set, each copy into a module of its own:
// _native runs everywhere, _native_avx2 and _native_avx512 where the processor has these sets.
#pragma once

#include <string>

namespace segk {

// What the kernels beside this function were compiled for: "scalar", "avx2" or "avx512".
const char* isa_name();

// What SEGKERNELS_ISA asks for, else the best that this build has and this processor runs.
// Throws std::invalid_argument when it asks for one that cannot run here.
std::string chosen_isa();

}  // namespace segk
