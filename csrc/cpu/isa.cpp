// Compiled for every processor: it runs before one is known to have more.
#include "segk/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace segk {
namespace {

// Best last.
std::vector<std::string> runnable() {
  std::vector<std::string> names{"scalar"};
#if defined(SEGK_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    names.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      names.emplace_back("avx512");
    }
  }
#endif
  return names;
}

}  // namespace

std::string chosen_isa() {
  const std::vector<std::string> names = runnable();
  const char* asked = std::getenv("SEGKERNELS_ISA");
  if (!asked || !*asked) return names.back();
  std::string known;
  for (const std::string& name : names) {
    if (asked == name) return name;
    known += (known.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument("SEGKERNELS_ISA: expected one that this processor and build run (" +
                              known + "), got '" + asked + "'; unset it to use the best of them");
}

}  // namespace segk
