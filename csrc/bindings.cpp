// The extension module. Only this file and the bind_*.cpp beside it know Python.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cstdint>
#include <string>

#include "segk/vocab.h"

namespace py = pybind11;
using namespace py::literals;

void bind_segments(py::module_& m);
void bind_advantages(py::module_& m);
void bind_normalizer(py::module_& m);
void bind_vocab(py::module_& m);

namespace {

// Advice, so a system without huge pages is no error.
void prefer_huge_pages(uintptr_t begin, uintptr_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of segkernels: addresses, sizes and dtype codes in, memory filled.";
  m.def("build_info",
        [] { return std::string("isa ") + segk::isa_name() + "; built without CUDA"; });
  m.def("prefer_huge_pages", prefer_huge_pages, "begin"_a, "bytes"_a);
  bind_segments(m);
  bind_advantages(m);
  bind_normalizer(m);
  bind_vocab(m);
}
